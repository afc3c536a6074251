"""The labelled images that a model is audited on: of a data set's validation split, or a user's own.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attacks.audit.probes import PROBES
from search.auditing.source import one_line, sha256
from search.data import guard, splits
from search.data.registry import data_set_names, find_data_set
from spaces.exceptions import InputError, choose

USUAL = 200
"""Number of images that are attacked, if there are as many and no other number was asked for."""
CHANNELS = 1, 3, 4
LAW = "images must be uint8, or floats in [0, 1], N x C x H x W, N x H x W x C or N x H x W"


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images x_NCHW in [0, 1] and y_N, of which the first are attacked, and where they come from.

    Args:
        attackable: how many may be attacked, the first ones; from the others a black-box attacker starts.
        classes: number of classes; None: not known.
    """

    x_NCHW: Tensor
    y_N: Tensor
    attackable: int
    name: str
    split: str
    licence: str
    sha256: str
    classes: int | None = None

    def first(self, count: int | None) -> tuple[Tensor, Tensor]:
        """Return the images to attack.

        Raises:
            InputError: there are not so many, or they are too few for the checks.
        """
        wanted = min(USUAL, self.attackable) if count is None else count
        if not PROBES <= wanted <= self.attackable:
            raise InputError(
                f"images must be from {PROBES}, as many as most checks ask about, to {self.attackable} of {self.name}, "
                f"but is {wanted}"
            )
        return self.x_NCHW[:wanted], self.y_N[:wanted]


def images(data: str, knowledge: str, data_dir: str | None = None) -> Images:
    """Return the images of a data set, or of a file FILE.npz.

    Raises:
        InputError: there is no such data set or file, or it does not hold labelled images.
    """
    if data.endswith(".npz"):
        return _of_file(Path(data), knowledge)
    choose("the data, unless they are a file FILE.npz,", data, data_set_names(data_dir))
    found = find_data_set(data, data_dir)
    x_NCHW, y_N = splits.load(data, "validation", data_dir)
    return Images(
        x_NCHW=x_NCHW,
        y_N=y_N,
        attackable=splits.sizes(data, data_dir).attackable(knowledge),
        name=data,
        split=f"validation: {found.split}, never test",
        licence=found.licence,
        sha256=splits.checksum(data, data_dir),
        classes=found.shape.classes,
    )


def _of_file(path: Path, knowledge: str) -> Images:
    """Return the images of a file in a fixed order, since many files are sorted by class."""
    law = f"{path} must be an .npz with arrays x and y, or x_test and y_test"
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise InputError(f"{law}, but is an .npy, which has one")
        with found as arrays:
            pair = next((pair for pair in (("x", "y"), ("x_test", "y_test")) if set(pair) <= set(arrays.files)), None)
            if pair is None:
                raise InputError(f"{law}, but has {', '.join(arrays.files) or 'none'}")
            x, y = (arrays[name] for name in pair)
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{law}, but cannot be read: {one_line(error)}") from None
    guard.watch(path)
    x_NCHW, y_N = labelled(x, y)
    order_N = torch.randperm(len(y_N), generator=torch.Generator().manual_seed(0))
    kept = min(splits.HELD_OUT, len(y_N) // 4) if knowledge == "black-box" else 0
    return Images(
        x_NCHW=x_NCHW[order_N],
        y_N=y_N[order_N],
        attackable=len(y_N) - kept,
        name=path.name,
        split=f"{pair[0]} and {pair[1]} of the file, in an order drawn with seed 0",
        licence="not known",
        sha256=sha256(path),
    )


def labelled(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Return images as x_NCHW, float32 in [0, 1], and labels as y_N, int64.

    Args:
        x: uint8 or float, N x C x H x W, N x H x W x C or N x H x W.
        y: integers, N or N x 1.

    Raises:
        InputError: they are none.
    """
    x, y = _tensor(LAW, x), _tensor("labels must be integers, one for each image", y)
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise InputError(f"{LAW}, but are {x.dtype}")
    x_NCHW = _channels_first(x).float() / (255 if x.dtype == torch.uint8 else 1)
    y_N = y.flatten() if y.ndim == 2 and y.shape[1] == 1 else y
    if y_N.ndim != 1 or len(y_N) != len(x) or y_N.is_floating_point() or y_N.dtype == torch.bool:
        shape = " x ".join(map(str, y.shape))
        raise InputError(f"labels must be {len(x)} integers, one for each image, but are {shape} of {y.dtype}")
    y_N = y_N.long()
    if len(y_N) and int(y_N.min()) < 0:
        raise InputError(f"labels must be classes from 0 on, but one is {int(y_N.min())}")
    low, high = (float(edge) for edge in x_NCHW.aminmax()) if x.numel() else (0.0, 0.0)
    if not (x.numel() and low >= 0 and high <= 1):
        raise InputError(f"{LAW}, but {f'go from {low:g} to {high:g}' if x.numel() else 'there are none'}")
    return x_NCHW.contiguous(), y_N


def _tensor(law: str, value: Any) -> Tensor:
    """Return an array as a tensor: torch has fewer integers and floats than NumPy, and one order of bytes.

    Raises:
        InputError: it does not hold numbers, with the law that says what it must hold.
    """
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
    except ValueError:
        raise InputError(f"{law}, but are lists of different lengths") from None
    wide = {"u": np.int64, "i": np.int64, "f": np.float32, "b": np.bool_}.get(array.dtype.kind)
    if wide is None:
        raise InputError(f"{law}, but are of NumPy's type {array.dtype}")
    return torch.as_tensor(array.astype(np.uint8 if array.dtype == np.uint8 else wide, order="C", copy=False))


def _channels_first(x: Tensor) -> Tensor:
    """Return the images in the order N x C x H x W; where it might be either, they are in it."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim != 4:
        raise InputError(f"{LAW}, but are {' x '.join(map(str, x.shape)) or 'a scalar'}")
    last = x.shape[3] in CHANNELS and x.shape[1] not in CHANNELS
    return x.permute(0, 3, 1, 2) if last else x
