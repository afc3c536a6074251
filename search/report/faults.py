"""The problems of a search, grouped by cause."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One problem.

    Args:
        state: failed, interrupted, restarted or alarm.
        words: the reason; empty if unknown.
        where: names of the trials or candidates.
    """

    state: str
    words: str
    where: Sequence[str]


def gathered(found: Iterable[tuple[str, str, str]]) -> list[Fault]:
    """Group (state, words, where) into faults, the most frequent first."""
    places: dict[tuple[str, str], list[str]] = {}
    for state, words, where in found:
        places.setdefault((state, words), []).append(where)
    faults = [Fault(state, words, where) for (state, words), where in places.items()]
    return sorted(faults, key=lambda fault: -len(fault.where))
