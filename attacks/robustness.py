"""Accuracy under attack, sample by sample: what a model says of each version of an image, and the verdict on it.

Shapes: N images, C channels, H x W pixels, K classes, S columns of suspicion (none where nothing can be rejected).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from attacks.suite import BATCH, Attack, Suite, reproducible
from attacks.threat import ThreatModel
from attacks.view import Guarded, View, gradients, limits, stochastic


@dataclass(frozen=True)
class Seen:
    """What a model says of one version of each image: whether its class is right, bool_N, and what is held against it.

    An attack that spares an image leaves it as it was.
    """

    right: Tensor
    suspicion_NS: Tensor


@dataclass(frozen=True)
class Verdict:
    """What follows for each image, bool_N; rejection never counts as accuracy.

    Args:
        right: every version is accepted and right.
        wrong: some version is accepted and wrong.
    """

    right: Tensor
    wrong: Tensor

    @classmethod
    def of(cls, seen: Seen, limits_S: Tensor) -> Verdict:
        accepted = (seen.suspicion_NS <= limits_S.to(seen.suspicion_NS)).all(dim=1)
        return cls(accepted & seen.right, accepted & ~seen.right)

    def __and__(self, other: Verdict) -> Verdict:
        return Verdict(self.right & other.right, self.wrong | other.wrong)

    @property
    def accuracy(self) -> float:
        return _share(self.right)

    @property
    def error(self) -> float:
        return _share(self.wrong)

    @property
    def rejection(self) -> float:
        """The share of images that are neither: some version is rejected, and none is accepted and wrong."""
        return _share(~self.right & ~self.wrong)


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Verdicts on the clean images and on them with their attacked versions.

    Args:
        oblivious: with every version crafted on the bare classifier.
        white_box: with the white-box ones too; None where they were not run.
        trail: accuracy after each attack, by `knowledge/attack`; oblivious ones over all samples each, white-box
            ones cumulative.
    """

    threat: ThreatModel
    clean: Verdict
    oblivious: Verdict
    white_box: Verdict | None
    trail: Mapping[str, float]

    @property
    def attacked(self) -> Verdict:
        """The verdict under the threat model."""
        return self.oblivious if self.threat.knowledge == "oblivious" else self.strongest

    @property
    def strongest(self) -> Verdict:
        """The verdict under the white-box attacks."""
        assert self.white_box is not None, "the white-box attacks were not run"
        return self.white_box

    @property
    def robust(self) -> Tensor:
        """Whether the clean image is accepted and right, and every version of it right or rejected, bool_N."""
        return self.clean.right & ~self.attacked.wrong

    @property
    def survivors(self) -> Tensor:
        """`robust` under the white-box attacks."""
        return self.clean.right & ~self.strongest.wrong


@dataclass(frozen=True, kw_only=True)
class Observation:
    """All that a model said. Verdicts under other limits need no other forward pass.

    Args:
        white_box: None where they were not run.
        limits_S: the model's own thresholds.
    """

    threat: ThreatModel
    clean: Seen
    oblivious: Mapping[str, Seen]
    white_box: Mapping[str, Seen] | None
    limits_S: Tensor

    def judge(self, limits_S: Tensor | None = None) -> Robustness:
        """Return the verdicts under the model's own thresholds, or others."""
        limits_S = self.limits_S if limits_S is None else limits_S
        clean = oblivious = Verdict.of(self.clean, limits_S)
        trail = {}
        for name, seen in self.oblivious.items():
            one = clean & Verdict.of(seen, limits_S)
            trail[f"oblivious/{name}"] = one.accuracy
            oblivious = oblivious & one
        white_box = oblivious
        for name, seen in (self.white_box or {}).items():
            white_box = white_box & Verdict.of(seen, limits_S)
            trail[f"white-box/{name}"] = white_box.accuracy
        return Robustness(
            threat=self.threat,
            clean=clean,
            oblivious=oblivious,
            white_box=None if self.white_box is None else white_box,
            trail=trail,
        )

    @property
    def versions(self) -> tuple[Seen, ...]:
        """The clean images and their versions under the threat model."""
        white_box = {} if self.threat.knowledge == "oblivious" else self.white_box or {}
        return (self.clean, *self.oblivious.values(), *white_box.values())


