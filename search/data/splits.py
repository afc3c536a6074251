"""The fixed train / validation / test split of each data set.

Shapes: N images, C channels, H x W pixels. Images are uint8 in the cache and float32 in [0, 1] outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from search.data.cache import caches, ensure, fault, silent
from search.data.datasets import DataSet
from search.data.decoders import PARTS, Part
from search.data.downloads import Progress
from search.data.folders import roots
from search.data.registry import find_data_set, read_index
from search.exceptions import AlteredFile
from spaces.exceptions import InputError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
FEW = 100
"""Fewer attacked images leave an accuracy a 95 % interval of up to 20 points: they prove nothing."""
HELD_OUT = 150
"""Number of validation images, the last ones, from which a black-box attacker starts, at most five sixths of all; they
are not attacked.

Source: Papernot et al. 2017, section 5.1.
"""
ASIDE = 500
"""Number of validation images, the last ones, that no search judges by, but at most a quarter of all.

The audit of an export compares its figures with those on these images. A black-box attacker starts from some of them.
"""


class Sizes(NamedTuple):
    """The number of images in each split."""

    train: int
    validation: int
    test: int

    @property
    def aside(self) -> int:
        """The number of validation images that no search judges by."""
        return min(ASIDE, self.validation // 4)

    @property
    def held_out(self) -> int:
        """The number of validation images from which a black-box attacker starts."""
        return min(HELD_OUT, self.validation * 5 // 6)

    def attackable(self, knowledge: str) -> int:
        """Return how many validation images an attacker with this knowledge can attack."""
        return self.validation - max(self.aside, self.held_out if knowledge == "black-box" else 0)


def sizes(dataset: str, data_dir: str | Path | None = None) -> Sizes:
    """Return the sizes of the splits: those of the cache if there is one, else the official ones."""
    data = find_data_set(dataset, data_dir)
    for decoded in caches(dataset, data_dir):
        if fault(decoded, thorough=False) is None:
            return _sizes(data, decoded)
    return Sizes(data.train, data.validation, data.test)


def load(
    dataset: str,
    split: Split,
    data_dir: str | Path | None = None,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the first `limit` images of a split, x_NCHW float32 in [0, 1], with their labels y_N int64.

    Missing data, and data whose cache is damaged, are fetched first; only one of several workers does it.

    Raises:
        InputError: an unknown data set or split (a search has no test split), or the data are unavailable.
    """
    data = find_data_set(dataset, data_dir)
    if split not in SPLITS:
        raise InputError(
            f"a split must be one of {', '.join(SPLITS)}, but is {split!r}; "
            "the test split is opened by `launch.py final` alone (search/data/splits.py)"
        )
    train = _train(data, ensure(dataset, data_dir))
    return _tensors(dataset, "train", slice(train) if split == "train" else slice(train, None), data_dir, limit)


def load_held_out(dataset: str, data_dir: str | Path | None = None) -> Tensor:
    """Return the validation images from which a black-box attacker starts, x_NCHW; raises the errors of `load`."""
    return load(dataset, "validation", data_dir)[0][-sizes(dataset, data_dir).held_out :]


