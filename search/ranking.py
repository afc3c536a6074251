"""Which candidates are within the constraints, and which of them are the best."""

from __future__ import annotations

from collections.abc import Iterable

from search.score import Candidate
from search.study import Study

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


def ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates, the least attacked error first, then the fastest.

    Where nothing can be rejected that is the best attacked accuracy first.
    """
    return sorted(
        candidates, key=lambda c: (c.score.attacked_error, c.score.latency_ms_p50, -c.score.attacked_accuracy)
    )


def feasible(study: Study, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates within all constraints, ranked."""
    return ranked(c for c in candidates if all(excess <= 0 for excess in constraints(study, c).values()))


def front(study: Study, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the feasible candidates that no other beats in both objectives, the most robust first."""
    found: list[Candidate] = []
    for candidate in feasible(study, candidates):
        if not found or candidate.score.latency_ms_p50 < found[-1].score.latency_ms_p50:
            found.append(candidate)
    return found
