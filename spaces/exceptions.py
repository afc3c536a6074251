"""Errors in the user's input."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """Invalid input: one line with the requirement, the value and the legal choices. The command line exits with 2."""


def choose(what: str, value: str, legal: Sequence[str]) -> str:
    """Return `value` if it is legal; otherwise raise an InputError with the choices and the nearest one."""
    if value in legal:
        return value
    near = difflib.get_close_matches(value, legal, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{what} must be one of {', '.join(legal)}, but is {value!r}{hint}")
