"""Knobs, settings and search spaces. A domain is an Optuna distribution: there is no second language."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

Scalar = bool | int | float | str
Domain = BaseDistribution | Sequence[Scalar] | Scalar
"""What a named space may say of a knob: a range, a grid, or one value."""

GRID_LIMIT = 64
"""A finite set of inference settings up to this size is scored whole."""


class InputError(ValueError):
    """Bad input: one line with the law, the value and the legal choices. The command line exits with 2."""


def choose(what: str, value: str, legal: Sequence[str]) -> str:
    """Return `value` if it is legal; else raise an InputError that names the choices and the nearest one."""
    if value in legal:
        return value
    near = difflib.get_close_matches(value, legal, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{what} must be one of {', '.join(legal)}, but is {value!r}{hint}")


def knob(
    default: Scalar, domain: BaseDistribution, meaning: str, *, latency: bool = False, threshold: bool = False
) -> Any:
    """Declare one hyperparameter as a field of a defense's Train or Inference dataclass.

    Args:
        default: the value where a space does not say another.
        domain: every legal value.
        meaning: what it is, with its unit and source.
        latency: whether it can change the purification latency.
        threshold: whether it is the limit of a column of `Defense.suspicion` (an inference knob).
    """
    about = {"domain": domain, "meaning": meaning, "latency": latency, "threshold": threshold}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Params:
    """One setting of every knob of a defense: `train` shapes the fit, `inference` is set on a stored fit."""

    train: Mapping[str, Scalar]
    inference: Mapping[str, Scalar]

    def flat(self) -> dict[str, Scalar]:
        return {**self.train, **self.inference}


@dataclass(frozen=True)
class SearchSpace:
    """The domains of a defense's knobs, split by whether a change needs a new training."""

    train: Mapping[str, BaseDistribution]
    inference: Mapping[str, BaseDistribution]
    defaults: Mapping[str, Scalar]

    @classmethod
    def of(cls, defense: Any) -> SearchSpace:
        """Return every knob that `defense` (a class with Train and Inference dataclasses) declares."""
        knobs = (*dataclasses.fields(defense.Train), *dataclasses.fields(defense.Inference))
        return cls(
            {f.name: f.metadata["domain"] for f in dataclasses.fields(defense.Train)},
            {f.name: f.metadata["domain"] for f in dataclasses.fields(defense.Inference)},
            {f.name: _default(f) for f in knobs},
        )

    def flat(self) -> dict[str, BaseDistribution]:
        return {**self.train, **self.inference}

    def narrow(self, named: Mapping[str, Domain]) -> SearchSpace:
        """Return the space with the domains that `named` gives; every other knob keeps its default.

        Raises:
            InputError: `named` has a knob that is not declared, or a value outside the declared domain.
        """
        for name in named:
            choose("a knob", name, list(self.flat()))
        wishes = {**self.defaults, **named}
        return SearchSpace(
            {name: _narrowed(name, domain, wishes[name]) for name, domain in self.train.items()},
            {name: _narrowed(name, domain, wishes[name]) for name, domain in self.inference.items()},
            self.defaults,
        )

    def usual(self) -> dict[str, Scalar]:
        """Return one inference setting: each knob's default where it lies in the space, else its first value."""
        return {name: self.usual_of(name, domain) for name, domain in self.inference.items()}

    def usual_of(self, name: str, domain: BaseDistribution) -> Scalar:
        """Return a knob's default where it lies in the domain, else its first value."""
        if contains(domain, self.defaults[name]):
            return self.defaults[name]
        values = finite(domain)
        return values[0] if values else domain.low  # type: ignore[attr-defined]  # not finite, so a range

    def searched(self) -> dict[str, BaseDistribution]:
        """Return the domains of the knobs that have more than one value."""
        return {name: domain for name, domain in self.flat().items() if not domain.single()}

    def complete(self, chosen: Mapping[str, Any]) -> Params:
        """Return the setting with the `chosen` values and, elsewhere, the one value of each knob."""
        values = {name: chosen[name] if name in chosen else only(name, d) for name, d in self.flat().items()}
        return Params({n: values[n] for n in self.train}, {n: values[n] for n in self.inference})

    def grid(self) -> Iterator[Params]:
        """Yield every setting of a finite space, the last knob moving fastest.

        Raises:
            InputError: a searched knob is continuous.
        """
        domains = self.flat()
        for name, domain in domains.items():
            if finite(domain) is None:
                raise InputError(f"a grid needs finite domains, but {name} is {spoken(domain)}")
        for values in itertools.product(*(finite(domain) or () for domain in domains.values())):
            yield self.complete(dict(zip(domains, values, strict=True)))

    def size(self) -> int | None:
        """Return how many settings there are, or None where a knob is continuous."""
        return _size(self.flat())

    def trainings(self) -> int | None:
        """Return how many trainings the whole space needs, or None where a train-time knob is continuous."""
        return _size(self.train)


