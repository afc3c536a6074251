"""The decoded cache of a data set: memory-mapped uint8 images, with an index file of their digests."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from search.data.archives import digest
from search.data.datasets import DataSet
from search.data.decoders import PARTS, Pixels
from search.data.downloads import FULL, Folder, Progress, ScikitLearn
from search.data.folders import lock, roots
from search.data.guard import refuse_while_closed, watch
from search.data.official_files import gather
from search.data.registry import INDEX, OWN, data_set_names, decoded_folders, describe, find_data_set, read_index
from search.exceptions import AlteredFile, NoSpace
from spaces.exceptions import InputError


def silent(what: str, done: int, total: int) -> None:
    """Ignore the progress."""


def caches(dataset: str, data_dir: str | Path | None) -> list[Path]:
    """Return the folders that may hold the decoded cache of a data set; a defense cannot open them from now on."""
    origin, (root, home) = find_data_set(dataset, data_dir).origin, roots(data_dir)
    decoded = decoded_folders(dataset, data_dir)
    here = (source.path for source in origin.sources if isinstance(source, Folder | ScikitLearn))
    watch(*decoded, *origin.places(root, home), *here, *origin.added)
    return decoded


def ensure(dataset: str, data_dir: str | Path | None, progress: Progress = silent, *, thorough: bool = False) -> Path:
    """Return the folder of the decoded cache; build it first if it is missing or damaged.

    Raises:
        InputError: an altered file, no source, or no disk space; the message is one line.
        TrialError: a defense asks for it (search/data/guard.py).
    """
    refuse_while_closed(f"loads {dataset}")
    for decoded in caches(dataset, data_dir):
        if fault(decoded, thorough) is None:
            return decoded
    data, (root, home) = find_data_set(dataset, data_dir), roots(data_dir)
    decoded = home / "decoded" / dataset
    if data.origin.added:
        raise AlteredFile(f"{fault(decoded, thorough)}; {data.origin.remedy}")
    with _clear_errors(dataset, home, data.megabytes), _locked(dataset, home):
        if fault(decoded, thorough) is not None:
            _build(data, root, home, progress)
    return decoded


def place(data: DataSet, data_dir: str | Path | None, progress: Progress = silent) -> Path:
    """Decode a user's data set into a new cache, whose index describes it, and return its folder.

    Raises:
        InputError: the name is taken, an image cannot be read, or there is no disk space.
    """
    dataset, (_, home) = data.origin.dataset, roots(data_dir)
    with _clear_errors(dataset, home, data.megabytes), _locked(dataset, home):
        if dataset in data_set_names(data_dir):
            raise InputError(f"a data set's name must be new, but {dataset!r} is taken")
        with _placing(dataset, home) as work:
            _decode(data, home, work / "new", progress, {OWN: describe(data)})
    return home / "decoded" / dataset


@contextmanager
def _locked(dataset: str, home: Path) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True)
    with lock(home / f".{dataset}.lock"):
        yield


def fault(decoded: Path, thorough: bool) -> str | None:
    """Return what is wrong with a decoded cache, or None; checks file sizes and, if `thorough`, digests."""
    try:
        index = read_index(decoded)
        files, _ = index["files"], index["checksum"]
        for part in PARTS:
            for name in (f"x_{part}.npy", f"y_{part}.npy"):
                size, sha256 = files[name]["bytes"], files[name]["sha256"]
                if (found := (decoded / name).stat().st_size) != size:
                    return f"{decoded / name} is cut short or altered: it must have {size} bytes, but has {found}"
                if thorough and (mark := digest(decoded / name)) != sha256:
                    return f"{decoded / name} is altered: its SHA-256 must be {sha256}, but is {mark}"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"the cache in {decoded} is not whole ({error})"
    return None


@contextmanager
def _clear_errors(dataset: str, root: Path, megabytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise NoSpace(
                f"no space left in {root}: {dataset} needs about {megabytes} MB; "
                "free some, or set $CRUCIBLE_DATA to a folder on another disk"
            ) from error
        raise InputError(
            f"the data folder {root} cannot be used for {dataset}: {error}; set $CRUCIBLE_DATA to another"
        ) from error


def pack(dataset: str, data_dir: str | Path | None) -> dict[str, Pixels]:
    """Return the memory-mapped files of the decoded cache by name, so that another machine needs no network."""
    decoded = ensure(dataset, data_dir)
    names = [*read_index(decoded)["files"], INDEX]
    return {name: np.asarray(np.memmap(decoded / name, np.uint8, "r")) for name in names}


def adopt(
    dataset: str, data_dir: str | Path | None, packed: Callable[[], Mapping[str, Pixels]], checksum: str | None = None
) -> None:
    """Write a packed cache if no whole cache exists; only one of several processes does it.

    Args:
        checksum: what the images of an existing cache must have (`read_index`); None: whatever they have.

    Raises:
        InputError: other data of this name, no disk space, or an unusable folder; the message is one line.
    """
    for decoded in decoded_folders(dataset, data_dir):
        if fault(decoded, thorough=False) is None:
            if checksum not in (None, found := read_index(decoded)["checksum"]):
                law = f"the data must be those of the search, {dataset} with the SHA-256 {checksum}"
                raise InputError(f"{law}, but {decoded} has {found}: take it away, or name another --data-dir")
            return
    _, home = roots(data_dir)
    with _clear_errors(dataset, home, 0), _locked(dataset, home):
        if fault(home / "decoded" / dataset, thorough=False) is None:
            return
        with _placing(dataset, home) as work:
            (work / "new").mkdir(parents=True)
            for name, content in packed().items():
                with (work / "new" / name).open("wb") as file:
                    file.write(content.data)


def _build(data: DataSet, root: Path, home: Path, progress: Progress) -> None:
    """Download missing files and decode them; the caller holds the lock."""
    origin = data.origin
    with _placing(origin.dataset, home) as work:
        folder = gather(origin, origin.places(root, home), origin.raw(home), work, progress)
        shutil.rmtree(work, ignore_errors=True)
        _decode(data, folder, work / "new", progress)


@contextmanager
def _placing(dataset: str, home: Path) -> Iterator[Path]:
    """Yield the path of a temporary folder; afterwards its subfolder `new` replaces the cache by a rename."""
    work, decoded = home / ".work" / dataset, home / "decoded" / dataset
    shutil.rmtree(work, ignore_errors=True)
    try:
        yield work
        decoded.parent.mkdir(exist_ok=True)
        if decoded.exists():
            os.replace(decoded, work / "old")
        os.replace(work / "new", decoded)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _decode(data: DataSet, folder: Path, new: Path, progress: Progress, about: Mapping[str, Any] | None = None) -> None:
    """Write the cache into the folder `new`; its index, which `fault` reads, is written last.

    Args:
        about: further entries of the index.
    """
    new.mkdir(parents=True)
    shape = (data.shape.channels, data.shape.height, data.shape.width)
    index: dict[str, Any] = {"files": {}, **(about or {})}
    for part in PARTS:
        found = data.decode(data.origin, folder, part)
        x_path, y_path = new / f"x_{part}.npy", new / f"y_{part}.npy"
        x_shape = (len(found.y_N), *shape)
        _save(x_path, x_shape, _heard(found.blocks, f"decoding {data.origin.dataset}", math.prod(x_shape), progress))
        _save(y_path, found.y_N.shape, [found.y_N])
        for path in (x_path, y_path):
            index["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
        if part == "train":
            mark = hashlib.sha256(np.load(x_path, mmap_mode="r").data)
            mark.update(np.load(y_path).data)
            index["checksum"] = mark.hexdigest()
            index["train"] = data.train if found.train is None else found.train
    (new / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _heard(blocks: Iterable[Pixels], what: str, total: int, progress: Progress) -> Iterator[Pixels]:
    done = 0
    for block in blocks:
        yield block
        done += block.nbytes
        progress(what, done, total)


def _save(path: Path, shape: tuple[int, ...], blocks: Iterable[Pixels]) -> None:
    # numpy.save writes through C and loses the errno of a full disk.
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)
