"""Places of knobs' values between 0 and 1, in which a model can tell what is near."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from spaces.domain import Scalar, finite
from spaces.space import Params, SearchSpace


def _ranks(domain: BaseDistribution) -> Mapping[Scalar, int] | None:
    """Return the ranks of the values of an ordered grid; None for words, truth values and ranges."""
    values = finite(domain)
    if values is None or any(isinstance(value, bool | str) for value in values):
        return None
    return {value: rank for rank, value in enumerate(sorted(values))}


def width(domain: BaseDistribution) -> int:
    """Return the number of coordinates of a knob: one, or one for each word."""
    ordered = _ranks(domain) is not None or finite(domain) is None
    return 1 if ordered else len(finite(domain) or ())


def coordinates(domain: BaseDistribution, value: Scalar) -> list[float]:
    ranks = _ranks(domain)
    if ranks is not None:
        return [ranks[value] / max(1, len(ranks) - 1)] if value in ranks else [0.5]
    values = finite(domain)
    if values is not None:
        return [math.sqrt(0.5) * (value == choice and type(value) is type(choice)) for choice in values]
    assert isinstance(domain, FloatDistribution | IntDistribution)
    scale = math.log if domain.log else float
    low, high = scale(domain.low), scale(domain.high)
    return [min(1.0, max(0.0, (scale(float(value)) - low) / (high - low)))]


def stepped(domain: BaseDistribution, value: Scalar, rng: np.random.Generator) -> Scalar:
    """Return a neighbour of a value: the next one of an ordered grid, any word, or one a tenth of a range away."""
    values = finite(domain)
    if values is not None:
        ranks = _ranks(domain)
        if ranks is None or value not in ranks:
            return values[int(rng.integers(len(values)))]
        ordered = list(ranks)
        return ordered[min(len(ordered) - 1, max(0, ranks[value] + int(rng.choice((-1, 1)))))]
    assert isinstance(domain, FloatDistribution | IntDistribution)
    scale, back = (math.log, math.exp) if domain.log else (float, float)
    low, high = scale(domain.low), scale(domain.high)
    moved = back(min(high, max(low, scale(float(value)) + rng.normal() * 0.1 * (high - low))))
    if isinstance(domain, IntDistribution):
        return min(domain.high, max(domain.low, round(moved)))
    return min(domain.high, max(domain.low, moved))


class Places:
    """Where the trainings of a space lie in [0, 1]^D: their searched knobs, and the ratios of weights.

    A loss depends on the ratios of its weights more than on each; weights are knobs of one domain.

    Attributes:
        axes: the domains of the searched knobs that act in training.
        count: D.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self.axes = {name: domain for name, domain in space.searched().items() if name in space.train}
        pairs = combinations(self.axes, 2)
        self._pairs = [(a, b) for a, b in pairs if width(self.axes[a]) == 1 and self.axes[a] == self.axes[b]]
        self.count = sum(width(domain) for domain in self.axes.values()) + len(self._pairs)

    def of(self, params: Params) -> NDArray[np.float64]:
        """Return the place of a training, D; a knob that does not matter there lies in the middle."""
        values = params.flat()
        parts = [
            coordinates(domain, values[name]) if self._space.matters(name, values) else [0.5] * width(domain)
            for name, domain in self.axes.items()
        ]
        scaled = {name: coordinates(self.axes[name], values[name])[0] for pair in self._pairs for name in pair}
        ratios = [(1 + scaled[one] - scaled[other]) / 2 for one, other in self._pairs]
        return np.array([*(c for part in parts for c in part), *ratios])


def identity(params: Params) -> str:
    """Return the identity of a training."""
    return json.dumps(dict(params.train), sort_keys=True)
