"""Adds and removes a user's own data: reads the files, splits them by a seed, and writes a decoded cache.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from defenses.base import Shape
from search.data.cache import ensure, place, silent
from search.data.datasets import DATASETS, DataSet
from search.data.decoders import BLOCK, PARTS, Decoded, Part, Pixels
from search.data.downloads import Progress
from search.data.folders import full, lock, roots
from search.data.official_files import Origin
from search.data.registry import data_set_names, decoded_folders, find_data_set
from search.data.user_files import MOST_CLASSES, Labelled, Size, read_files
from search.formatting import of_255
from spaces.domain import as_written
from spaces.exceptions import InputError, meant

SHARE = 0.15
"""The fraction of the images that goes to each of validation and test where the user has not made that split."""
LEAST = 8
"""The least number of validation images: a quarter of them is kept aside, and the rest is judged."""
EPS = "8/255"
SPLITS = ("train", "validation", "test")
Chosen = list[tuple[Labelled, int]]
"""Images of one split, in order: each by the files that hold it, and its place among them."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """How a user wants data to be read.

    Args:
        size: "SIDE" or "HEIGHTxWIDTH", in pixels; None: as the images are.
        group: a regular expression; files with the same match in their names stay in one split.
        seed: of splits and order.
        eps: the usual L-inf budget, in pixel units of [0, 1]; may be written as a fraction.
        licence: what the owner allows, in words.
    """

    size: str | None = None
    group: str | None = None
    seed: int = 0
    eps: str | float = EPS
    licence: str = "not stated by who added it"


def add(
    name: str,
    paths: Sequence[Path],
    wishes: Wishes = Wishes(),  # noqa: B008
    data_dir: str | Path | None = None,
    progress: Progress = silent,
) -> DataSet:
    """Add a user's data under a name; from then on they are a data set like any other.

    Args:
        paths: a folder of images, an .npz, or an .npy of images and one of labels.

    Raises:
        InputError: the name is taken, or the files are no data set; nothing is written.
    """
    _new(name, data_dir)
    eps, size, pattern = _eps(wishes.eps), _size(wishes.size), _pattern(wishes.group)
    paths = [full(path) for path in paths]
    files = read_files(paths, size)
    if not 2 <= len(files.classes) <= MOST_CLASSES:
        raise InputError(f"there must be from 2 to {MOST_CLASSES} classes, but there are {len(files.classes)}")
    if twice := [name for name in files.classes if files.classes.count(name) > 1]:
        raise InputError(f"the names of classes must differ, but {twice[0]!r} is the name of {twice.count(twice[0])}")
    chosen = {split: list[tuple[Labelled, int]]() for split in SPLITS}
    for part, images in files.parts.items():
        lacking = [split for split in SPLITS[1:] if split not in files.parts] if part == "train" else []
        for split, places in _divided(images, lacking, pattern, wishes.seed, files.classes).items():
            chosen[split or part] += [(images, int(i)) for i in places]
    _complete(chosen, files.classes)
    chosen = {split: _in_turn(images, wishes.seed) for split, images in chosen.items()}
    data = DataSet(
        shape=Shape(files.channels, *files.size, len(files.classes)),
        train=len(chosen["train"]),
        validation=len(chosen["validation"]),
        test=len(chosen["test"]),
        licence=wishes.licence,
        eps=eps,
        classes=files.classes,
        split=_spoken(files.parts, wishes),
        megabytes=1 + sum(map(len, chosen.values())) * files.channels * files.size[0] * files.size[1] // 10**6,
        origin=Origin(dataset=name, added=paths),
    )
    place(replace(data, decode=lambda origin, folder, part: _decoded(chosen, part)), data_dir, progress)
    return data


def remove(name: str, data_dir: str | Path | None = None) -> None:
    """Remove a user's data set from the data folder; the files from which it was added stay.

    Raises:
        InputError: there is no such data set, it is built in, or its files cannot be removed.
    """
    own = [known for known in data_set_names(data_dir) if known not in DATASETS]
    if name not in own:
        law = "a data set that is removed must be one that was added"
        raise InputError(f"{law} ({', '.join(own) or 'none is'}), but is {name!r}{meant(name, own)}")
    _, home = roots(data_dir)
    with lock(home / f".{name}.lock"):
        for folder in decoded_folders(name, data_dir):
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                raise InputError(f"data that are removed must lie where one may write, but {folder} cannot be removed")
    (home / f".{name}.lock").unlink(missing_ok=True)


def repeated(name: str, data_dir: str | Path | None = None) -> str:
    """Return a warning where images are in two splits, pixel for pixel; else nothing."""
    folder = ensure(name, data_dir)
    x_NCHW, x_test_NCHW = (np.load(folder / f"x_{part}.npy", mmap_mode="r") for part in PARTS)
    train = find_data_set(name, data_dir).train
    first, second, last = ([hash(x.tobytes()) for x in part] for part in (x_NCHW[:train], x_NCHW[train:], x_test_NCHW))
    known, judged = set(first), set(second)
    counts = {
        "validation and test are in train": sum(image in known for image in (*second, *last)),
        "test are in validation": sum(image in judged and image not in known for image in last),
    }
    law = ", and ".join(f"{count} of the images of {where} too" for where, count in counts.items() if count)
    remedy = "which flatters every figure: keep copies in one split (--group), or take them out"
    return f"warning: {law}, {remedy}" if law else ""


def _new(name: str, data_dir: str | Path | None) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise InputError(f"a data set's name must be letters, digits, '.', '_' and '-', but is {name!r}")
    if name in DATASETS:
        raise InputError(f"a data set's name must be new, but {name!r} is built in")
    if name in data_set_names(data_dir):
        raise InputError(
            f"a data set's name must be new, but {name!r} was added before: choose another, or "
            f"python launch.py data remove {name}"
        )


def _eps(text: str | float) -> float:
    eps = as_written(text)
    if not isinstance(eps, int | float) or not 0 < eps <= 1:
        hint = of_255(eps) if isinstance(eps, int | float) else ""
        law = "eps must be a number or a fraction in (0, 1], in pixel units of [0, 1]"
        raise InputError(f"{law}, but is {text!r}{hint}")
    return float(eps)


def _size(text: str | None) -> Size | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 1 <= int(side) <= 4096 for side in sides):
        raise InputError(f"size must be SIDE or HEIGHTxWIDTH, each from 1 to 4096 pixels, but is {text!r}")
    return int(sides[0]), int(sides[-1])


def _pattern(group: str | None) -> re.Pattern[str] | None:
    try:
        return None if group is None else re.compile(group)
    except re.error as error:
        raise InputError(f"group must be a regular expression, but {group!r}: {error}") from None


def _divided(
    images: Labelled, lacking: Sequence[str], pattern: re.Pattern[str] | None, seed: int, classes: Sequence[str]
) -> dict[str, NDArray[np.int64]]:
    """Return the places of the images of each split in `lacking`, and of the rest under "".

    Whole groups are drawn, class by class (a group counts to the class of its first image), until a split has its
    share of the class.
    """
    groups_N, random = _groups(images, pattern), np.random.default_rng(seed)
    _, first, of_N = np.unique(groups_N, return_index=True, return_inverse=True)
    drawn, sizes = np.full(len(first), "", dtype=object), np.bincount(of_N)
    for k, name in enumerate(classes if lacking else ()):
        mine = random.permutation(np.flatnonzero(images.y_N[first] == k))
        if 0 < len(mine) <= len(lacking):
            what = "images" if pattern is None else "groups"
            law = f"a class must have at least {len(lacking) + 1} {what}, to have one in each split"
            raise InputError(f"{law}, but {name} has {len(mine)}")
        left = list(mine)
        for kept, split in zip(range(len(lacking), 0, -1), lacking, strict=True):  # groups that the others still need
            while len(left) > kept and sizes[mine[drawn[mine] == split]].sum() < SHARE * sizes[mine].sum():
                drawn[left.pop()] = split
    return {split: np.flatnonzero(drawn[of_N] == split) for split in (*lacking, "")}


def _groups(images: Labelled, pattern: re.Pattern[str] | None) -> NDArray[np.str_] | NDArray[np.int64]:
    """Return the group of each image; without a pattern each is one of its own."""
    if pattern is None:
        return np.arange(len(images.y_N))
    found = [pattern.search(name) for name in images.names]
    for name, match in zip(images.names, found, strict=True):
        if match is None:
            what = f"the file name {name!r}" if name else "an array, which has no file names"
            raise InputError(f"group must match every file name, but {pattern.pattern!r} does not match {what}")
    return np.array([match[match.lastindex and 1 or 0] for match in found if match])


def _complete(chosen: Mapping[str, Chosen], classes: Sequence[str]) -> None:
    for split, images in chosen.items():
        held = {int(files.y_N[i]) for files, i in images}
        if missing := [name for k, name in enumerate(classes) if k not in held]:
            law = "every class must have an image in every split" + ", and labels count from 0" * (missing[0] == "0")
            raise InputError(f"{law}, but {split} has none of {missing[0]!r}")
    if (count := len(chosen["validation"])) < LEAST:
        raise InputError(f"validation must have at least {LEAST} images, but has {count}: add more images")


def _in_turn(images: Chosen, seed: int) -> Chosen:
    """Return the images in an order by the seed in which any first N have the classes in about their proportions."""
    y_N = np.array([files.y_N[i] for files, i in images])
    random, when_N = np.random.default_rng(seed), np.empty(len(y_N))
    for k in np.unique(y_N):
        mine = np.flatnonzero(y_N == k)
        when_N[random.permutation(mine)] = (np.arange(len(mine)) + random.random()) / len(mine)
    return [images[i] for i in np.argsort(when_N, kind="stable")]


def _decoded(chosen: Mapping[str, Chosen], part: Part) -> Decoded:
    images = chosen["test"] if part == "test" else chosen["train"] + chosen["validation"]
    y_N = np.array([files.y_N[i] for files, i in images], np.uint8)
    return Decoded(y_N, _blocks(images), train=None if part == "test" else len(chosen["train"]))


def _blocks(images: Chosen) -> Iterator[Pixels]:
    for start in range(0, len(images), BLOCK):
        yield np.stack([files.read(i) for files, i in images[start : start + BLOCK]])


def _spoken(parts: Mapping[str, Labelled], wishes: Wishes) -> str:
    drawn = [split for split in SPLITS[1:] if split not in parts]
    if not drawn:
        return "as its owner split it"
    grouped = f", the same match of {wishes.group!r} in one split" if wishes.group else ""
    return f"{' and '.join(drawn)} drawn by class, {SHARE:.0%} each, seed {wishes.seed}{grouped}"
