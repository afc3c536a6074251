"""What is raised where a user's input is refused."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """Bad input: one line with the law, the value and the legal choices. The command line exits with 2."""


def choose(what: str, value: str, legal: Sequence[str]) -> str:
    """Return `value` if it is legal; else raise an InputError that names the choices and the nearest one."""
    if value in legal:
        return value
    near = difflib.get_close_matches(value, legal, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{what} must be one of {', '.join(legal)}, but is {value!r}{hint}")
