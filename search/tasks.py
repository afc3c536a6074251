"""Tasks: data sets with a fixed train / validation / test split, decoded once into a memory-mapped cache.

Shapes: N images, C channels, H x W pixels. Images are uint8 in the cache and float32 in [0, 1] outside.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from defenses.base import Shape
from search.datasets import DATASETS, PARTS, DataSet, Part, Pixels
from search.sources import FULL, AlteredFile, Progress, digest, gather, read
from spaces.space import InputError, choose

SPLITS = ("train", "validation")
PARTNERS = {"A": "B", "B": "A", "C": "D", "D": "C"}
"""PuVAE is trained on a source classifier that is not the attacked one. Source: PuVAE, section V-B."""


class NoSpace(InputError):
    """The disk of the data folder is full."""


@dataclass(frozen=True)
class Task:
    """A data set with a classifier on it; `eps` is the usual L-inf budget, in pixel units of [0, 1]."""

    name: str
    dataset: str
    classifier: str
    shape: Shape
    eps: float

    @property
    def partner(self) -> str:
        """The architecture of PuVAE's source classifier."""
        return PARTNERS[self.classifier]


TASKS = [f"{dataset}/{classifier}" for dataset in DATASETS for classifier in PARTNERS]


def task(name: str) -> Task:
    """Return the task called `name`, such as mnist/A; an InputError names the legal ones."""
    dataset, _, classifier = name.partition("/")
    data = _data_set(dataset)
    choose(f"the classifier of task {name!r}, after the slash,", classifier, list(PARTNERS))
    return Task(name, dataset, classifier, data.shape, data.eps)


def data_folder(data_dir: str | Path | None = None) -> Path:
    """Return `data_dir`, else $CRUCIBLE_DATA, else ~/.cache/crucible."""
    return Path(data_dir or os.environ.get("CRUCIBLE_DATA") or "~/.cache/crucible").expanduser().absolute()


