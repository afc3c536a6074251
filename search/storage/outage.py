"""A folder that may be away for a while: an unmounted disk, a network share.

A file in it says that it is there. Where it has been seen, whoever reads or writes waits for it, and nothing is made
anew on the bare mount point.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Self, TypeVar

from filelock import FileLock

from search.exceptions import StorageError

P = ParamSpec("P")
T = TypeVar("T")
Where = TypeVar("Where", bound="WaitedFolder")

PATIENCE_S = float(os.environ.get("CRUCIBLE_STORAGE_PATIENCE_S", "600"))
"""How long a storage that is away is waited for."""
MARKER = "here"
"""The file that says that the folder is there."""
MEANING = b"The store of Crucible's searches is here. While this file is missing, they wait for its return.\n"
_SEEN: set[Path] = set()
"""The folders that this process knows to exist, whichever object saw them: one that is missing is away, not new."""
BROKEN = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS}


def trouble(error: BaseException | None) -> str | None:
    """Return what is wrong with the storage where that is why something failed; None where it is not."""
    while error is not None:
        if isinstance(error, StorageError):
            return str(error)
        if isinstance(error, OSError) and error.errno in BROKEN:
            return f"{error.filename or 'a file'}: {os.strerror(error.errno)}"
        # Ray wraps what a worker raised.
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


class WaitedFolder:
    """A folder that is waited for while it is away.

    Args:
        root: the folder; made with the first entry, or by `make`.
    """

    marker_text = MEANING

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def make(self) -> Self:
        """Make the store where it is new; where it was seen before it must return by itself."""
        if self.root not in _SEEN:
            self.root.mkdir(parents=True, exist_ok=True)
            if not self._here:
                (self.root / MARKER).write_bytes(self.marker_text)
            _SEEN.add(self.root)
        return self

    def expected(self) -> Self:
        """Take it as one that exists, whether it is here or away: a worker makes none."""
        _SEEN.add(self.root)
        return self

    @property
    def away(self) -> bool:
        """Whether the store exists but is not here."""
        return self.root in _SEEN and not self._here

    @property
    def _here(self) -> bool:
        return os.path.exists(self.root / MARKER)  # False too where a broken mount answers with an error

    def wait(self) -> None:
        """Return when the store is here.

        Raises:
            StorageError: it did not return.
        """
        until = time.monotonic() + PATIENCE_S
        while self.away:
            # A trial's time limit is not meant for this; `search/engine/ray_backend.py` sets it.
            faulthandler.cancel_dump_traceback_later()
            if time.monotonic() > until:
                raise StorageError(f"{self.root.parent} was away for {PATIENCE_S:g} s")
            time.sleep(0.2)


def patiently(method: Callable[Concatenate[Where, P], T]) -> Callable[Concatenate[Where, P], T]:
    """Let a method wait for a storage that is away, and do it again if the storage went meanwhile."""

    @wraps(method)
    def patient(place: Where, /, *args: P.args, **kwargs: P.kwargs) -> T:
        while True:
            place.wait()
            try:
                found = method(place, *args, **kwargs)
            except OSError as error:
                if place.away:
                    continue
                reason = error if isinstance(error, StorageError) else trouble(error) or str(error)
                raise StorageError(str(reason)) from error
            if not place.away:  # what was not found may only have been away
                return found

    return patient


class WaitingLock(FileLock):
    """A lock of a store. One that is waited for makes its folder anew each time, so it may not while that is away."""

    def _acquire(self) -> None:
        WaitedFolder(Path(self.lock_file).parent.parent).wait()
        super()._acquire()
