"""A race of a fit's inference settings: all are attacked on the first images, and only the contenders on all of them.

No verdict of the first images alone is ever a score. Shapes: N images; a verdict is the share of draws that withstood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spaces.domain import Scalar
from spaces.space import Params

Verdicts = NDArray[np.float64]
SHARE, LEAST = 4, 50
"""The first images are one in so many of all, but at least so many; where that is half of all, there is no race."""
SURE = 1.64
"""A setting is dropped where it is worse on the same images by so many standard errors: 5 % one-sided."""
LUCK = 0.05
"""Least standard deviation of a difference, so that a single image decides nothing."""


@dataclass(frozen=True)
class Dropped:
    """A setting that lost a race, with the number of images it was attacked on and its accuracy there: no score."""

    inference: Mapping[str, Scalar]
    images: int
    accuracy: float

    @classmethod
    def of(cls, params: Params, verdicts_N: Verdicts) -> Dropped:
        return cls(params.inference, len(verdicts_N), float(verdicts_N.mean()))


def first_images(images: int) -> int:
    """Return on how many images all settings are attacked; 0 if there are too few for a race."""
    first = max(LEAST, images // SHARE)
    return first if 2 * first < images else 0


def contenders(verdicts: Sequence[Verdicts], latencies_ms: Sequence[float]) -> list[int]:
    """Return the places of the settings that may be the best one.

    Args:
        verdicts: of each setting on the same N images.
        latencies_ms: a setting is dropped only for another one that is no slower.
    """

    places = range(len(verdicts))

    def dropped(i: int) -> bool:
        return any(latencies_ms[j] <= latencies_ms[i] and _beats(verdicts[j], verdicts[i]) for j in places)

    return [i for i in places if not dropped(i)]


def _beats(one_N: Verdicts, other_N: Verdicts) -> bool:
    """Return whether the mean of a paired difference is positive beyond chance."""
    difference_N = one_N - other_N
    error = max(float(difference_N.std()), LUCK) / np.sqrt(len(difference_N))
    return bool(difference_N.mean() > SURE * error)
