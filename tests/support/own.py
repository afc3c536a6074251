"""A user's own data and classifiers: real digits as picture files, and a small network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "four")
CLASSES = (0, 1, 4)


def digits(count: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return real digits of three classes as x_NHW uint8 with labels 0 to 2, at most `count` of each."""
    found = load_digits()
    chosen = np.concatenate([np.flatnonzero(found.target == digit)[:count] for digit in CLASSES])
    x_NHW = np.rint(found.images[chosen] * 255 / 16).astype(np.uint8)
    return x_NHW, np.searchsorted(CLASSES, found.target[chosen]).astype(np.int64)


def folder_of(
    path: Path, count: int | None = 40, parts: Sequence[str] = ("",), side: int = 8, mode: str = "L", copies: int = 1
) -> Path:
    """Write digits as pictures, a subfolder for each class; below each of `parts` where there are some.

    Args:
        copies: so many files show the same image; their names begin with the same word, `d3_`.
    """
    x_NHW, y_N = digits(count)
    for k, name in enumerate(NAMES):
        for part, images in zip(parts, np.array_split(x_NHW[y_N == k], len(parts)), strict=True):
            (path / part / name).mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images):
                for copy in range(copies):
                    picture = Image.fromarray(image).resize((side, side)).convert(mode)
                    picture.save(path / part / name / f"d{i}_{copy}.png")
    return path
