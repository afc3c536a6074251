"""A storage that is a URI: it holds everything that must persist, while each node works in its own local folder.

Object stores have neither locks nor renames, and none are needed here: an entry of the store counts once it has its
`entry.json`, which is uploaded last and lists the checksums of the other files.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from search.exceptions import Unreachable
from search.storage.uri import is_uri, local_folder

REST = 10.0
"""After a failure, the storage is not contacted for this many times the duration of the failed request."""
PART = ".part-"
"""Marks a file whose upload is incomplete: it is in progress, or its sender died."""


def mirror_of(storage: str, part: str = "") -> Mirror | None:
    """Return this process's mirror of one folder of a storage, or None if the storage is a local folder."""
    return _mirror(storage, part, local_folder(storage)) if is_uri(storage) else None


class Mirror:
    """A folder of a remote storage and its local copy on this node; a file has the same name in both.

    Args:
        storage: the URI.
        part: the folder below it: the store, or a search.
        root: the local folder in which this node keeps its working files.
    """

    def __init__(self, storage: str, part: str, root: Path) -> None:
        self.storage = storage
        self.part = part
        self.folder = root / part
        self._rests = 0.0
        self._said = False

    def reach(self) -> None:
        """Check that the storage can be written.

        Raises:
            Unreachable: it cannot be written.
        """
        with self._reaching(warns=False):
            trace = f"{self._base}/.reached-{uuid.uuid4().hex}"
            if self._has_folders:
                self._fs.makedirs(self._base, exist_ok=True)
            self._fs.pipe_file(trace, b"crucible")
            self._fs.rm_file(trace)

    def retry(self) -> None:
        """Allow the next request at once, also after a failure."""
        self._rests = 0.0

    def send(self, name: str) -> None:
        """Upload a file atomically.

        Raises:
            FileNotFoundError: the local file does not exist.
            Unreachable: the storage does not accept it.
        """
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(path)
        with self._reaching():
            if not self._has_folders:  # uploads to an object store are atomic
                self._fs.put_file(str(path), self._at(name))
                self._said = False
                return
            if not self._fs.isdir(self._base):
                raise OSError("it is gone")  # do not create it on a bare mount point
            part = self._at(f"{name}{PART}{uuid.uuid4().hex}")
            self._fs.makedirs(part.rpartition("/")[0], exist_ok=True)
            try:
                self._fs.put_file(str(path), part)
                self._fs.mv(part, self._at(name))
                self._said = False  # also where it can be read, but not written, the user is told once
            except BaseException:
                with suppress(Exception):
                    self._fs.rm_file(part)
                raise

    def fetch(self, name: str, to: Path | None = None) -> Path:
        """Download a file atomically, to its usual local path or to `to`.

        Raises:
            FileNotFoundError: the storage does not have it.
            Unreachable: the storage does not provide it.
        """
        path = to or self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with self._reaching(may_miss=True):
                self._fs.get_file(self._at(name), str(temporary))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def read(self, name: str) -> bytes:
        """Return a file's content; raises the same errors as `fetch`."""
        with self._reaching(may_miss=True):
            return bytes(self._fs.cat_file(self._at(name)))

    def drop(self, name: str) -> None:
        """Remove a file if the storage is reachable; readers recognise a file that remains as outdated."""
        with suppress(OSError), self._reaching(may_miss=True):
            self._fs.rm_file(self._at(name))

    def sizes(self) -> dict[str, int]:
        """Return the size of every file in the storage, in bytes.

        Raises:
            Unreachable: the storage does not respond.
        """
        with self._reaching(warns=False):
            self._fs.invalidate_cache()
            found = self._fs.find(self._at(""), detail=True)
        sizes = {path[len(self._at("")) + 1 :]: int(about["size"]) for path, about in found.items()}
        return {name: size for name, size in sizes.items() if PART not in name}

    def holding(self, pattern: str) -> list[str]:
        """Return the folders with a file that matches `pattern`, as `*/study.yaml`; raises the errors of `sizes`."""
        with self._reaching(warns=False):
            self._fs.invalidate_cache()
            found = self._fs.glob(self._at(pattern))
        return sorted(str(path).split("/")[-2] for path in found)

    # Entries of the store.

    def send_entry(self, name: str) -> None:
        """Upload an entry, `kind/key`, and all entries whose upload failed before; a failure is retried next time."""
        mark = self.folder / "unsent" / name.replace("/", "-")
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        self.catch_up()

    def catch_up(self) -> bool:
        """Upload the entries that are not uploaded yet, and return whether none is left."""
        for mark in sorted((self.folder / "unsent").glob("*")):
            name = mark.name.replace("-", "/", 1)
            try:
                for file in sorted(json.loads((self.folder / name / "entry.json").read_bytes())["sha256"]):
                    self.send(f"{name}/{file}")
                self.send(f"{name}/entry.json")
            except Unreachable:
                return False
            except (OSError, ValueError, KeyError):
                pass  # set aside meanwhile; it will be made and uploaded again
            mark.unlink(missing_ok=True)
        return True

    def fetch_entry(self, name: str, folder: Path) -> None:
        """Download an entry's files into a folder; the caller must verify their checksums.

        Raises:
            OSError, ValueError, KeyError: the entry is incomplete, or the storage does not provide it.
        """
        entry = self.fetch(f"{name}/entry.json", folder / "entry.json")
        for file in json.loads(entry.read_bytes())["sha256"]:
            self.fetch(f"{name}/{file}", folder / file)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        files, base = url_to_fs(self.storage, use_listings_cache=False)
        if "s3" in files.protocol:
            _ends_in_time(files)
        return files, base

    @property
    def _fs(self) -> Any:
        return self._opened[0]

    @property
    def _base(self) -> str:
        return self._opened[1].rstrip("/")

    @property
    def _has_folders(self) -> bool:
        """Whether folders must be created and partial files are visible; not so in object stores, which are async."""
        return not self._fs.async_impl

    def _at(self, name: str) -> str:
        return "/".join(part for part in (self._base, self.part, name) if part)

    @contextmanager
    def _reaching(self, *, may_miss: bool = False, warns: bool = True) -> Iterator[None]:
        """Convert any error of a file system to Unreachable, and pause further requests after it.

        Args:
            may_miss: raise FileNotFoundError for a missing file, unless the whole storage is missing.
            warns: log the first failure, since callers go on without the storage.
        """
        if time.monotonic() < self._rests:
            raise Unreachable(f"{self.storage} did not answer a moment ago")
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            missing = may_miss and isinstance(error, FileNotFoundError)
            if missing and not (self._has_folders and not self._fs.isdir(self._base)):
                raise
            ended = time.monotonic()
            self._rests = ended + REST * (ended - began)
            reason = "it is gone" if missing else (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            if warns and not self._said:
                logging.getLogger(__name__).warning("%s: %s; work goes on, and is sent later", self.storage, reason)
            self._said |= warns
            raise Unreachable(f"{self.storage}: {reason}") from None


def _ends_in_time(files: Any) -> None:
    """Let a request to an S3 that is silent fail after its time-outs; s3fs would wait for minutes, or for ever."""
    from botocore import handlers  # type: ignore[import-not-found]  # of the extra s3

    files.retries = 1  # botocore tries five times itself
    # Before it uploads, a client may ask whether it may (100-continue); for that answer aiohttp has no time-out.
    handlers.BUILTIN_HANDLERS[:] = [
        each for each in handlers.BUILTIN_HANDLERS if handlers.add_expect_header not in each
    ]


@lru_cache(maxsize=8)
def _mirror(storage: str, part: str, root: Path) -> Mirror:
    return Mirror(storage, part, root)
