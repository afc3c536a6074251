"""A proposal, and a candidate with its score: accuracy under attack, clean accuracy, rejection, latency, alarms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from attacks.threat import ThreatModel
from spaces.domain import Scalar
from spaces.space import Params


@dataclass(frozen=True)
class Proposal:
    """A setting that a worker is to evaluate.

    Args:
        name: t001, t002, ... for a training, r001, r002, ... for a refinement.
        refines: score a stored fit at this one inference setting, without training.
        rivals: device, latency in ms and attacked accuracy of the best candidates when it was proposed.
    """

    name: str
    params: Params
    refines: bool = False
    rivals: tuple[tuple[str, float, float], ...] = ()


QUIET = 0.1
"""Largest relative difference between two measurements of a latency of which none was disturbed."""
Images = Literal["clean", "attacked", ""]
"""On which images a defended model took longer, so that its latency is theirs; empty: not noted until 2026-11."""


@dataclass(frozen=True)
class Latency:
    """Purification latency of one setting on one device: the defended model's time minus the bare classifier's, in ms.

    Args:
        ms_p50, ms_p95: of a batch of 128 images, at least 0; the bare classifier's is its median.
        single_ms_p50: of one image.
        drift: relative change of the reference kernel's time from before to after, a fraction.
        device: where it was measured.
        repeats: how often the batch was timed.
        images: whose batches took longer; `single_ms_p50` is of the kind that took longer one by one.
    """

    ms_p50: float
    ms_p95: float
    single_ms_p50: float
    drift: float
    device: str
    repeats: int
    images: Images = ""

    def to_json(self) -> dict[str, float | str]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One candidate's figures. Accuracies and rejections are fractions in [0, 1], latencies milliseconds.

    Args:
        threat: the study's threat model, for all `attacked_` figures.
        attacked_accuracy: images of which every version, including the clean one, is accepted and right.
        attacked_error: images of which some version is accepted and wrong.
        attacked_rejection: the remaining images.
        attacks: accuracy after each attack, by `knowledge/attack`; each oblivious one over all images, white-box ones
            cumulative (each runs on the images that the earlier ones left).
        known_noise_accuracy: white-box, where the attacker also knows the noise of one draw; None: not asked for.
        worst_draw_accuracy: the attacked one in the worst draw of a defense's noise; None: not asked for.
        queries: number of queries of the black-box attacker; 0 if it was not run.
        images: number of validation images that were attacked.
        device: where the latency was measured.
        latency_images: which images took longer, so that the latency is theirs; empty if none was measured.
        alarms: names of the quick gates that failed (attacks/audit/quick_gates.py).
        risk_coverage: (clean rejection, attacked error) of every threshold setting that no other beats, if this
            candidate's thresholds were picked from the curve.
    """

    threat: ThreatModel
    attacked_accuracy: float
    attacked_error: float
    attacked_rejection: float
    oblivious_accuracy: float
    white_box_accuracy: float
    clean_accuracy: float
    clean_rejection: float
    latency_ms_p50: float
    latency_ms_p95: float
    images: int
    black_box_accuracy: float | None = None
    known_noise_accuracy: float | None = None
    worst_draw_accuracy: float | None = None
    queries: int = 0
    device: str = ""
    latency_images: Images = ""
    attacks: Mapping[str, float] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()
    risk_coverage: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One fit with one setting of its inference-time knobs: the unit that is scored."""

    candidate: str
    fit: str
    defense: str
    task: str
    params: Params
    score: Score

    def row(self) -> dict[str, Scalar | None]:
        """Return the row of candidates.csv."""
        s = self.score
        whose: dict[str, Scalar | None] = {
            "candidate": self.candidate,
            "fit": self.fit,
            "defense": self.defense,
            "task": self.task,
            "threat": s.threat.knowledge,
            "eps": s.threat.eps,
        }
        figures: dict[str, Scalar | None] = {
            "attacked_accuracy": s.attacked_accuracy,
            "attacked_error": s.attacked_error,
            "attacked_rejection": s.attacked_rejection,
            "oblivious_accuracy": s.oblivious_accuracy,
            "black_box_accuracy": s.black_box_accuracy,
            "white_box_accuracy": s.white_box_accuracy,
            "clean_accuracy": s.clean_accuracy,
            "clean_rejection": s.clean_rejection,
            "latency_ms_p50": s.latency_ms_p50,
            "latency_ms_p95": s.latency_ms_p95,
            "alarms": "; ".join(s.alarms),
            "state": "finished",
            "device": s.device,
            "queries": s.queries,
            "norm": s.threat.norm,
            "latency_images": s.latency_images,
            "worst_draw_accuracy": s.worst_draw_accuracy,
            "known_noise_accuracy": s.known_noise_accuracy,
            **s.attacks,
        }
        # A knob with one of these names, such as the eps that a defense trains with, must not be mistaken for it.
        taken = whose.keys() | figures.keys()
        knobs = {f"knob_{name}" if name in taken else name: value for name, value in self.params.flat().items()}
        return {**whose, **knobs, **figures}

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "params": {"train": dict(self.params.train), "inference": dict(self.params.inference)},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        score = {
            **data["score"],
            "threat": ThreatModel(**data["score"]["threat"]),
            "alarms": tuple(data["score"]["alarms"]),
            "risk_coverage": tuple((rejection, error) for rejection, error in data["score"]["risk_coverage"]),
        }
        return cls(**{**data, "params": Params(**data["params"]), "score": Score(**score)})


def quieter(candidates: Iterable[Candidate], again: Mapping[str, Latency]) -> list[Candidate]:
    """Return the candidates with the re-measured latency where the first measurement was not quiet.

    What disturbs a measurement makes it slower, so of two on one device that differ by more than `QUIET` the faster
    counts; it counts for every candidate that shares the first.

    Args:
        again: re-measured latencies, by candidate.
    """
    every = list(candidates)
    faster = {
        _measurement(c.score): latency
        for c in every
        if (latency := again.get(c.candidate)) is not None
        and latency.device == c.score.device
        and latency.ms_p50 < (1 - QUIET) * c.score.latency_ms_p50
    }
    return [replace(c, score=_timed(c.score, faster.get(_measurement(c.score)))) for c in every] if faster else every


def _measurement(score: Score) -> tuple[str, float, float]:
    """Return what tells the measurement of a latency from others."""
    return score.device, score.latency_ms_p50, score.latency_ms_p95


def _timed(score: Score, latency: Latency | None) -> Score:
    if latency is None:
        return score
    p50, p95, images = latency.ms_p50, latency.ms_p95, latency.images or score.latency_images
    return replace(score, latency_ms_p50=p50, latency_ms_p95=p95, latency_images=images)
