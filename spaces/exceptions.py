"""Errors in the user's input."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

LONG = 100
"""Characters of a value that are compared with legal ones; comparing a megabyte takes minutes."""


class InputError(ValueError):
    """Invalid input: one line with the requirement, the value and the legal choices. The command line exits with 2."""


def choose(what: str, value: str, legal: Sequence[str]) -> str:
    """Return `value` if it is legal; otherwise raise an InputError with the choices and the nearest one."""
    if value in legal:
        return value
    raise InputError(f"{what} must be one of {', '.join(legal)}, but is {value!r}{meant(value, legal)}")


def meant(value: str, legal: Iterable[str]) -> str:
    """Return the question whether a legal value was meant that has the value as a part, or is near it; else nothing.

    Capitals, and `-` in place of `_`, make no distance.
    """
    given, plain = _plain(value[:LONG]), {_plain(each): each for each in legal}
    whole = [each for each in plain if given in each and len(given) > 2]
    near = whole or difflib.get_close_matches(given, plain, n=1)
    return f"; did you mean {plain[near[0]]!r}?" if near else ""


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_")
