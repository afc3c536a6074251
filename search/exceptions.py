"""Exceptions of the search. `InputError` is in spaces/exceptions.py, `AttackError` in attacks/attack.py."""

from __future__ import annotations

from spaces.exceptions import InputError


class StorageError(OSError):
    """The storage cannot be read or written, whatever the request: no trial is the cause."""


class Unreachable(OSError):
    """A storage at a URI does not respond, or refuses the request."""


class AlteredFile(InputError):
    """A file of a data set differs from the official one: it was altered or truncated."""


class NoSource(InputError):
    """No source of a data set provides its files."""


class NoSpace(InputError):
    """The disk that holds the data folder is full."""


class TrialError(RuntimeError):
    """A trial cannot be finished, and a retry would not help."""


class AlarmError(RuntimeError):
    """A candidate failed its audit."""


class RefusedField(InputError):
    """A field of a study is unknown or invalid.

    Args:
        field: its name.
        law: the error message, one line.
    """

    def __init__(self, field: str, law: str) -> None:
        super().__init__(law)
        self.field = field