def load(
    dataset: str,
    split: Literal["train", "validation"],
    data_dir: str | Path | None = None,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the first `limit` images of a split, x_NCHW float32 in [0, 1], with their labels y_N int64.

    Data that are not there, or whose cache is damaged, are fetched first; of several workers one does it.

    Raises:
        InputError: an unknown data set or split (a search has no test split), or the data cannot be had.
    """
    data = _data_set(dataset)
    if split not in SPLITS:
        raise InputError(
            f"a split must be one of {', '.join(SPLITS)}, but is {split!r}; "
            "the test split is opened by `launch.py final` alone (search.tasks.open_test)"
        )
    chosen = slice(data.train) if split == "train" else slice(data.train, data.train + data.validation)
    return _tensors(dataset, "train", chosen, data_dir, limit)


def open_test(dataset: str, data_dir: str | Path | None = None, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the test split as `load` returns the others. For search/final.py alone: no search may see it."""
    return _tensors(dataset, "test", slice(_data_set(dataset).test), data_dir, limit)


def checksum(dataset: str, data_dir: str | Path | None = None) -> str:
    """Return the SHA-256 of the decoded official training set, which is train and validation together."""
    ledger = json.loads((_ensure(dataset, data_dir) / "decoded.json").read_text())
    return str(ledger["checksum"])


def _silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


def fetch(dataset: str, data_dir: str | Path | None = None, progress: Progress = _silent) -> None:
    """Fetch and decode a data set, unless a cache is there and has the digests it was written with.

    Args:
        progress: hears what is being done, the bytes done, and the bytes in all (0 where unknown).

    Raises:
        InputError: an altered file, no source, or no space; one line.
    """
    _ensure(dataset, data_dir, progress, thorough=True)


@dataclass(frozen=True)
class Status:
    """What `check` found; `detail` is one line for people."""

    dataset: str
    state: Literal["ready", "absent", "altered"]
    detail: str


def check(dataset: str, data_dir: str | Path | None = None) -> Status:
    """Compare every file of a data set with its digest, and change nothing; `fetch` makes good what is wrong."""
    data, root = _data_set(dataset), data_folder(data_dir)
    decoded = root / "decoded" / dataset
    try:
        for name, sha256 in data.origin.files.items():
            if any((root / "raw" / dataset / f"{name}{end}").exists() for end in ("", ".gz")):
                read(root / "raw" / dataset, name, sha256)
    except AlteredFile as error:
        return Status(dataset, "altered", f"{error}; {data.origin.remedy}")
    if not decoded.exists():
        return Status(dataset, "absent", f"not in {root}: python launch.py data fetch {dataset}")
    if fault := _fault(decoded, thorough=True):
        return Status(dataset, "altered", f"{fault}; build it anew: python launch.py data fetch {dataset}")
    counts = f"{data.train} train, {data.validation} validation, {data.test} test images"
    return Status(dataset, "ready", f"{counts} in {decoded}")


def _data_set(name: str) -> DataSet:
    return DATASETS[choose("a data set", name, list(DATASETS))]


def _tensors(
    dataset: str, part: Part, chosen: slice, data_dir: str | Path | None, limit: int | None
) -> tuple[Tensor, Tensor]:
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1 image, but is {limit}")
    folder = _ensure(dataset, data_dir)
    try:
        x_NCHW = np.load(folder / f"x_{part}.npy", mmap_mode="r")[chosen][:limit]
        y_N = np.load(folder / f"y_{part}.npy", mmap_mode="r")[chosen][:limit]
    except ValueError as error:
        raise AlteredFile(f"{folder} is altered ({error}); {DATASETS[dataset].origin.remedy}") from error
    images = torch.from_numpy(x_NCHW.astype(np.float32)).div_(DATASETS[dataset].white)
    return images, torch.from_numpy(y_N.astype(np.int64))


def _ensure(dataset: str, data_dir: str | Path | None, progress: Progress = _silent, *, thorough: bool = False) -> Path:
    """Return the folder of the decoded cache, building it first where it is not there or damaged."""
    data, root = _data_set(dataset), data_folder(data_dir)
    decoded = root / "decoded" / dataset
    if _fault(decoded, thorough) is None:
        return decoded
    with _clear_errors(dataset, root, data.megabytes):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{dataset}.lock"):
            if _fault(decoded, thorough) is not None:
                _build(dataset, root, progress)
    return decoded


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


def _fault(decoded: Path, thorough: bool) -> str | None:
    """Return what is wrong with a decoded cache, by its files' sizes or, if `thorough`, their digests."""
    try:
        ledger: dict[str, Any] = json.loads((decoded / "decoded.json").read_text())
        files, _ = ledger["files"], ledger["checksum"]
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


def _build(dataset: str, root: Path, progress: Progress) -> None:
    """Fetch what is missing, decode it beside the cache and put it in place by a rename; the caller holds the lock."""
    data, raw, work = DATASETS[dataset], root / "raw" / dataset, root / ".work" / dataset
    decoded = root / "decoded" / dataset
    try:
        gather(data.origin, raw, work, progress)
        shutil.rmtree(work)
        _decode(data, raw, work / "new", progress)
        decoded.parent.mkdir(exist_ok=True)
        if decoded.exists():
            os.replace(decoded, work / "old")
        os.replace(work / "new", decoded)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _decode(data: DataSet, raw: Path, new: Path, progress: Progress) -> None:
    """Write the cache into the folder `new`; its ledger, which `_fault` reads, comes last."""
    new.mkdir(parents=True)
    ledger: dict[str, Any] = {"files": {}}
    for part in PARTS:
        x_NCHW, y_N = data.decode(data.origin, raw, part)
        if part == "train":
            mark = hashlib.sha256(np.ascontiguousarray(x_NCHW).data)
            mark.update(np.ascontiguousarray(y_N).data)
            ledger["checksum"] = mark.hexdigest()
        for path, array in ((new / f"x_{part}.npy", x_NCHW), (new / f"y_{part}.npy", y_N)):
            _save(path, array)
            ledger["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
            progress(f"decoding {data.origin.dataset}", sum(f["bytes"] for f in ledger["files"].values()), 0)
    (new / "decoded.json").write_text(json.dumps(ledger, indent=1))


def _save(path: Path, array: Pixels) -> None:
    # numpy.save writes through C and loses the errno that tells a full disk.
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)
