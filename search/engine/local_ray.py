"""What a Ray cluster of this machine alone needs of it: a folder with a short path, and a place for its token."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spaces.exceptions import InputError

AFTER = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Bytes that Ray appends to the path of its folder for a socket, at most."""
SOCKET = 107
"""Bytes that the path of a socket may have on Linux."""
SHORT = ("/tmp", "/var/tmp", "/dev/shm")
"""Folders in which a link to a folder with a longer path may be."""
REMEDY = f"set RAY_TMPDIR to a folder with a path of at most {SOCKET - AFTER - len('/ray')} bytes"


def scratch() -> Path:
    """Return the folder in which Ray's is: $RAY_TMPDIR, else that of temporary files."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()


@contextmanager
def ray_folder() -> Iterator[Path]:
    """Yield the folder for Ray's sockets, logs and spilled objects.

    Where its path is too long for sockets, it is reached through a link in a temporary folder with a short path.

    Raises:
        InputError: it cannot be made, or is too long and no link can be made.
    """
    folder = scratch() / "ray"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Ray needs a folder that can be written, but {folder}: {error.strerror}; {REMEDY}") from None
    if _fits(folder):
        yield folder
        return
    link = _short_folder(folder) / "ray"
    link.symlink_to(folder)
    try:
        yield link
    finally:
        shutil.rmtree(link.parent, ignore_errors=True)


def _fits(folder: Path) -> bool:
    return len(os.fsencode(folder)) + AFTER <= SOCKET


def _short_folder(folder: Path) -> Path:
    for place in SHORT:
        try:
            return Path(tempfile.mkdtemp(prefix="crucible-", dir=place))
        except OSError:
            continue
    raise InputError(
        f"sockets of Ray need a path of at most {SOCKET} bytes, too few for those in {folder}, and no link to it "
        f"can be made in {', '.join(SHORT)}; {REMEDY}"
    )


def ensure_token() -> None:
    """Give Ray a token through the environment where it could not keep one in the home, as it does by default."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    try:
        token = Path.home() / ".ray" / "auth_token"
        token.parent.mkdir(parents=True, exist_ok=True)
        kept = os.access(token, os.R_OK) if token.exists() else os.access(token.parent, os.W_OK)
    except (OSError, RuntimeError):
        kept = False
    if not kept:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
