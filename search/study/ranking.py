"""Find the candidates that satisfy the constraints, and the best of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from search.study.candidate import Candidate
from search.study.study import Study

OBJECTIVES = ("attacked_error", "latency_ms_p50")
"""The objectives that a search minimises: fields of a candidate's score."""


def constraints(study: Study, candidate: Candidate) -> dict[str, float]:
    """Return by how much a candidate exceeds each constraint; zero or less is feasible."""
    score = candidate.score
    unattacked = unattacked_constraints(study, score.clean_accuracy, score.clean_rejection, score.latency_ms_p50)
    return {"alarms": float(len(score.alarms)), **unattacked}


def unattacked_constraints(
    study: Study, clean_accuracy: float, clean_rejection: float, latency_ms: float
) -> dict[str, float]:
    """Return by how much each constraint that no attack is needed to judge is exceeded."""
    limits = {"max_clean_rejection": clean_rejection - study.max_clean_rejection}
    if study.min_clean_accuracy is not None:
        limits["min_clean_accuracy"] = study.min_clean_accuracy - clean_accuracy
    if study.max_latency_ms is not None:
        limits["max_latency_ms"] = latency_ms - study.max_latency_ms
    return limits


def violation(study: Study, candidate: Candidate) -> float:
    """Return by how much a candidate violates its constraints in all, each in parts of 1; zero is feasible.

    Shares exceed their bounds by a share, latencies theirs by a multiple of it, and each alarm counts as 1.
    """
    units = {"max_latency_ms": study.max_latency_ms or 1.0}
    return sum(max(0.0, excess) / units.get(name, 1.0) for name, excess in constraints(study, candidate).items())


@dataclass(frozen=True)
class Refusal:
    """How many candidates a constraint refuses, or one gate of the constraint `alarms`.

    Args:
        gate: the name of the gate; empty for the whole constraint.
        limit: the study's bound; None for alarms.
        within: how many candidates satisfy it.
        refused: how many violate it; a candidate counts at everything that it violates.
        alone: how many violate it and nothing else.
    """

    constraint: str
    gate: str
    limit: float | None
    within: int
    refused: int
    alone: int

    @property
    def words(self) -> str:
        """What is required."""
        return {
            "alarms": f"audit check {self.gate} passed" if self.gate else "quick audit checks passed",
            "max_clean_rejection": f"at most {100 * (self.limit or 0):.1f} % of the clean images rejected",
            "min_clean_accuracy": f"clean accuracy of at least {100 * (self.limit or 0):.1f} %",
            "max_latency_ms": f"purification latency of at most {self.limit or 0:.3g} ms",
        }[self.constraint]

    @property
    def violation(self) -> str:
        """What the refused candidates do, such as `fail the audit check noise`, in their number."""
        one = self.refused == 1
        return {
            "alarms": f"{'fails' if one else 'fail'} the audit check {self.gate}",
            "max_clean_rejection": f"{'rejects' if one else 'reject'} more than {100 * (self.limit or 0):.1f} % "
            "of the clean images",
            "min_clean_accuracy": f"{'has' if one else 'have'} clean accuracy below {100 * (self.limit or 0):.1f} %",
            "max_latency_ms": f"{'is' if one else 'are'} slower than {self.limit or 0:.3g} ms",
        }[self.constraint]


def refusals(study: Study, candidates: Iterable[Candidate]) -> list[Refusal]:
    """Return what refuses how many candidates: each constraint of the study, and each gate that raised an alarm.

    The most restrictive constraint comes first; the gates, the most restrictive first, follow `alarms`.
    """
    every = list(candidates)
    broken = [{name for name, excess in constraints(study, c).items() if excess > 0} for c in every]
    alarms = [set(c.score.alarms) for c in every]

    def refusal(constraint: str, gate: str, refuses: Sequence[bool], alone: Sequence[bool]) -> Refusal:
        limit, refused = getattr(study, constraint, None), sum(refuses)
        return Refusal(constraint, gate, limit, len(every) - refused, refused, sum(alone))

    whole = [refusal(name, "", [name in b for b in broken], [b == {name} for b in broken]) for name in _names(study)]
    gates = [
        refusal(
            "alarms",
            g,
            [g in a for a in alarms],
            [a == {g} and len(b) == 1 for a, b in zip(alarms, broken, strict=True)],
        )
        for g in sorted(set().union(*alarms))
    ]
    strict = sorted(whole, key=lambda one: (one.within, -one.alone))
    place = 1 + [one.constraint for one in strict].index("alarms")
    return [*strict[:place], *sorted(gates, key=lambda one: (one.within, -one.alone)), *strict[place:]]


def refusals_in_words(study: Study, candidates: Iterable[Candidate]) -> str:
    """Return which gates and other constraints refuse how many candidates, the most first; empty if all are feasible.

    Example: `12 of 20 fail the audit check gradient (9 for this alone), 5 are slower than 9 ms; reasons overlap`
    """
    every = list(candidates)
    found = [one for one in refusals(study, every) if one.refused and (one.gate or one.constraint != "alarms")]
    found.sort(key=lambda one: (-one.refused, -one.alone))
    each = [
        f"{one.refused}{'' if nth else f' of {len(every)}'} {one.violation}"
        + (f" ({one.alone} for this alone)" if 0 < one.alone < one.refused else "")
        for nth, one in enumerate(found)
    ]
    refused = len(every) - len(feasible(study, every))
    overlap = "; reasons overlap" if sum(one.refused for one in found) > refused else ""
    return ", ".join(each) + overlap


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


def distinct(
    candidates: Iterable[Candidate], alike: Callable[[Candidate, Candidate], bool] = lambda one, other: True
) -> list[Candidate]:
    """Return the candidates without those that are an earlier one again, in all but its name.

    Their inference-time knobs change nothing on the images: thresholds that no image lies between, say.

    Args:
        alike: whether two candidates with one fit and the same figures are the same; on few images figures may agree
            by chance.
    """
    found, groups = list[Candidate](), dict[tuple[str, str], list[Candidate]]()
    for candidate in candidates:
        group = groups.setdefault((candidate.fit, repr(replace(candidate.score, risk_coverage=()))), [])
        if not any(alike(candidate, other) for other in group):
            group.append(candidate)
            found.append(candidate)
    return found


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
