"""What went wrong in a search, each thing once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing that went wrong.

    Args:
        state: failed, interrupted, restarted or alarm.
        words: why; empty where nothing more is known.
        where: the trials or candidates.
    """

    state: str
    words: str
    where: Sequence[str]


def gathered(found: Iterable[tuple[str, str, str]]) -> list[Fault]:
    """Return the faults of (state, words, where), what happened most often first."""
    places: dict[tuple[str, str], list[str]] = {}
    for state, words, where in found:
        places.setdefault((state, words), []).append(where)
    faults = [Fault(state, words, where) for (state, words), where in places.items()]
    return sorted(faults, key=lambda fault: -len(fault.where))
