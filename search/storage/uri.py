"""What names a storage: a folder, or a URI that fsspec knows."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from fsspec.core import split_protocol
from fsspec.registry import get_filesystem_class, known_implementations

HOME = "~/.cache/crucible"


def is_uri(storage: str) -> bool:
    return "://" in storage


def check_storage(storage: str) -> str:
    """Return a storage as every worker finds it: an absolute folder, or a URI that this machine can speak to.

    Raises:
        ValueError: it is nothing, or no implementation of the URI's protocol is installed.
    """
    if not storage:
        raise ValueError("must be a folder or a URI")  # a script's empty variable is not meant to be this folder
    if not is_uri(storage):
        return str(Path(storage).expanduser().resolve())
    protocol, path = split_protocol(storage)
    if re.match(r"[^/@]*:[^/@]*@", path):
        raise ValueError("must be a folder or a URI without a password, which would stand in study.yaml")
    try:
        kind = get_filesystem_class(str(protocol))  # None of "://x", which fsspec takes for a file
    except ImportError:
        package = known_implementations[protocol]["class"].partition(".")[0]
        remedy = "its packages" if package == "fsspec" else package
        raise ValueError(f"must be a folder or a URI of an installed file system: pip install {remedy}") from None
    except ValueError:
        raise ValueError("must be a folder or a URI that fsspec knows, as s3://, gs://, abfs:// or file://") from None
    if getattr(kind, "local_file", False):
        return f"file://{Path(path).expanduser().resolve()}"
    return storage.rstrip("/")


def mask_credentials(given: object) -> object:
    """Return what was given as a storage, as it may be shown: without a password."""
    return re.sub(r"(://[^/@]*:)[^/@]*@", r"\1***@", given) if isinstance(given, str) else given


def local_folder(storage: str) -> Path:
    """Return the folder in which this node works: the storage itself, or the one that stands for a URI here."""
    if not is_uri(storage):
        return Path(storage)
    home = Path(os.environ.get("CRUCIBLE_CACHE") or HOME).expanduser().absolute()
    return home / "storage" / hashlib.sha256(storage.encode()).hexdigest()[:12]
