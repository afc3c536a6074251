"""Where the data lie on this machine, and locks in their folders and others."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path

from filelock import FileLock

from spaces.exceptions import InputError

HOME = "~/.cache/crucible"


def full(path: str | Path) -> Path:
    """Return a path as absolute, with ~ as the home that it stands for.

    Raises:
        InputError: there is no such user.
    """
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise InputError(f"a path must begin with the home of a user that there is, but is {str(path)!r}") from None


def data_folder(data_dir: str | Path | None = None) -> Path:
    """Return `data_dir`, else $CRUCIBLE_DATA, else ~/.cache/crucible."""
    return full(data_dir or os.environ.get("CRUCIBLE_DATA") or HOME)


def roots(data_dir: str | Path | None) -> tuple[Path, Path]:
    """Return the data folder, and the folder that keeps downloaded and decoded files.

    They are the same unless the data folder is read-only: then these files are kept in the home cache.

    Raises:
        InputError: the data folder may not be seen, as in the home of another user.
    """
    root = data_folder(data_dir)
    try:
        # The mode is checked too, because os.access reports everything as writable for the superuser.
        if not root.is_dir() or (os.access(root, os.W_OK) and root.stat().st_mode & 0o222):
            return root, root
    except PermissionError as error:
        law = "a data folder must be one that may be read"
        raise InputError(f"{law}, but {root}: {error.strerror}; set $CRUCIBLE_DATA to another") from None
    mark = hashlib.sha256(str(root).encode()).hexdigest()[:12]
    return root, full(HOME) / "read-only" / mark


def try_lock(folder: Path) -> None:
    """Lock a new file in a folder, which is removed; not every file system can.

    Raises:
        OSError: the folder cannot be written, or its files cannot be locked.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from None


def lock(path: Path) -> FileLock:
    """Return a lock between processes; a file that is left over holds nothing.

    Raises:
        OSError: files in its folder cannot be locked: FileLock would take a file that is there for a lock, for ever.
    """
    try_lock(path.parent)
    return FileLock(path)
