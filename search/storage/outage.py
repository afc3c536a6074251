"""A folder that may be unavailable for a while, such as an unmounted disk or a network share.

A marker file in it shows that it is available. Once a process has seen the folder, reads and writes wait for it, and
nothing is created on the bare mount point.
"""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import math
import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Self, TypeVar

from search.exceptions import StorageError

P = ParamSpec("P")
T = TypeVar("T")
Where = TypeVar("Where", bound="WaitedFolder")

PATIENCE_S = float(os.environ.get("CRUCIBLE_STORAGE_PATIENCE_S", "600"))
"""How long to wait for an unavailable storage, in seconds."""
MARKER = "here"
"""The file that shows that the folder is available."""
MEANING = b"The store of Crucible's searches is here. While this file is missing, they wait for its return.\n"
_SEEN: set[Path] = set()
"""Folders that this process knows to exist, from any object: if one is missing, it is unavailable, not new."""
BROKEN = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.ENOLCK, errno.ENOSYS}


def trouble(error: BaseException | None) -> str | None:
    """Return what is wrong with the storage if that caused the error, else None."""
    while error is not None:
        if isinstance(error, StorageError):
            return str(error)
        if isinstance(error, OSError) and error.errno in BROKEN:
            return f"{error.filename or 'a file'}: {os.strerror(error.errno)}"
        # Ray wraps the exception that a worker raised.
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


class WaitedFolder:
    """A folder whose readers and writers wait while it is unavailable.

    Args:
        root: the folder; created with the first entry, or by `make`.
    """

    marker_text = MEANING

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def make(self) -> Self:
        """Create the folder if it is new; one that was seen before must return by itself."""
        if self.root not in _SEEN:
            self.root.mkdir(parents=True, exist_ok=True)
            if not self._here:
                (self.root / MARKER).write_bytes(self.marker_text)
            _SEEN.add(self.root)
        return self

    def expected(self) -> Self:
        """Treat the folder as existing, whether it is available or not: a worker does not create it."""
        _SEEN.add(self.root)
        return self

    @property
    def away(self) -> bool:
        """Whether the folder exists but is unavailable."""
        return self.root in _SEEN and not self._here

    @property
    def _here(self) -> bool:
        return os.path.exists(self.root / MARKER)  # also False if a broken mount raises an error

    def wait(self) -> None:
        """Block until the folder is available.

        Raises:
            StorageError: it did not return in time.
        """
        until = time.monotonic() + PATIENCE_S
        while self.away:
            # Waiting does not count against a trial's time limit, which `search/engine/timeout.py` sets.
            faulthandler.cancel_dump_traceback_later()
            if time.monotonic() > until:
                raise StorageError(f"{self.root.parent} was away for {PATIENCE_S:g} s")
            time.sleep(0.2)


def patiently(method: Callable[Concatenate[Where, P], T]) -> Callable[Concatenate[Where, P], T]:
    """Make a method wait for an unavailable storage, and repeat it if the storage became unavailable meanwhile."""

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
            if not place.away:  # what was not found may only have been unavailable
                return found

    return patient


class HeldError(Exception):
    """Another process holds a lock. No OSError, as a storage's own time-outs are."""


_SIGNED: dict[Path, WaitingLock] = {}
"""Locks whose files name this process."""


def confirm(path: Path) -> None:
    """Check that a lock which this process has signed is still its own; a network file system can lose locks, or files.

    Raises:
        StorageError: another process has taken it.
    """
    if (lock := _SIGNED.get(path)) is not None:
        lock.confirm()


def give_up(path: Path, reason: str) -> None:
    """Let `confirm` fail from now on for a lock which this process has signed."""
    if (lock := _SIGNED.get(path)) is not None:
        lock.lost = reason


class WaitingLock:
    """A lock between processes, which ends with its process; no attempt makes the path of a storage that has gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = ""
        self._file: int | None = None
        self._mark = uuid.uuid4().hex.encode()

    def acquire(self, timeout: float = math.inf) -> Self:
        """Wait for the lock, at most `timeout` seconds.

        Raises:
            HeldError: another process holds it.
        """
        until = time.monotonic() + timeout
        while not self._attempt():
            if time.monotonic() >= until:
                raise HeldError(f"{self.path} is held by another process")
            time.sleep(0.05)
        return self

    def _attempt(self) -> bool:
        WaitedFolder(self.path.parent.parent).wait()
        try:
            self.path.parent.mkdir(exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the storage has just gone: the next attempt waits for it
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            if not isinstance(error, BlockingIOError):
                raise
            return False
        self._file = file
        return True

    def sign(self) -> Self:
        """Write into the file that this object holds the lock, for `confirm`."""
        assert self._file is not None
        os.truncate(self._file, 0)
        os.pwrite(self._file, self._mark, 0)
        _SIGNED[self.path] = self
        return self

    def confirm(self) -> None:
        """Check that this object still has the lock that it signed; a file that was removed is made and locked again.

        Raises:
            StorageError: another process has taken it.
        """
        with suppress(FileNotFoundError):
            if not self.lost and self.path.read_bytes() != self._mark:
                self.lost = f"another process has taken {self.path}"
            if self.lost:
                raise StorageError(self.lost)
            return
        self.release()
        try:
            self.acquire(timeout=1.0).sign()
        except HeldError:
            _SIGNED[self.path], self.lost = self, f"another process has taken {self.path}"
            raise StorageError(self.lost) from None

    def release(self) -> None:
        """Release the lock if this object holds it."""
        if _SIGNED.get(self.path) is self:
            del _SIGNED[self.path]
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self if self._file is not None else self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()
