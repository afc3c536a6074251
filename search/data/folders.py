"""Where the data lie on this machine."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from spaces.exceptions import InputError

HOME = "~/.cache/crucible"


def data_folder(data_dir: str | Path | None = None) -> Path:
    """Return `data_dir`, else $CRUCIBLE_DATA, else ~/.cache/crucible."""
    return Path(data_dir or os.environ.get("CRUCIBLE_DATA") or HOME).expanduser().absolute()


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
    return root, Path(HOME).expanduser().absolute() / "read-only" / mark