def craft_oblivious(
    suite: Suite, classifier: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, seed: int
) -> dict[str, Tensor]:
    """Return the adversarial images of each oblivious attack: they depend on the bare classifier alone."""
    return {attack.name: attack.craft(View(classifier), x_NCHW, y_N, threat, seed) for attack in suite.oblivious}


def evaluate(
    suite: Suite,
    target: nn.Module,
    x_NCHW: Tensor,
    y_N: Tensor,
    threat: ThreatModel,
    *,
    oblivious: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    white_box: bool = False,
) -> Robustness:
    """Attack a bare or defended classifier and return the verdict on each sample; see `observe`."""
    found = observe(suite, target, x_NCHW, y_N, threat, oblivious=oblivious, seed=seed, white_box=white_box)
    return found.judge()


def observe(
    suite: Suite,
    target: nn.Module,
    x_NCHW: Tensor,
    y_N: Tensor,
    threat: ThreatModel,
    *,
    oblivious: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    white_box: bool = False,
) -> Observation:
    """Attack a bare or defended classifier.

    A white-box attack sees only what the earlier ones left, except where images can be rejected: what one attack
    brings past one threshold another may bring past a stricter one.

    Args:
        target: logits_NK from images in [0, 1]; with `accept` where it can reject.
        oblivious: images of `craft_oblivious`, where they are at hand.
        seed: of the attacks and of the defense's noise.
        white_box: run the white-box attacks too where the threat model is the oblivious one.
    """
    if oblivious is None:
        bare = cast(Guarded, target).classifier if hasattr(target, "defense") else target
        oblivious = craft_oblivious(suite, bare, x_NCHW, y_N, threat, seed)
    clean = look(target, x_NCHW, y_N, seed)
    blind = {name: look(target, adversarial_NCHW, y_N, seed) for name, adversarial_NCHW in oblivious.items()}
    seen: dict[str, Seen] | None = None
    if threat.knowledge != "oblivious" or white_box:
        seen = {}
        standing = reduce(torch.logical_and, (one.right for one in (clean, *blind.values())))
        draws = suite.draws if stochastic(target) else 1
        for gradient in gradients(target):
            for attack in suite.white_box:
                chosen = (standing | (clean.suspicion_NS.shape[1] > 0)).nonzero().flatten()
                one = _strike(attack, View(target, gradient, draws), target, x_NCHW, y_N, threat, seed, clean, chosen)
                seen[f"{attack.name} ({gradient})"] = one
                standing = standing & one.right
    return Observation(threat=threat, clean=clean, oblivious=blind, white_box=seen, limits_S=limits(target))


@torch.no_grad()
def look(target: nn.Module, x_NCHW: Tensor, y_N: Tensor, seed: int) -> Seen:
    """Return what a model says of images; noise is drawn from `seed`."""
    rights, held = [], []
    with reproducible(target, seed):
        for x, y in zip(x_NCHW.split(BATCH), y_N.split(BATCH), strict=True):
            rights.append(target(x).argmax(1) == y)
            rejects = hasattr(target, "defense")
            held.append(cast(Guarded, target).defense.suspicion(x) if rejects else x.new_zeros((len(x), 0)))
    return Seen(torch.cat(rights), torch.cat(held))


def _strike(
    attack: Attack,
    view: View,
    target: nn.Module,
    x_NCHW: Tensor,
    y_N: Tensor,
    threat: ThreatModel,
    seed: int,
    clean: Seen,
    chosen: Tensor,
) -> Seen:
    """Attack the chosen images; the others stay as they were, and count as clean ones."""
    right, suspicion_NS = clean.right.clone(), clean.suspicion_NS.clone()
    if len(chosen):
        x, y = x_NCHW[chosen], y_N[chosen]
        one = look(target, attack.craft(view, x, y, threat, seed), y, seed)
        right[chosen], suspicion_NS[chosen] = one.right, one.suspicion_NS
    return Seen(right, suspicion_NS)


def _share(verdicts_N: Tensor) -> float:
    return float(verdicts_N.double().mean())
