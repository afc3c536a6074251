"""A user's own data and classifiers: real digits as picture files, and a small network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from search.classifiers.training import train
from search.data import adding

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


FILE = """from torch import nn

def net():
    features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(128, 3))
"""
"""The file of a user's classifier of 8 x 8 grey images in three classes."""


@cache
def trained() -> nn.Module:
    """Return the network of `FILE`, trained on 8 x 8 pictures of the three digits."""
    found: dict[str, Callable[[], nn.Module]] = {}
    exec(FILE, found)
    x_NHW, y_N = digits()
    order = np.argsort(np.argsort(NAMES))  # classes are numbered in the order of their folders' names
    network = found["net"]()
    train(network, torch.tensor(x_NHW)[:, None] / 255, torch.tensor(order[y_N]), epochs=6, seed=0)
    return network.eval()


def data_with_classifier(folder: Path, data_dir: Path | None = None) -> None:
    """Write pictures and the files of a classifier, and add the data set `leaves`."""
    files(folder)
    adding.add("leaves", [folder / "pictures"], data_dir=data_dir)


def files(folder: Path) -> None:
    """Write pictures, and the files of a classifier of them, net.py and net.pt."""
    folder_of(folder / "pictures")
    written(folder / "net.py", FILE)
    torch.save(trained().state_dict(), folder / "net.pt")


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
