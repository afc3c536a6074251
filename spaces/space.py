"""Knobs, settings and search spaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from spaces.domain import Domain, Scalar, contains, draw, finite, narrowed, on_step, only, spoken
from spaces.exceptions import InputError, choose

Condition = Mapping[str, Sequence[Scalar]]
"""Condition under which a knob is active: another knob -> the values, one of which it must have."""

GRID_LIMIT = 64
"""Largest finite set of inference settings that is scored completely."""


def knob(
    default: Scalar,
    domain: BaseDistribution,
    meaning: str,
    *,
    latency: bool = False,
    threshold: bool = False,
    given: Condition | None = None,
) -> Any:
    """Declare one hyperparameter as a field of a defense's Train or Inference dataclass.

    Args:
        default: the value used where a space does not give another.
        domain: all legal values.
        meaning: description, with unit and source.
        latency: whether it can change the purification latency.
        threshold: whether it is the threshold of a column of `Defense.suspicion` (inference knobs only).
        given: values of other knobs, declared earlier and categorical, at which it is active; otherwise it has its
            default. A train-time knob may only depend on train-time knobs.
    """
    about = {"domain": domain, "meaning": meaning, "latency": latency, "threshold": threshold, "given": given or {}}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Params:
    """One setting of all knobs of a defense: `train` determines the fit, `inference` is set on a stored fit."""

    train: Mapping[str, Scalar]
    inference: Mapping[str, Scalar]

    def flat(self) -> dict[str, Scalar]:
        return {**self.train, **self.inference}


@dataclass(frozen=True)
class SearchSpace:
    """The domains of a defense's knobs, split by whether a change needs a new training.

    Args:
        given: the conditions of conditional knobs. An inactive knob has its default.
    """

    train: Mapping[str, BaseDistribution]
    inference: Mapping[str, BaseDistribution]
    defaults: Mapping[str, Scalar]
    given: Mapping[str, Condition] = field(default_factory=dict)

    @classmethod
    def of(cls, defense: Any) -> SearchSpace:
        """Return the space of all knobs declared by `defense`, a class with Train and Inference dataclasses."""
        knobs = (*dataclasses.fields(defense.Train), *dataclasses.fields(defense.Inference))
        return cls(
            {f.name: f.metadata["domain"] for f in dataclasses.fields(defense.Train)},
            {f.name: f.metadata["domain"] for f in dataclasses.fields(defense.Inference)},
            {f.name: _default(f) for f in knobs},
            {f.name: f.metadata["given"] for f in knobs if f.metadata["given"]},
        )

    def flat(self) -> dict[str, BaseDistribution]:
        return {**self.train, **self.inference}

    def narrow(self, named: Mapping[str, Domain]) -> SearchSpace:
        """Return the space with the domains in `named`; every other knob is fixed to its default.

        Raises:
            InputError: `named` has a knob that is not declared, or a value outside the declared domain.
        """
        for name in named:
            choose("a knob", name, list(self.flat()))
        wishes = {**self.defaults, **named}
        return self._with({name: narrowed(name, domain, wishes[name]) for name, domain in self.flat().items()})

    def at(self, values: Mapping[str, Scalar]) -> SearchSpace:
        """Return the space with knobs fixed to these values, such as a fit's train-time knobs."""
        return self._with({**self.flat(), **{name: CategoricalDistribution((v,)) for name, v in values.items()}})

    def _with(self, domains: Mapping[str, BaseDistribution]) -> SearchSpace:
        """Return the space with other domains; a knob that can no longer be active is fixed to its default."""
        kept, given, never = dict[str, BaseDistribution](), dict[str, Condition](), set[str]()
        for name, domain in domains.items():
            left = {o: [v for v in finite(kept[o]) or () if v in legal] for o, legal in self._asked(name)}
            if any(o in never or not values for o, values in left.items()):
                never.add(name)
                kept[name] = CategoricalDistribution((self.defaults[name],))
                continue
            kept[name] = domain
            depends = {o: v for o, v in left.items() if o in given or len(v) < len(finite(kept[o]) or ())}
            if depends:
                given[name] = depends
        train = {name: kept[name] for name in self.train}
        return SearchSpace(train, {name: kept[name] for name in self.inference}, self.defaults, given)

    def _asked(self, name: str) -> Iterable[tuple[str, Sequence[Scalar]]]:
        return self.given.get(name, {}).items()

    def matters(self, name: str, values: Mapping[str, Any]) -> bool:
        """Return whether a knob is active where the knobs before it have these values."""
        return all(self.matters(o, values) and values[o] in legal for o, legal in self._asked(name))

    def usual(self) -> dict[str, Scalar]:
        """Return one inference setting: each knob's default if the space contains it, else its first value.

        It is one of the scored settings: inactive knobs have their default.
        """
        return dict(self.setting(self.usual_of).inference)

    def usual_of(self, name: str, domain: BaseDistribution) -> Scalar:
        """Return a knob's default if the domain contains it, else the domain's first value."""
        if contains(domain, self.defaults[name]):
            return self.defaults[name]
        values = finite(domain)
        return values[0] if values else domain.low  # type: ignore[attr-defined]  # not finite, so a range

    def searched(self) -> dict[str, BaseDistribution]:
        """Return the domains of the knobs with more than one value, each after the knobs that it depends on."""
        return {name: domain for name, domain in self.flat().items() if not domain.single()}

    def setting(self, value: Callable[[str, BaseDistribution], Scalar]) -> Params:
        """Return the setting in which each active knob has the `value` of its name and domain."""
        values = dict[str, Scalar]()
        for name, domain in self.flat().items():
            values[name] = on_step(domain, value(name, domain)) if self.matters(name, values) else self.defaults[name]
        return Params({n: values[n] for n in self.train}, {n: values[n] for n in self.inference})

    def complete(self, chosen: Mapping[str, Any]) -> Params:
        """Return the setting with the `chosen` values and, for every other knob, its only value."""
        return self.setting(lambda name, domain: chosen[name] if name in chosen else only(name, domain))

    def drawn(self, rng: np.random.Generator) -> Params:
        """Return a random setting."""
        return self.setting(lambda name, domain: draw(domain, rng))

    def grid(self) -> Iterator[Params]:
        """Yield every setting of a finite space once; the last knob changes fastest.

        Raises:
            InputError: a searched knob is continuous.
        """
        domains = self.flat()
        for name, domain in domains.items():
            if finite(domain) is None:
                raise InputError(f"a grid needs finite domains, but {name} is {spoken(domain)}")
        yield from (self.complete(values) for values in self._branches(list(domains), {}))

    def _branches(self, left: Sequence[str], values: Mapping[str, Scalar]) -> Iterator[Mapping[str, Scalar]]:
        if not left:
            yield values
            return
        name, *rest = left
        choices = finite(self.flat()[name]) or () if self.matters(name, values) else (self.defaults[name],)
        for choice in choices:
            yield from self._branches(rest, {**values, name: choice})

    def size(self) -> int | None:
        """Return the number of settings, or None if a knob is continuous."""
        return self._count(list(self.flat()), {})

    def trainings(self) -> int | None:
        """Return the number of trainings that the whole space needs, or None if a train-time knob is continuous."""
        return self._count(list(self.train), {})

    def _count(self, left: Sequence[str], values: Mapping[str, Scalar]) -> int | None:
        """Count the settings of the knobs in `left`, branching at knobs that others depend on."""
        total, domains = 1, self.flat()
        for i, name in enumerate(left):
            if not self.matters(name, values):
                continue
            choices = finite(domains[name])
            if choices is None:
                return None
            if not any(name in condition for condition in self.given.values()):
                total *= len(choices)
                continue
            counts = [self._count(left[i + 1 :], {**values, name: choice}) for choice in choices]
            return None if None in counts else total * sum(count or 0 for count in counts)
        return total


def conditions(given: Condition) -> str:
    """Return as text when a knob is active; empty if it always is."""
    return " and ".join(f"{name} is {' or '.join(map(str, values))}" for name, values in given.items())


def _default(declared: dataclasses.Field[Any]) -> Scalar:
    value: Any = declared.default
    return value
