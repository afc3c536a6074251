"""Decoders for the official files of each data set. Shapes: N images, C channels, H x W pixels."""

from __future__ import annotations

import io
import itertools
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from search.data.archives import BROKEN_PICTURE, line, read
from search.data.official_files import Origin
from search.exceptions import AlteredFile

Pixels = NDArray[np.uint8]
Part = Literal["train", "test"]
PARTS: tuple[Part, ...] = ("train", "test")
BLOCK = 1_000
"""Number of images decoded at a time, so that a large data set is never completely in memory."""


@dataclass(frozen=True)
class Decoded:
    """One part of a data set; the official training part holds the train split followed by the validation split.

    Args:
        y_N: the labels.
        blocks: the images x_NCHW, block by block.
        train: how many images of the training part are for training, if the files define it.
    """

    y_N: Pixels
    blocks: Iterable[Pixels]
    train: int | None = None


def decode_idx(origin: Origin, folder: Path, part: Part) -> Decoded:
    """Read MNIST's format: big-endian sizes followed by the values."""
    prefix = "train" if part == "train" else "t10k"
    images, labels = (f"{prefix}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    content = read(folder, images, origin.files[images])
    height, width = np.frombuffer(content, ">u4", count=2, offset=8)
    x_NCHW = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 1, height, width)
    return Decoded(np.frombuffer(read(folder, labels, origin.files[labels]), np.uint8, offset=8), [x_NCHW])


def decode_cifar(origin: Origin, folder: Path, part: Part) -> Decoded:
    """Read CIFAR-10's format: for each image a label and its R, G and B planes."""
    names = [name for name in origin.files if name.startswith("test") == (part == "test")]
    rows = [np.frombuffer(read(folder, n, origin.files[n]), np.uint8).reshape(-1, 3073) for n in names]
    return Decoded(np.concatenate([row[:, 0] for row in rows]), [row[:, 1:].reshape(-1, 3, 32, 32) for row in rows])


def decode_svhn(origin: Origin, folder: Path, part: Part) -> Decoded:
    """Read SVHN's two files."""
    x_NCHW, y_N = _matlab(origin, folder, f"{part}_32x32.mat")
    return Decoded(y_N, _blocks(x_NCHW))


def decode_svhn_block(origin: Origin, folder: Path, part: Part, *, test: int) -> Decoded:
    """Read the single file, whose last `test` images are the test part.

    Neighbouring images come from one photograph, so the parts are contiguous blocks, not random samples.
    """
    x_NCHW, y_N = _matlab(origin, folder, next(iter(origin.files)))
    chosen = slice(-test, None) if part == "test" else slice(-test)
    return Decoded(y_N[chosen], _blocks(x_NCHW[chosen]))


def decode_coil(origin: Origin, folder: Path, part: Part, *, test_angle: int) -> Decoded:
    """Read COIL-100's pictures of objects on a turntable; those from `test_angle` degrees on are the test part.

    They are ordered by angle, with all objects at each angle: so the first images contain every class, and train,
    validation and test are contiguous blocks, since neighbouring angles look alike.
    """
    archive = zipfile.ZipFile(io.BytesIO(read(folder, "coil-100.zip", origin.files["coil-100.zip"])))
    found = (re.fullmatch(r"coil-100/obj(\d+)__(\d+)\.png", name) for name in archive.namelist())
    pictures = sorted((int(match[2]), int(match[1]), match[0]) for match in found if match)
    chosen = [(k - 1, name) for angle, k, name in pictures if (angle >= test_angle) == (part == "test")]
    planes = (_planes(Image.open(io.BytesIO(archive.read(name)))) for _, name in chosen)
    return Decoded(np.array([k for k, _ in chosen], np.uint8), _stacked(planes))


FACE = (178, 218)
CROP = (35, 55, 143, 163)
"""The central square of 108 x 108 pixels, which Defense-GAN (kabkabm/defensegan) resizes to 64 x 64."""


def decode_celeba(origin: Origin, folder: Path, part: Part) -> Decoded:
    """Read CelebA's aligned faces and their attribute Male.

    The official partition file defines train, validation and test. Without it they are the first 80 %, the next 10 %
    and the last 10 % of the images, in contiguous blocks because the same people recur.

    Raises:
        AlteredFile: a file is not in the official format.
    """
    names, male_N = _attribute(folder / "list_attr_celeba.txt", "Male")
    split_N = _partition(folder / "list_eval_partition.txt", names)
    if set(split_N) != {0, 1, 2}:
        raise AlteredFile(
            f"train, validation and test must each have an image, but not so the {len(names)} of {folder}"
        )
    wanted = (2,) if part == "test" else (0, 1)
    chosen_N = np.concatenate([np.flatnonzero(split_N == split) for split in wanted])
    faces = (_face(folder / "img_align_celeba" / names[i]) for i in chosen_N)
    return Decoded(male_N[chosen_N], _stacked(faces), train=int((split_N == 0).sum()))


def _matlab(origin: Origin, folder: Path, name: str) -> tuple[Pixels, Pixels]:
    """Read SVHN's format: X of 32 x 32 x 3 x N and y of N x 1, where label 10 is the digit 0."""
    from scipy.io import loadmat  # slow to import, and only a fetch needs it

    found = loadmat(io.BytesIO(read(folder, name, origin.files[name])))
    return found["X"].transpose(3, 2, 0, 1), (found["y"][:, 0] % 10).astype(np.uint8)


def _blocks(x_NCHW: Pixels) -> Iterator[Pixels]:
    return (x_NCHW[i : i + BLOCK] for i in range(0, len(x_NCHW), BLOCK))


def _stacked(images: Iterator[Pixels]) -> Iterator[Pixels]:
    while block := list(itertools.islice(images, BLOCK)):
        yield np.stack(block)


def _planes(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _face(path: Path) -> Pixels:
    try:
        with Image.open(path) as image:
            if image.size != FACE:
                raise AlteredFile(f"{path} must have 178 x 218 pixels, but has {image.width} x {image.height}")
            return _planes(image.crop(CROP).resize((64, 64), Image.Resampling.BILINEAR))
    except BROKEN_PICTURE as error:
        if isinstance(error, AlteredFile):
            raise
        raise AlteredFile(f"{path} must be a picture, but reading it fails: {line(error)}") from error


def _attribute(path: Path, name: str) -> tuple[list[str], Pixels]:
    """Return the names of the images, and for each whether it has the attribute."""
    try:
        _, header, *rows = path.read_text(encoding="utf-8").splitlines()
        column = 1 + header.split().index(name)
        cells = [row.split() for row in rows]
        return [row[0] for row in cells], np.array([int(row[column]) > 0 for row in cells], np.uint8)
    except (LookupError, ValueError) as error:
        raise AlteredFile(
            f"{path} must have a count, the names of the attributes and a row for each image, but: {line(error)}"
        ) from error


def _partition(path: Path, names: Sequence[str]) -> NDArray[np.int64]:
    """Return the split of each image: 0 is train, 1 validation, 2 test."""
    if not path.exists():
        tenths_N = 10 * np.arange(len(names)) // max(len(names), 1)
        return np.maximum(tenths_N - 7, 0)
    try:
        split = dict(row.split() for row in path.read_text(encoding="utf-8").splitlines())
        return np.array([int(split[name]) for name in names])
    except (LookupError, ValueError) as error:
        raise AlteredFile(f"{path} must have a row NAME 0, 1 or 2 for each image, but: {line(error)}") from error