def finite(domain: BaseDistribution) -> tuple[Scalar, ...] | None:
    """Return the values of a finite domain in order, or None for a continuous one."""
    if isinstance(domain, CategoricalDistribution):
        return tuple(domain.choices)  # type: ignore[arg-type]  # no knob is None
    if isinstance(domain, IntDistribution) and not domain.log:
        return tuple(range(domain.low, domain.high + 1, domain.step))
    if isinstance(domain, FloatDistribution) and domain.single():
        return (domain.low,)
    return None


def extremes(domain: BaseDistribution) -> tuple[Scalar, ...]:
    """Return every choice of a categorical domain, and the two ends of another."""
    if isinstance(domain, CategoricalDistribution):
        return tuple(domain.choices)  # type: ignore[arg-type]  # no knob is None
    assert isinstance(domain, FloatDistribution | IntDistribution)
    return domain.low, domain.high


def draw(domain: BaseDistribution, rng: np.random.Generator) -> Scalar:
    """Return a value of the domain, uniformly, or log-uniformly on a log scale."""
    values = finite(domain)
    if values is not None:
        return values[int(rng.integers(len(values)))]
    assert isinstance(domain, FloatDistribution | IntDistribution)
    if domain.log:
        value = math.exp(rng.uniform(math.log(domain.low), math.log(domain.high)))
    else:
        value = rng.uniform(domain.low, domain.high)
    return round(value) if isinstance(domain, IntDistribution) else value


def only(name: str, domain: BaseDistribution) -> Scalar:
    """Return the value of a domain that has one."""
    values = finite(domain)
    if values is None or len(values) != 1:
        raise InputError(f"a setting names every knob that is searched: {name}, {spoken(domain)}, has no value")
    return values[0]


def contains(domain: BaseDistribution, value: object) -> bool:
    """Say whether `value` is in `domain`, of its type."""
    if isinstance(domain, CategoricalDistribution):
        return any(value == choice and type(value) is type(choice) for choice in domain.choices)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    if isinstance(domain, IntDistribution) and not isinstance(value, int):
        return False
    assert isinstance(domain, FloatDistribution | IntDistribution)
    return domain._contains(float(value))


def spoken(domain: BaseDistribution) -> str:
    """Return the domain in words, for an error or a table."""
    if isinstance(domain, CategoricalDistribution):
        return "one of " + ", ".join(str(choice) for choice in domain.choices)
    assert isinstance(domain, FloatDistribution | IntDistribution)
    kind = "a whole number" if isinstance(domain, IntDistribution) else "a number"
    return f"{kind} from {domain.low:g} to {domain.high:g}" + (" (log scale)" if domain.log else "")


def _default(declared: dataclasses.Field[Any]) -> Scalar:
    value: Any = declared.default
    return value


def _narrowed(name: str, declared: BaseDistribution, wish: Domain) -> BaseDistribution:
    if isinstance(wish, FloatDistribution | IntDistribution):
        inside = all(contains(declared, end) for end in (wish.low, wish.high))
        if isinstance(declared, FloatDistribution | IntDistribution) and type(wish) is type(declared) and inside:
            return wish
        raise InputError(f"{name} must be {spoken(declared)}, but the space says {spoken(wish)}")
    values: list[Any] = list(wish.choices) if isinstance(wish, CategoricalDistribution) else _listed(wish)
    if not values:
        raise InputError(f"{name} must be {spoken(declared)}, but its grid is empty")
    if isinstance(declared, FloatDistribution):  # YAML and the shell write 1.0 as 1
        values = [float(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in values]
    for value in values:
        if not contains(declared, value):
            raise InputError(f"{name} must be {spoken(declared)}, but is {value!r}")
    return CategoricalDistribution(tuple(dict.fromkeys(values)))


def _listed(wish: object) -> list[Any]:
    return list(wish) if isinstance(wish, list | tuple) else [wish]


def _size(domains: Mapping[str, BaseDistribution]) -> int | None:
    counts = [finite(domain) for domain in domains.values()]
    return None if any(c is None for c in counts) else math.prod(len(c) for c in counts if c is not None)
