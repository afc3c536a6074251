"""Find the candidates that satisfy the constraints, and the best of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from search.study.candidate import Candidate
from search.study.study import Study

OBJECTIVES = ("attacked_error", "latency_ms_p50")
"""The objectives that a search minimises: fields of a candidate's score."""


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
    """How many candidates satisfy a constraint.

    Args:
        limit: the study's bound; None for a constraint without one, as with alarms.
        within: how many satisfy it.
        alone: how many violate it and no other.
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
    """Return for each constraint of the study how many candidates satisfy it, the most restrictive first."""
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
    """Return the candidates by attacked error, the least first, then by latency within each device.

    If nothing can be rejected, this is the best attacked accuracy first. Latencies of different devices are not
    comparable: among candidates with equal error, those of one device are grouped together.
    """
    return sorted(
        candidates,
        key=lambda c: (c.score.attacked_error, c.score.device, c.score.latency_ms_p50, -c.score.attacked_accuracy),
    )


def feasible(study: Study, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates that satisfy all constraints, ranked."""
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
