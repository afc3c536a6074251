"""A model's outputs on each version of an image, and the verdicts derived from them.

Shapes: D draws of noise, N images, S detector scores. A version of an image is the clean one or an adversarial example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from attacks.threat import ThreatModel


@dataclass(frozen=True)
class Seen:
    """A model's outputs on one version of each image: whether the class is correct, bool_DN, and the detector scores.

    An image that an attack is not run on keeps its clean outputs.

    Args:
        bounded: whether the version lies within the threat model; otherwise it is not part of the worst case.
        x_NCHW: the version itself, where `observe` was asked to keep it.
    """

    right: Tensor
    suspicion_DNS: Tensor
    bounded: bool = True
    x_NCHW: Tensor | None = None

    def where(self, chosen_N: Tensor, other: Seen) -> Seen:
        """Return these outputs on the chosen images, and another's on the rest."""
        suspicion_DNS = self.suspicion_DNS.where(chosen_N[:, None], other.suspicion_DNS)
        return replace(self, right=self.right.where(chosen_N, other.right), suspicion_DNS=suspicion_DNS)


@dataclass(frozen=True)
class Verdict:
    """The verdict on each image in each draw, bool_DN, and the resulting rates; a rejection never counts as accuracy.

    Args:
        right: every version is accepted and classified correctly.
        wrong: some version is accepted and misclassified.
    """

    right: Tensor
    wrong: Tensor

    @classmethod
    def of(cls, seen: Seen, limits_S: Tensor) -> Verdict:
        accepted = (seen.suspicion_DNS <= limits_S.to(seen.suspicion_DNS)).all(dim=-1)
        return cls(accepted & seen.right, accepted & ~seen.right)

    def __and__(self, other: Verdict) -> Verdict:
        return Verdict(self.right & other.right, self.wrong | other.wrong)

    @property
    def accuracy(self) -> float:
        return share(self.right)

    @property
    def error(self) -> float:
        return share(self.wrong)

    @property
    def rejection(self) -> float:
        """The share of images with neither verdict: some version is rejected, none is accepted and misclassified."""
        return share(~self.right & ~self.wrong)

    @property
    def worst(self) -> float:
        """The accuracy in the worst draw."""
        return float(self.right.double().mean(dim=1).min())


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Verdicts on the clean images, and on the clean images together with their adversarial examples.

    Args:
        oblivious: verdict with all examples crafted on the bare classifier.
        black_box: verdict with all examples crafted on the attacker's substitute; None where they were not crafted.
        white_box: verdict with all of these and the white-box examples; None where they were not crafted.
        known: verdict of all of these in the first draw, bool_1N, with the examples of who knows its noise; that of
            `white_box` where there is no noise; None where they were not crafted.
        trail: accuracy after each attack, by `knowledge/attack`; white-box ones cumulative, the others each alone.
        queries: number of images whose class the black-box attacker queried.
    """

    threat: ThreatModel
    clean: Verdict
    oblivious: Verdict
    black_box: Verdict | None
    white_box: Verdict | None
    trail: Mapping[str, float]
    known: Verdict | None = None
    queries: int = 0

    @property
    def attacked(self) -> Verdict:
        """The verdict under the threat model."""
        if self.threat.knowledge == "black-box":
            assert self.black_box is not None, "the black-box attacks were not run"
            return self.black_box
        return self.oblivious if self.threat.knowledge == "oblivious" else self.strongest

    @property
    def strongest(self) -> Verdict:
        """The verdict under the white-box attacks."""
        assert self.white_box is not None, "the white-box attacks were not run"
        return self.white_box

    @property
    def robust(self) -> Tensor:
        """Whether the clean image is accepted and correct and no version is accepted and misclassified, bool_DN."""
        return self.clean.right & ~self.attacked.wrong

    @property
    def survivors(self) -> Tensor:
        """`robust` under the white-box attacks."""
        return self.clean.right & ~self.strongest.wrong


@dataclass(frozen=True, kw_only=True)
class Observation:
    """All outputs of a model under attack; verdicts at other thresholds need no further forward pass.

    Args:
        black_box, white_box, known: None where these attacks were not run.
        known: outputs in the first draw, whose noise the attacker knew; empty where there is no noise.
        queries: number of images whose class the black-box attacker queried.
        limits_S: the model's own thresholds.
    """

    threat: ThreatModel
    clean: Seen
    oblivious: Mapping[str, Seen]
    black_box: Mapping[str, Seen] | None
    white_box: Mapping[str, Seen] | None
    limits_S: Tensor
    known: Mapping[str, Seen] | None = None
    queries: int = 0

    def judge(self, limits_S: Tensor | None = None) -> Robustness:
        """Return the verdicts at the model's own thresholds, or at the given ones."""
        limits_S = self.limits_S if limits_S is None else limits_S
        clean, trail = Verdict.of(self.clean, limits_S), dict[str, float]()

        def worst(knowledge: str, versions: Mapping[str, Seen], start: Verdict, cumulative: bool = False) -> Verdict:
            whole = start
            for name, seen in versions.items():
                one = (whole if cumulative and seen.bounded else clean) & Verdict.of(seen, limits_S)
                trail[f"{knowledge}/{name}"] = one.accuracy
                whole = whole & one if seen.bounded else whole
            return whole

        oblivious = worst("oblivious", self.oblivious, clean)
        black_box = None if self.black_box is None else worst("black-box", self.black_box, clean)
        white_box = None
        if self.white_box is not None:
            start = oblivious if black_box is None else oblivious & black_box
            white_box = worst("white-box", self.white_box, start, cumulative=True)
        known = None
        if self.known is not None and white_box is not None:
            first = Verdict(white_box.right[:1], white_box.wrong[:1])
            known = worst("known-noise", self.known, first, cumulative=True)
        return Robustness(
            threat=self.threat,
            clean=clean,
            oblivious=oblivious,
            black_box=black_box,
            white_box=white_box,
            known=known,
            trail=trail,
            queries=self.queries,
        )

    @property
    def versions(self) -> tuple[Seen, ...]:
        """The outputs on the clean images and on all versions within the threat model."""
        white_box = self.threat.knowledge == "white-box"
        blind = {} if self.threat.knowledge == "black-box" else self.oblivious
        dark = {} if self.threat.knowledge == "oblivious" else self.black_box or {}
        crafted = (*blind.values(), *dark.values(), *(self.white_box or {} if white_box else {}).values())
        return (self.clean, *(seen for seen in crafted if seen.bounded))

    @property
    def kept(self) -> dict[str, Seen]:
        """The versions within the threat model's bound whose images were kept, by `knowledge/attack`."""
        groups = {"oblivious": self.oblivious, "black-box": self.black_box or {}, "white-box": self.white_box or {}}
        named = {f"{knowledge}/{name}": seen for knowledge, group in groups.items() for name, seen in group.items()}
        return {name: seen for name, seen in named.items() if seen.bounded and seen.x_NCHW is not None}


def worse(one: Verdict, other: Verdict) -> Verdict:
    """Return the worst case of two verdicts, per image for a deterministic defense.

    With noise, draws do not correspond: the verdict with less accuracy; `one`, if the numbers of draws differ.
    """
    if len(one.right) == 1:
        return one & other
    return min(one, other, key=lambda verdict: verdict.accuracy) if len(other.right) == len(one.right) else one


def disagreement(verdicts_DN: Tensor) -> float:
    """Return the rate at which two draws of a model's noise give an image different verdicts."""
    rate_N = verdicts_DN.double().mean(dim=0)
    return float((2 * rate_N * (1 - rate_N)).mean())


def share(verdicts: Tensor) -> float:
    return float(verdicts.double().mean())
