"""Which candidates are within the constraints, and which of them are the best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from search.study.candidate import Candidate
from search.study.study import Study

OBJECTIVES = ("attacked_error", "latency_ms_p50")
"""What a search minimises: fields of a candidate's score."""


def constraints(study: Study, candidate: Candidate) -> dict[str, float]:
    """Return by how much a candidate exceeds each constraint; zero or less is feasible."""
    score = candidate.score
    limits = {
        "alarms": float(len(score.alarms)),
        "max_clean_rejection": score.clean_rejection - study.max_clean_rejection,
    }
    if study.min_clean_accuracy is not None:
        limits["min_clean_accuracy"] = study.min_clean_accuracy - score.clean_accuracy
    if study.max_latency_ms is not None:
        limits["max_latency_ms"] = score.latency_ms_p50 - study.max_latency_ms
    return limits


@dataclass(frozen=True)
class Kept:
    """How many candidates keep to a constraint.

    Args:
        limit: the study's bound; None where there is nothing to bound, as with alarms.
        within: how many keep to it.
        alone: how many break it and nothing else.
    """

    constraint: str
    limit: float | None
    within: int
    alone: int

    @property
    def words(self) -> str:
        return {
            "alarms": "no alarm",
            "max_clean_rejection": f"at most {100 * (self.limit or 0):.1f} % of the clean images rejected",
            "min_clean_accuracy": f"clean accuracy of at least {100 * (self.limit or 0):.1f} %",
            "max_latency_ms": f"purification latency of at most {self.limit or 0:.3g} ms",
        }[self.constraint]


def kept(study: Study, candidates: Iterable[Candidate]) -> list[Kept]:
    """Return for each constraint of the study how many of the candidates keep to it; what refuses most comes first."""
    excesses = [constraints(study, candidate) for candidate in candidates]
    broken = [{name for name, excess in each.items() if excess > 0} for each in excesses]
    found = [
        Kept(name, getattr(study, name, None), sum(name not in b for b in broken), sum(b == {name} for b in broken))
        for name in _names(study)
    ]
    return sorted(found, key=lambda one: (one.within, -one.alone))


def _names(study: Study) -> list[str]:
    given = [name for name in ("min_clean_accuracy", "max_latency_ms") if getattr(study, name) is not None]
    return [*given, "max_clean_rejection", "alarms"]


def ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates, the least attacked error first, then the fastest of each device.

    Where nothing can be rejected that is the best attacked accuracy first. Latencies of different devices do not
    compare: of candidates that err alike, those of one device stand together.
    """
    return sorted(
        candidates,
        key=lambda c: (c.score.attacked_error, c.score.device, c.score.latency_ms_p50, -c.score.attacked_accuracy),
    )


def feasible(study: Study, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates within all constraints, ranked."""
    return ranked(c for c in candidates if all(excess <= 0 for excess in constraints(study, c).values()))


def front(study: Study, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the feasible candidates that no other of the same device beats in both objectives, most robust first."""
    found: list[Candidate] = []
    fastest: dict[str, float] = {}
    for candidate in feasible(study, candidates):
        score = candidate.score
        if score.latency_ms_p50 < fastest.get(score.device, float("inf")):
            fastest[score.device] = score.latency_ms_p50
            found.append(candidate)
    return found


def devices(candidates: Iterable[Candidate]) -> list[str]:
    """Return the devices on which the candidates' latencies were measured."""
    return sorted({c.score.device for c in candidates if c.score.device})
