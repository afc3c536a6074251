"""A gate: one check of the audit, with the figure that was found and the limit that it is held to."""

from __future__ import annotations

from dataclasses import dataclass

SLACK = 0.05
"""What chance may do to a share of a few dozen images before it counts."""


@dataclass(frozen=True)
class Gate:
    """One check.

    Args:
        check: its number in docs/honest-numbers.md.
        law: what must hold, in words.
        figure: what was found.
        limit: what it is held to, at most.
    """

    check: int
    name: str
    law: str
    figure: float
    limit: float
    passed: bool

    @property
    def alarm(self) -> str:
        return f"{self.name}: it does not hold that {self.law}"


def at_most(check: int, name: str, law: str, figure: float, limit: float) -> Gate:
    """Return the gate that passes where the figure keeps to the limit; NaN does not."""
    return Gate(check, name, law, figure, limit, figure <= limit)
