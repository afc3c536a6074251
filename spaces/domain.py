"""Domains and values of knobs. A domain is an Optuna distribution; there is no notation of our own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from spaces.exceptions import InputError

Scalar = bool | int | float | str
Domain = BaseDistribution | Sequence[Scalar] | Scalar
"""Domain of a knob in a named space: a range (LOW..HIGH or LOW..HIGH:log as text), a grid, or one value."""


def finite(domain: BaseDistribution) -> tuple[Scalar, ...] | None:
    """Return the values of a finite domain in order, or None for a continuous one."""
    if isinstance(domain, CategoricalDistribution):
        return tuple(domain.choices)  # type: ignore[arg-type]  # no knob is None
    if isinstance(domain, IntDistribution) and not domain.log:
        return tuple(range(domain.low, domain.high + 1, domain.step))
    if isinstance(domain, FloatDistribution) and domain.step is not None:
        low, step = Fraction(str(domain.low)), Fraction(str(domain.step))  # 0.3, and not 0.1 + 0.1 + 0.1
        return tuple(
            float(low + number * step) for number in range(round((domain.high - domain.low) / domain.step) + 1)
        )
    if isinstance(domain, FloatDistribution | IntDistribution) and domain.single():
        return (domain.low,)
    return None


def on_step(domain: BaseDistribution, value: Scalar) -> Scalar:
    """Return a float of a domain with steps as `finite` has it, without the rounding of a sampler's arithmetic."""
    if isinstance(domain, FloatDistribution) and domain.step is not None and contains(domain, value):
        return (finite(domain) or ())[round((float(value) - domain.low) / domain.step)]
    return value


def extremes(domain: BaseDistribution) -> tuple[Scalar, ...]:
    """Return every choice of a categorical domain, or the two ends of another."""
    if isinstance(domain, CategoricalDistribution):
        return tuple(domain.choices)  # type: ignore[arg-type]  # no knob is None
    assert isinstance(domain, FloatDistribution | IntDistribution)
    return domain.low, domain.high


def draw(domain: BaseDistribution, rng: np.random.Generator) -> Scalar:
    """Return a value drawn uniformly from the domain, or log-uniformly on a log scale."""
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
    """Return the value of a domain with a single value."""
    values = finite(domain)
    if values is None or len(values) != 1:
        raise InputError(f"a setting names every knob that is searched: {name}, {spoken(domain)}, has no value")
    return values[0]


def contains(domain: BaseDistribution, value: object) -> bool:
    """Return whether `value` is in `domain` and has its type."""
    if isinstance(domain, CategoricalDistribution):
        return any(value == choice and type(value) is type(choice) for choice in domain.choices)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    if isinstance(domain, IntDistribution) and not isinstance(value, int):
        return False
    assert isinstance(domain, FloatDistribution | IntDistribution)
    return domain._contains(float(value))


def spoken(domain: BaseDistribution) -> str:
    """Return the domain as text, for an error message or a table."""
    if isinstance(domain, CategoricalDistribution):
        return "one of " + ", ".join(map(written, domain.choices))
    assert isinstance(domain, FloatDistribution | IntDistribution)
    kind = "a whole number" if isinstance(domain, IntDistribution) else "a number"
    steps = f" in steps of {domain.step:g}" if _has_steps(domain) else ""
    return f"{kind} from {domain.low:g} to {domain.high:g}{steps}" + (" (log scale)" if domain.log else "")


def _has_steps(domain: BaseDistribution) -> bool:
    """Return whether a range leaves out values of its kind."""
    return getattr(domain, "step", None) not in (None, 1 if isinstance(domain, IntDistribution) else None)


def written(value: object) -> str:
    """Return a value as papers write it: 0.3, but 8/255."""
    if not isinstance(value, float):
        return str(value)
    short, levels = f"{value:g}", value * 255
    if len(short) > 5 and math.isclose(levels, round(levels), rel_tol=1e-6):
        return f"{round(levels)}/255"
    return short if float(short) == value else str(value)


def as_written(text: Any) -> Any:
    """Return the number that a text such as 8/255 stands for; any other value is returned unchanged."""
    if not isinstance(text, str):
        return text
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        return text


def as_number(name: str, given: float | str) -> float:
    """Return a number that may be written as a fraction.

    Raises:
        InputError: it is no number.
    """
    if isinstance(number := as_written(given), str):
        raise InputError(f"{name} must be a number or a fraction, but is {given!r}")
    return float(number)


def narrowed(name: str, declared: BaseDistribution, wish: Domain) -> BaseDistribution:
    """Return the domain that a space gives for a knob.

    Raises:
        InputError: it is not inside the declared domain.
    """
    if isinstance(wish, FloatDistribution | IntDistribution):
        values = finite(wish) if _has_steps(declared) else (wish.low, wish.high)
        inside = values is not None and all(contains(declared, value) for value in values)
        if isinstance(declared, FloatDistribution | IntDistribution) and type(wish) is type(declared) and inside:
            return wish
        raise InputError(f"{name} must be {spoken(declared)}, but the space says {spoken(wish)}")
    if isinstance(wish, str) and ".." in wish and isinstance(declared, FloatDistribution | IntDistribution):
        return _range(name, declared, wish)
    choices: list[Any] = list(wish.choices) if isinstance(wish, CategoricalDistribution) else _listed(wish)
    if not choices:
        raise InputError(f"{name} must be {spoken(declared)}, but its grid is empty")
    if isinstance(declared, FloatDistribution):
        choices = [float(value) if type(value) is int else value for value in map(as_written, choices)]
    for value in choices:
        if not contains(declared, value):
            raise InputError(f"{name} must be {spoken(declared)}, but is {value!r}")
    return CategoricalDistribution(tuple(dict.fromkeys(choices)))


def _range(name: str, declared: FloatDistribution | IntDistribution, text: str) -> BaseDistribution:
    """Return the domain that LOW..HIGH or LOW..HIGH:log stands for."""
    ends, colon, scale = text.partition(":")
    whole = isinstance(declared, IntDistribution)
    try:
        low, high = (int(end) if whole else float(as_written(end)) for end in ends.split(".."))
        if scale == ("log" if colon else "") and contains(declared, low) and contains(declared, high):
            kind: Any = type(declared)
            domain: BaseDistribution = kind(low, high, log=bool(colon), step=declared.step)
            return domain
    except ValueError:
        pass
    raise InputError(
        f"{name} must be {spoken(declared)}, or of these a range LOW..HIGH or, above 0, LOW..HIGH:log, but is {text!r}"
    )


def _listed(wish: object) -> list[Any]:
    return list(wish) if isinstance(wish, list | tuple) else [wish]
