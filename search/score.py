"""What is known of a candidate: accuracy under attack, clean accuracy, rejection, latency, alarms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attacks.threat import ThreatModel
from spaces.space import Params, Scalar


@dataclass(frozen=True, kw_only=True)
class Score:
    """One candidate's figures. Accuracies and rejections are fractions in [0, 1], latencies milliseconds.

    Args:
        threat: the study's threat model; `attacked_accuracy` is under it.
        attacks: accuracy after each attack, by `knowledge/attack`; oblivious ones each over all images, white-box
            ones cumulative (each sees what the earlier ones left).
        images: how many validation images were attacked.
    """

    threat: ThreatModel
    attacked_accuracy: float
    oblivious_accuracy: float
    white_box_accuracy: float | None
    clean_accuracy: float
    clean_rejection: float
    latency_ms_p50: float
    latency_ms_p95: float
    images: int
    attacks: Mapping[str, float] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One fit with one setting of its inference-time knobs: the thing that is scored."""

    candidate: str
    fit: str
    defense: str
    task: str
    params: Params
    score: Score

    def row(self) -> dict[str, Scalar | None]:
        """Return the row of candidates.csv."""
        s = self.score
        return {
            "candidate": self.candidate,
            "fit": self.fit,
            "defense": self.defense,
            "task": self.task,
            "threat": s.threat.knowledge,
            "eps": s.threat.eps,
            **self.params.flat(),
            "attacked_accuracy": s.attacked_accuracy,
            "oblivious_accuracy": s.oblivious_accuracy,
            "black_box_accuracy": None,
            "white_box_accuracy": s.white_box_accuracy,
            "clean_accuracy": s.clean_accuracy,
            "clean_rejection": s.clean_rejection,
            "latency_ms_p50": s.latency_ms_p50,
            "latency_ms_p95": s.latency_ms_p95,
            "alarms": "; ".join(s.alarms),
            "state": "finished",
            **s.attacks,
        }
