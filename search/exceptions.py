"""What callers of the search catch. `InputError` is in spaces/exceptions.py, `AttackError` in attacks/attack.py."""

from __future__ import annotations

from spaces.exceptions import InputError


class StorageError(OSError):
    """The storage cannot be read or written, whatever is asked of it: no trial is to blame."""


class Unreachable(OSError):
    """A storage at a URI does not answer, or refuses."""


class AlteredFile(InputError):
    """A file of a data set is not the official one: altered or cut short."""


class NoSource(InputError):
    """None of the sources of a data set gives it."""


class NoSpace(InputError):
    """The disk of the data folder is full."""


class TrialError(RuntimeError):
    """A trial cannot be finished, and trying again will not help."""


class AlarmError(RuntimeError):
    """A candidate did not pass its audit."""
