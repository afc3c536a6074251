"""Accuracy under attack, sample by sample: a sample is robust when it withstands every attack of the suite.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from attacks.suite import BATCH, Attack, Suite, reproducible
from attacks.threat import ThreatModel
from attacks.view import Guarded, View, gradients, stochastic


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Verdicts on each sample, all bool_N.

    Args:
        right: the clean image is classified right (and accepted).
        accepted: the clean image is accepted.
        oblivious: right, and so is every image crafted on the bare classifier, or it is rejected.
        white_box: withstands the white-box attacks too; None where they were not run.
        trail: accuracy after each attack, by `knowledge/attack`; oblivious ones over all samples each, white-box
            ones cumulative, since each attacks only what the earlier ones left.
    """

    threat: ThreatModel
    right: Tensor
    accepted: Tensor
    oblivious: Tensor
    white_box: Tensor | None
    trail: Mapping[str, float]

    @property
    def robust(self) -> Tensor:
        """The verdict under the threat model."""
        return self.oblivious if self.threat.knowledge == "oblivious" else self.survivors

    @property
    def survivors(self) -> Tensor:
        """The verdict under the white-box attacks."""
        assert self.white_box is not None, "the white-box attacks were not run"
        return self.white_box


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
    """Attack a bare or defended classifier and return the verdict on each sample.

    Args:
        target: logits_NK from images in [0, 1]; with `accept` where it can reject.
        oblivious: images of `craft_oblivious`, where they are at hand.
        seed: of the attacks and of the defense's noise.
        white_box: run the white-box attacks too where the threat model is the oblivious one.
    """
    if oblivious is None:
        bare = cast(Guarded, target).classifier if hasattr(target, "defense") else target
        oblivious = craft_oblivious(suite, bare, x_NCHW, y_N, threat, seed)
    accepted, correct = verdicts(target, x_NCHW, y_N, seed)
    right = accepted & correct
    robust, trail = right.clone(), dict[str, float]()
    for name, adversarial_NCHW in oblivious.items():
        withstood = right & _withstands(target, adversarial_NCHW, y_N, seed)
        trail[f"oblivious/{name}"] = float(withstood.double().mean())
        robust &= withstood
    if threat.knowledge == "oblivious" and not white_box:
        return Robustness(threat=threat, right=right, accepted=accepted, oblivious=robust, white_box=None, trail=trail)
    survives = robust.clone()
    draws = suite.draws if stochastic(target) else 1
    for gradient in gradients(target):
        for attack in suite.white_box:
            _strike(attack, View(target, gradient, draws), target, x_NCHW, y_N, threat, seed, survives)
            trail[f"white-box/{attack.name} ({gradient})"] = float(survives.double().mean())
    return Robustness(threat=threat, right=right, accepted=accepted, oblivious=robust, white_box=survives, trail=trail)


@torch.no_grad()
def verdicts(target: nn.Module, x_NCHW: Tensor, y_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return whether each image is accepted, and whether it is classified right; noise is drawn from `seed`."""
    accepts, rights = [], []
    with reproducible(target, seed):
        for x, y in zip(x_NCHW.split(BATCH), y_N.split(BATCH), strict=True):
            rights.append(target(x).argmax(1) == y)
            rejects = hasattr(target, "accept")
            accepts.append(cast(Guarded, target).accept(x) if rejects else torch.ones_like(rights[-1]))
    return torch.cat(accepts), torch.cat(rights)


def _withstands(target: nn.Module, adversarial_NCHW: Tensor, y_N: Tensor, seed: int) -> Tensor:
    accepted, correct = verdicts(target, adversarial_NCHW, y_N, seed)
    return correct | ~accepted


def _strike(
    attack: Attack,
    view: View,
    target: nn.Module,
    x_NCHW: Tensor,
    y_N: Tensor,
    threat: ThreatModel,
    seed: int,
    survives: Tensor,
) -> None:
    """Attack the survivors and strike out those who fall."""
    standing = survives.nonzero().flatten()
    if len(standing) == 0:
        return
    x, y = x_NCHW[standing], y_N[standing]
    survives[standing] &= _withstands(target, attack.craft(view, x, y, threat, seed), y, seed)
