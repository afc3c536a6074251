"""Places of knobs' values between 0 and 1, in which a model can tell what is near."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import cast

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from spaces.domain import Scalar, finite
from spaces.space import Params, SearchSpace


class Axis:
    """A knob's domain as coordinates in [0, 1]: one of a range or an ordered grid, or one for each word.

    Attributes:
        width: the number of coordinates.
    """

    def __init__(self, domain: BaseDistribution) -> None:
        self.domain, self._values = domain, finite(domain)
        words = self._values is not None and any(isinstance(value, bool | str) for value in self._values)
        self._ordered = None if words or self._values is None else sorted(cast(Sequence[float], self._values))
        self._ranks = {value: rank for rank, value in enumerate(self._ordered or ())}
        self.width = len(self._values or ()) if words else 1
        if self._values is None:
            assert isinstance(domain, FloatDistribution | IntDistribution)
            self._scale: Callable[[float], float] = math.log if domain.log else float
            self._back: Callable[[float], float] = math.exp if domain.log else float
            self._low, self._high = self._scale(domain.low), self._scale(domain.high)

    def at(self, value: Scalar) -> list[float]:
        """Return the coordinates of a value; a grid does not know of others, which lie in its middle."""
        if self._ordered is not None:
            return [self._ranks[value] / max(1, len(self._ranks) - 1) if value in self._ranks else 0.5]
        if self._values is not None:
            return [math.sqrt(0.5) * (value == word and type(value) is type(word)) for word in self._values]
        return [min(1.0, max(0.0, (self._scale(float(value)) - self._low) / (self._high - self._low)))]

    def neighbour(self, value: Scalar, rng: np.random.Generator) -> Scalar:
        """Return the next value of an ordered grid, any word, or a value about a tenth of a range away."""
        if self._ordered is not None and value in self._ranks:
            return self._ordered[min(len(self._ordered) - 1, max(0, self._ranks[value] + int(rng.choice((-1, 1)))))]
        if self._values is not None:
            return self._values[int(rng.integers(len(self._values)))]
        width = self._high - self._low
        moved = self._back(min(self._high, max(self._low, self._scale(float(value)) + rng.normal() * 0.1 * width)))
        domain = cast(FloatDistribution | IntDistribution, self.domain)
        return min(domain.high, max(domain.low, round(moved) if isinstance(domain, IntDistribution) else moved))


class Places:
    """Where the trainings of a space lie in [0, 1]^D: their searched knobs, and the ratios of weights.

    A loss depends on the ratios of its weights more than on each; weights are knobs of one domain.

    Attributes:
        axes: of the searched knobs that act in training.
        count: D.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self.axes = {name: Axis(domain) for name, domain in space.searched().items() if name in space.train}
        pairs = combinations(self.axes, 2)
        single = {name: axis.domain for name, axis in self.axes.items() if axis.width == 1}
        self._pairs = [(a, b) for a, b in pairs if a in single and single[a] == single.get(b)]
        self.count = sum(axis.width for axis in self.axes.values()) + len(self._pairs)

    def of(self, params: Params) -> NDArray[np.float64]:
        """Return the place of a training, D; a knob that does not matter there lies in the middle."""
        values = params.flat()
        parts = [
            axis.at(values[name]) if self._space.matters(name, values) else [0.5] * axis.width
            for name, axis in self.axes.items()
        ]
        scaled = {name: self.axes[name].at(values[name])[0] for pair in self._pairs for name in pair}
        ratios = [(1 + scaled[one] - scaled[other]) / 2 for one, other in self._pairs]
        return np.array([*(c for part in parts for c in part), *ratios])


def identity(params: Params) -> str:
    """Return the identity of a training."""
    return json.dumps(dict(params.train), sort_keys=True)