def load_aside(dataset: str, data_dir: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Return the validation images that no search judges by, in the form of `load`, whose errors it raises."""
    x_NCHW, y_N = load(dataset, "validation", data_dir)
    judged = len(y_N) - sizes(dataset, data_dir).aside
    return x_NCHW[judged:], y_N[judged:]


def open_test(dataset: str, data_dir: str | Path | None = None, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the test split in the form of `load`. Only for search/final/final_run.py: no search may use it."""
    return _tensors(dataset, "test", slice(None), data_dir, limit)


def checksum(dataset: str, data_dir: str | Path | None = None) -> str:
    """Return the SHA-256 of the decoded official training set, that is of train and validation together."""
    return str(read_index(ensure(dataset, data_dir))["checksum"])


def fetch(dataset: str, data_dir: str | Path | None = None, progress: Progress = silent) -> None:
    """Fetch and decode a data set, unless its cache exists and matches its digests.

    Args:
        progress: called with what is being done, the bytes done, and the total bytes (0 if unknown).

    Raises:
        InputError: an altered file, no source, or no disk space; the message is one line.
    """
    ensure(dataset, data_dir, progress, thorough=True)


def expect(dataset: str, data_dir: str | Path | None, digest: str) -> None:
    """Fetch a data set if it is missing, and check that it is the one with which an export was made.

    Raises:
        InputError: the decoded data have another SHA-256, or are unavailable.
    """
    fetch(dataset, data_dir)
    if (found := checksum(dataset, data_dir)) != digest:
        raise InputError(
            f"the data must be those of the export, with the SHA-256 {digest}, but those of {dataset} have {found}"
        )


@dataclass(frozen=True)
class Status:
    """The result of `check`; `detail` is one line for people."""

    dataset: str
    state: Literal["ready", "absent", "altered"]
    detail: str


def check(dataset: str, data_dir: str | Path | None = None) -> Status:
    """Compare every file of a data set with its digest, and change nothing; `fetch` repairs what is wrong."""
    data, (root, home) = find_data_set(dataset, data_dir), roots(data_dir)
    origin, fetching = data.origin, f"python launch.py data fetch {dataset}"
    try:
        there = [place for place in origin.places(root, home) if not origin.added and not origin.missing(place)]
    except AlteredFile as error:
        return Status(dataset, "altered", str(error))
    found = None
    for decoded in caches(dataset, data_dir):
        found = fault(decoded, thorough=True) if decoded.exists() else found
        if decoded.exists() and found is None:
            train, validation, test = _sizes(data, decoded)
            known = "; as they were decoded: no digest of the official files is known" if origin.unchecked else ""
            named = f" of {len(data.classes)} classes ({', '.join(data.classes)})" if data.classes else ""
            counts = f"{train} train, {validation} validation, {test} test images{named}"
            return Status(dataset, "ready", f"{counts} in {decoded}{known}")
    if found and origin.added:
        return Status(dataset, "altered", f"{found}; {origin.remedy}")
    if found:
        return Status(dataset, "altered", f"{found}; build it anew: {fetching}")
    if there:
        return Status(dataset, "absent", f"in {there[0]}, but not decoded: {fetching}")
    if origin.closed:
        law = f"not in {root}, and cannot be downloaded, {origin.closed}"
        return Status(dataset, "absent", f"{law}: put {origin.wanted} into {origin.raw(root)}, then {fetching}")
    return Status(dataset, "absent", f"not in {root}: {fetching}")


def _train(data: DataSet, decoded: Path) -> int:
    return int(read_index(decoded).get("train", data.train))


def _sizes(data: DataSet, decoded: Path) -> Sizes:
    learnt, test = (len(np.load(decoded / f"y_{part}.npy", mmap_mode="r")) for part in PARTS)
    train = _train(data, decoded)
    return Sizes(train, learnt - train, test)


def _tensors(
    dataset: str, part: Part, chosen: slice, data_dir: str | Path | None, limit: int | None
) -> tuple[Tensor, Tensor]:
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1 image, but is {limit}")
    data, folder = find_data_set(dataset, data_dir), ensure(dataset, data_dir)
    try:
        x_NCHW = np.load(folder / f"x_{part}.npy", mmap_mode="r")[chosen][:limit]
        y_N = np.load(folder / f"y_{part}.npy", mmap_mode="r")[chosen][:limit]
    except ValueError as error:
        raise AlteredFile(f"{folder} is altered ({error}); {data.origin.remedy}") from error
    images = torch.from_numpy(x_NCHW.astype(np.float32)).div_(data.white)
    return images, torch.from_numpy(y_N.astype(np.int64))
