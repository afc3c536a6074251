"""What a model says of each version of an image, and the verdicts that follow.

Shapes: D draws, N images, S columns of suspicion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attacks.threat import ThreatModel


@dataclass(frozen=True)
class Seen:
    """What a model says of one version of each image: whether its class is right, bool_DN, and what is held against it.

    An attack that spares an image leaves it as it was.

    Args:
        bounded: whether the version lies within the threat model; else it stands beside the worst case.
    """

    right: Tensor
    suspicion_DNS: Tensor
    bounded: bool = True


@dataclass(frozen=True)
class Verdict:
    """What follows for each image in each draw, bool_DN, and the shares of both; rejection never counts as accuracy.

    Args:
        right: every version is accepted and right.
        wrong: some version is accepted and wrong.
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
        """The share of images that are neither: some version is rejected, and none is accepted and wrong."""
        return share(~self.right & ~self.wrong)

    @property
    def worst(self) -> float:
        """The accuracy in the worst of the draws."""
        return float(self.right.double().mean(dim=1).min())


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Verdicts on the clean images and on them with their attacked versions.

    Args:
        oblivious: with every version crafted on the bare classifier.
        black_box: with every version crafted on the attacker's substitute; None where they were not.
        white_box: with all others and the white-box ones; None where they were not run.
        trail: accuracy after each attack, by `knowledge/attack`; white-box ones cumulative, others over all images.
        queries: images whose class the black-box attacker asked for.
    """

    threat: ThreatModel
    clean: Verdict
    oblivious: Verdict
    black_box: Verdict | None
    white_box: Verdict | None
    trail: Mapping[str, float]
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
        """Whether the clean image is accepted and right, and every version of it right or rejected, bool_DN."""
        return self.clean.right & ~self.attacked.wrong

    @property
    def survivors(self) -> Tensor:
        """`robust` under the white-box attacks."""
        return self.clean.right & ~self.strongest.wrong


@dataclass(frozen=True, kw_only=True)
class Observation:
    """All that a model said. Verdicts under other limits need no other forward pass.

    Args:
        black_box, white_box: None where they were not run.
        queries: images whose class the black-box attacker asked for.
        limits_S: the model's own thresholds.
    """

    threat: ThreatModel
    clean: Seen
    oblivious: Mapping[str, Seen]
    black_box: Mapping[str, Seen] | None
    white_box: Mapping[str, Seen] | None
    limits_S: Tensor
    queries: int = 0

    def judge(self, limits_S: Tensor | None = None) -> Robustness:
        """Return the verdicts under the model's own thresholds, or others."""
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
        return Robustness(
            threat=self.threat,
            clean=clean,
            oblivious=oblivious,
            black_box=black_box,
            white_box=white_box,
            trail=trail,
            queries=self.queries,
        )

    @property
    def versions(self) -> tuple[Seen, ...]:
        """The clean images and their versions under the threat model."""
        white_box = self.threat.knowledge == "white-box"
        blind = {} if self.threat.knowledge == "black-box" else self.oblivious
        dark = {} if self.threat.knowledge == "oblivious" else self.black_box or {}
        crafted = (*blind.values(), *dark.values(), *(self.white_box or {} if white_box else {}).values())
        return (self.clean, *(seen for seen in crafted if seen.bounded))


def share(verdicts: Tensor) -> float:
    return float(verdicts.double().mean())
