"""A storage that is a URI: what must last lies there, and each node works in a folder of its own.

Object stores know neither locks nor renames, and nothing here asks for them: an entry of the store counts once its
`entry.json`, which goes last, names the checksums of what lies beside it.
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
"""How many times as long as it took to fail a storage is then left alone."""
PART = ".part-"
"""Marks a file that is half sent, or was when its sender died."""


def mirror_of(storage: str, part: str = "") -> Mirror | None:
    """Return the process's mirror of one folder of a storage; None where the storage itself is a folder."""
    return _mirror(storage, part, local_folder(storage)) if is_uri(storage) else None


class Mirror:
    """A folder of a storage and the one that stands for it on this node; a file has the same name in both.

    Args:
        storage: the URI.
        part: the folder below it: the store, or a search.
        root: where this node keeps what it works with.
    """

    def __init__(self, storage: str, part: str, root: Path) -> None:
        self.storage = storage
        self.part = part
        self.folder = root / part
        self._rests = 0.0
        self._said = False

    def reach(self) -> None:
        """See that the storage can be written.

        Raises:
            Unreachable: it cannot.
        """
        with self._reaching():
            trace = f"{self._base}/.reached-{uuid.uuid4().hex}"
            if self._has_folders:
                self._fs.makedirs(self._base, exist_ok=True)
            self._fs.pipe_file(trace, b"crucible")
            self._fs.rm_file(trace)

    def retry(self) -> None:
        """Ask a storage that did not answer again, at once."""
        self._rests = 0.0

    def send(self, name: str) -> None:
        """Send a file; it arrives in full or not at all.

        Raises:
            FileNotFoundError: it is not here.
            Unreachable: the storage does not take it.
        """
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(path)
        with self._reaching():
            if not self._has_folders:  # an object store puts a file in full or not at all by itself
                self._fs.put_file(str(path), self._at(name))
                return
            if not self._fs.isdir(self._base):
                raise OSError("it is gone")  # and is not to be made anew below a mount point
            part = self._at(f"{name}{PART}{uuid.uuid4().hex}")
            self._fs.makedirs(part.rpartition("/")[0], exist_ok=True)
            try:
                self._fs.put_file(str(path), part)
                self._fs.mv(part, self._at(name))
            except BaseException:
                with suppress(Exception):
                    self._fs.rm_file(part)
                raise

    def fetch(self, name: str, to: Path | None = None) -> Path:
        """Bring a file, in full or not at all; it takes its own place unless `to` names another.

        Raises:
            FileNotFoundError: it is not there.
            Unreachable: the storage does not give it.
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
        """Return a file's content; it raises what `fetch` does."""
        with self._reaching(may_miss=True):
            return bytes(self._fs.cat_file(self._at(name)))

    def drop(self, name: str) -> None:
        """Remove a file where it can be had; whoever finds it later knows it for an old one."""
        with suppress(OSError), self._reaching(may_miss=True):
            self._fs.rm_file(self._at(name))

    def sizes(self) -> dict[str, int]:
        """Return the size of every file there, in bytes.

        Raises:
            Unreachable: the storage does not answer.
        """
        with self._reaching():
            self._fs.invalidate_cache()
            found = self._fs.find(self._at(""), detail=True)
        sizes = {path[len(self._at("")) + 1 :]: int(about["size"]) for path, about in found.items()}
        return {name: size for name, size in sizes.items() if PART not in name}

    def holding(self, pattern: str) -> list[str]:
        """Return the folders there that hold a file, `*/study.yaml` say; it raises what `sizes` does."""
        with self._reaching():
            self._fs.invalidate_cache()
            found = self._fs.glob(self._at(pattern))
        return sorted(str(path).split("/")[-2] for path in found)

    # Entries of the store.

    def send_entry(self, name: str) -> None:
        """Send an entry, `kind/key`, and those that could not be sent before; what fails is left for the next time."""
        mark = self.folder / "unsent" / name.replace("/", "-")
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        self.catch_up()

    def catch_up(self) -> bool:
        """Send the entries that were not sent yet, and return whether none is left."""
        for mark in sorted((self.folder / "unsent").glob("*")):
            name = mark.name.replace("-", "/", 1)
            try:
                for file in sorted(json.loads((self.folder / name / "entry.json").read_text())["sha256"]):
                    self.send(f"{name}/{file}")
                self.send(f"{name}/entry.json")
            except Unreachable:
                return False
            except (OSError, ValueError, KeyError):
                pass  # set aside meanwhile; it is made, and sent, anew
            mark.unlink(missing_ok=True)
        return True

    def fetch_entry(self, name: str, folder: Path) -> None:
        """Bring an entry's files into a folder; whether they are whole is the caller's to see.

        Raises:
            OSError, ValueError, KeyError: it is not there in full, or the storage does not give it.
        """
        entry = self.fetch(f"{name}/entry.json", folder / "entry.json")
        for file in json.loads(entry.read_text())["sha256"]:
            self.fetch(f"{name}/{file}", folder / file)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return url_to_fs(self.storage, use_listings_cache=False)

    @property
    def _fs(self) -> Any:
        return self._opened[0]

    @property
    def _base(self) -> str:
        return self._opened[1].rstrip("/")

    @property
    def _has_folders(self) -> bool:
        """Whether a file needs a folder that was made, and can be seen half written; object stores are asynchronous."""
        return not self._fs.async_impl

    def _at(self, name: str) -> str:
        return "/".join(part for part in (self._base, self.part, name) if part)

    @contextmanager
    def _reaching(self, *, may_miss: bool = False) -> Iterator[None]:
        """Turn whatever a file system raises, each something else, into Unreachable, and let it rest then.

        Args:
            may_miss: a file that is not there is FileNotFoundError, unless the whole storage is not.
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
            reason = "it is gone" if missing else (str(error) or type(error).__name__).splitlines()[0]
            if not self._said:
                logging.getLogger(__name__).warning("%s: %s; work goes on, and is sent later", self.storage, reason)
            self._said = True
            raise Unreachable(f"{self.storage}: {reason}") from None
        self._said = False


@lru_cache(maxsize=8)
def _mirror(storage: str, part: str, root: Path) -> Mirror:
    return Mirror(storage, part, root)
