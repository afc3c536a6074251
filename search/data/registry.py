"""Data sets by name: the built-in ones, and those that users added, described by the index of their decoded cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defenses.base import Shape
from search.data.datasets import DATASETS, DataSet
from search.data.folders import roots
from search.data.official_files import Origin
from spaces.exceptions import choose

INDEX = "decoded.json"
OWN = "own"
"""The entry of the index that describes a user's data set; a built-in one has none."""


def decoded_folders(dataset: str, data_dir: str | Path | None) -> list[Path]:
    """Return the folders that may hold the decoded cache of a data set, in the order in which they are tried."""
    return [folder / "decoded" / dataset for folder in dict.fromkeys(roots(data_dir))]


def read_index(decoded: Path) -> dict[str, Any]:
    """Return the index of a decoded cache: `files`, `checksum` and, where recorded, `train` (the training images)."""
    index: dict[str, Any] = json.loads((decoded / INDEX).read_bytes())
    return index


def data_set_names(data_dir: str | Path | None = None) -> list[str]:
    """Return the names of the built-in data sets, and then of those that users added."""
    added = {path.parent.name for folder in decoded_folders("*", data_dir) for path in _indexes(folder)}
    return [*DATASETS, *sorted(name for name in added - {*DATASETS} if _own(name, data_dir))]


def find_data_set(name: str, data_dir: str | Path | None = None) -> DataSet:
    """Return a data set.

    Raises:
        InputError: an unknown name.
    """
    if name in DATASETS:
        return DATASETS[name]
    return _own(name, data_dir) or DATASETS[choose("a data set", name, data_set_names(data_dir))]


def describe(data: DataSet) -> dict[str, Any]:
    """Return what the index of a user's data set remembers of it, as JSON."""
    return {
        "shape": [data.shape.channels, data.shape.height, data.shape.width, data.shape.classes],
        "sizes": [data.train, data.validation, data.test],
        "classes": list(data.classes),
        "eps": data.eps,
        "licence": data.licence,
        "split": data.split,
        "source": [str(path) for path in data.origin.added],
    }


def _indexes(decoded: Path) -> list[Path]:
    return list(decoded.parent.glob(f"[!.]*/{INDEX}"))


def _own(name: str, data_dir: str | Path | None) -> DataSet | None:
    """Return a user's data set; None if no index describes it."""
    if not name or Path(name).name != name:
        return None
    for decoded in decoded_folders(name, data_dir):
        try:
            return _described(name, read_index(decoded)[OWN])
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


def _described(name: str, own: Mapping[str, Any]) -> DataSet:
    train, validation, test = own["sizes"]
    return DataSet(
        shape=Shape(*own["shape"]),
        train=train,
        validation=validation,
        test=test,
        licence=own["licence"],
        eps=own["eps"],
        classes=tuple(own["classes"]),
        split=own["split"],
        megabytes=0,
        origin=Origin(dataset=name, added=[Path(path) for path in own["source"]]),
    )
