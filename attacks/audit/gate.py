"""A gate: one check of the audit, with its measured figure and its limit."""

from __future__ import annotations

from dataclasses import dataclass

from attacks.verdicts import Robustness

SLACK = 0.05
"""Tolerance for chance in a share of a few dozen images."""

SQUARE_GAIN = 0.002
"""Largest share of images that a weaker attack may break. Source: AutoAttack's flag for Square, 0.2 %."""


@dataclass(frozen=True)
class Gate:
    """One check.

    Args:
        check: its number in docs/honest-numbers.md.
        law: the requirement, in words.
        figure: the measured value.
        limit: the largest value that passes.
        images: number of images that the figure was measured on; 0 for a gate that asks about no image.
    """

    check: int
    name: str
    law: str
    figure: float
    limit: float
    passed: bool
    images: int = 0

    @property
    def alarm(self) -> str:
        return f"{self.name}: it does not hold that {self.law}"


def by_chance(found: Robustness, images: int | None = None) -> float:
    """Return the share of images that a weaker attack may break beyond stronger ones: one image, or 0.2 %.

    With noise, each further attack is another try: as many more as two draws are measured to disagree on, at most
    `SLACK`. What a defense says about its noise does not count.

    Args:
        images: number of images attacked; None: those of the verdicts.
    """
    return max(SQUARE_GAIN, 1 / (images or found.clean.right.shape[1]), min(SLACK, found.noise))


def at_most(check: int, name: str, law: str, figure: float, limit: float, images: int = 0) -> Gate:
    """Return the gate that passes if the figure is at most the limit; NaN fails."""
    return Gate(check, name, law, figure, limit, figure <= limit, images)
