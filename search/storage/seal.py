"""The files of an export, and their seal: SHA256SUMS, against accidents and quiet edits. It imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from spaces.exceptions import InputError

ROLES = ("classifier", "trained_with")
"""The classifiers of an export, by their keys in its `model`: the protected one, and that which the defense adopts."""
FILES = ("card.md", "classifier.safetensors", "config.yaml", "evidence.json", "pictures.png", "weights.safetensors")
SEAL = "SHA256SUMS"
"""The file with the SHA-256 of the other files, in the format of `sha256sum --check`."""


def opened(folder: str | Path) -> dict[str, bytes]:
    """Return the files of an export, verified by their checksums; later additions, such as attacks/, are ignored.

    Raises:
        InputError: a file is missing, or differs from its checksum.
    """
    folder = Path(folder)
    try:
        code = [f"{role}.py" for role in ROLES if (folder / f"{role}.py").exists()]
        files = {name: (folder / name).read_bytes() for name in (*FILES, *code)}
        sealed = (folder / SEAL).read_bytes()
    except OSError as error:
        missing = Path(error.filename).name
        raise InputError(
            f"an export must be a folder with whole files, but {folder}: {missing}: {error.strerror}; export it anew"
        ) from None
    if sealed != seal(files):
        altered = [name for name, line in _sums(files).items() if line not in sealed.splitlines(keepends=True)]
        raise InputError(
            f"an export must be as it was written, but {folder} has another {', '.join(altered) or SEAL} than its "
            f"{SEAL} says: export it anew"
        )
    return files


def seal(files: Mapping[str, bytes]) -> bytes:
    """Return the content of SHA256SUMS for the files of an export."""
    return b"".join(_sums(files).values())


def _sums(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n".encode() for name in sorted(files)}
