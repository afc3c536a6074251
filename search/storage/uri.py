"""The name of a storage: a folder, or a URI that fsspec supports."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from fsspec.core import split_protocol
from fsspec.registry import get_filesystem_class, known_implementations

HOME = "~/.cache/crucible"
INSTALL = "pip install --constraint requirements.lock"
"""How a file system's package is installed: its version must be that of fsspec."""


def is_uri(storage: str) -> bool:
    return "://" in storage


def check_storage(storage: str) -> str:
    """Return a storage in the form that every worker can use: an absolute folder, or a URI that this machine supports.

    Raises:
        ValueError: it is empty, has a password, or no implementation of the URI's protocol is installed.
    """
    if not storage:
        raise ValueError("must be a folder or a URI")  # an empty variable in a script must not mean this folder
    if not is_uri(storage):
        return str(_resolved(storage))
    protocol, path = split_protocol(storage)
    if re.match(r"[^/@]*:[^/@]*@", path):
        raise ValueError("must be a folder or a URI without a password, which would stand in study.yaml")
    try:
        kind = get_filesystem_class(str(protocol))  # None for "://x", which fsspec treats as a file
    except ImportError:
        package = known_implementations[protocol]["class"].partition(".")[0]
        remedy = "its packages" if package == "fsspec" else package
        raise ValueError(f"must be a folder or a URI of an installed file system: {INSTALL} {remedy}") from None
    except ValueError:
        raise ValueError("must be a folder or a URI that fsspec knows, as s3://, gs://, abfs:// or file://") from None
    if getattr(kind, "local_file", False):
        return f"file://{_resolved(path)}"
    return storage.rstrip("/")


def _resolved(path: str) -> Path:
    try:
        return Path(os.path.realpath(Path(path).expanduser()))  # a loop of links is found where it is used
    except RuntimeError:
        raise ValueError("must be a folder or a URI, not in the home of a user that there is not") from None


def mask_credentials(given: object) -> object:
    """Return the storage as given, with its password masked, so that it may be shown."""
    return re.sub(r"(://[^/@]*:)[^/@]*@", r"\1***@", given) if isinstance(given, str) else given


def local_folder(storage: str) -> Path:
    """Return the folder in which this node works: the storage itself, or this node's local folder for a URI."""
    if not is_uri(storage):
        return Path(storage)
    home = Path(os.environ.get("CRUCIBLE_CACHE") or HOME).expanduser().absolute()
    return home / "storage" / hashlib.sha256(storage.encode()).hexdigest()[:12]
