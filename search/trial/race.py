"""A race of a fit's inference settings: all are attacked on the first images, and only the contenders on all of them.

No verdict of the first images alone is ever a score. Shapes: N images; a verdict is the share of draws that withstood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attacks.confidence import wilson
from spaces.domain import Scalar
from spaces.space import Params

Verdicts = NDArray[np.float64]
Rivals = Sequence[tuple[str, float, float]]
"""Device, latency in ms and attacked accuracy of the search's best candidates."""
SHARE, LEAST = 4, 50
"""The first images are one in so many of all, but at least so many; where that is half of all, there is no race."""
SURE = 1.64
"""A setting is dropped where it is worse on the same images by so many standard errors: 5 % one-sided."""
WORTH = 0.005
"""By how much a setting must possibly be better than another one to be worth its attacks."""


@dataclass(frozen=True)
class Dropped:
    """A setting that lost a race, with the number of images it was attacked on and its accuracy there: no score."""

    inference: Mapping[str, Scalar]
    images: int
    accuracy: float

    @classmethod
    def of(cls, params: Params, entrant: Entrant) -> Dropped:
        return cls(params.inference, len(entrant.verdicts_N), entrant.accuracy)


def first_images(images: int) -> int:
    """Return on how many images all settings are attacked; 0 if there are too few for a race."""
    first = max(LEAST, images // SHARE)
    return first if 2 * first < images else 0


@dataclass(frozen=True)
class Entrant:
    """A setting in a race.

    Args:
        verdicts_N: on the first images, the same for all entrants.
        latency_ms: it is dropped only for what is no slower.
        feasible: whether it satisfies the constraints that no attack is needed to judge.
    """

    verdicts_N: Verdicts
    latency_ms: float
    feasible: bool = True

    @property
    def accuracy(self) -> float:
        return float(self.verdicts_N.mean())

    @property
    def ceiling(self) -> float:
        """How good it can be on all images: the upper end of Wilson's interval."""
        return float(wilson(self.accuracy, len(self.verdicts_N))[1])

    def beats(self, other: Entrant) -> bool:
        """Return whether the other one need not be attacked on all images, since this one is."""
        able = self.latency_ms <= other.latency_ms and (self.feasible or not other.feasible)
        return able and _gain(other.verdicts_N, self.verdicts_N) <= WORTH


def contenders(entrants: Sequence[Entrant], rivals: Sequence[tuple[float, float]] = ()) -> list[int]:
    """Return the places of the settings that may be worth attacking on all images.

    A setting is dropped where another one that is no slower is better on the same images, beyond chance, or so alike
    that it cannot be better by more than `WORTH`; and where a rival that is no slower is better than it can be. One
    that violates a constraint drops none that satisfies all.

    Args:
        rivals: latency in ms and attacked accuracy of feasible candidates of the search on the same device.
    """
    kept = list[int]()
    # Of equals the first must be one that may drop the others.
    order = [(-one.accuracy, not one.feasible, one.latency_ms, i) for i, one in enumerate(entrants)]
    for *_, i in sorted(order):
        one = entrants[i]
        beaten = any(latency_ms <= one.latency_ms and accuracy > one.ceiling for latency_ms, accuracy in rivals)
        if not beaten and not any(entrants[j].beats(one) for j in kept):
            kept.append(i)
    return sorted(kept)


def _gain(one_N: Verdicts, other_N: Verdicts) -> float:
    """Return the most by which one setting may be better than another: the upper end of a paired difference."""
    difference_N = one_N - other_N
    return float(difference_N.mean() + SURE * difference_N.std() / np.sqrt(len(difference_N)))
