"""Reads the files of a user's data: a folder of images, an .npz, or two .npy.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from search.data.archives import BROKEN_PICTURE, line
from search.data.decoders import Pixels
from spaces.exceptions import InputError

PARTS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}
"""The split that a subfolder, or the end of an array's name, stands for."""
FEW = 3  # broken pictures that are named besides the first
UNREADABLE = (*BROKEN_PICTURE, Image.DecompressionBombError)
GREY, COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV")
"""Pillow's modes with 8 bits or fewer; transparency is dropped."""
MOST_CLASSES = 256
Size = tuple[int, int]
"""Height and width, in pixels."""


@dataclass(frozen=True)
class Labelled:
    """The images of one split; each is decoded when it is asked for.

    Args:
        y_N: their labels.
        names: of their files, below the user's folder; "" where they have none.
        read: returns image i as C x H x W.
    """

    y_N: NDArray[np.int64]
    names: Sequence[str]
    read: Callable[[int], Pixels]


@dataclass(frozen=True)
class UserFiles:
    """A user's data: `parts` has the splits that the user made, train always."""

    parts: Mapping[str, Labelled]
    classes: tuple[str, ...]
    channels: int
    size: Size


def read_files(paths: Sequence[Path], size: Size | None) -> UserFiles:
    """Read a folder, an .npz, or an .npy of images and one of labels.

    Args:
        size: resize all images to it; None: they must all have one size.

    Raises:
        InputError: they cannot be read as such.
    """
    for path in paths:
        if not path.exists():
            raise InputError(f"the data must be a folder, an .npz or two .npy, but {path} does not exist")
    kinds = ["folder" if path.is_dir() else path.suffix.lower() for path in paths]
    if kinds == ["folder"]:
        return _folder(paths[0], size)
    if kinds == [".npz"]:
        return _arrays(_npz(paths[0]), paths[0], size)
    if kinds == [".npy", ".npy"]:
        arrays = {name: _opened(path) for name, path in zip(("x_train", "y_train"), paths, strict=True)}
        return _arrays(arrays, paths[0], size)
    law = "the data must be a folder of images, an .npz with x_train and y_train, or two .npy (images, labels)"
    raise InputError(f"{law}, but are {', '.join(map(str, paths))}")


# A folder: a class is a subfolder, as torchvision's ImageFolder has it; perhaps train/, validation/ and test/ above.


def left_out(path: Path) -> list[str]:
    """Return the files of a folder of images that are no pictures by their names, or are in no class."""
    used = {picture for part in _parts(path).values() for each in _pictures(part).values() for picture in each}
    return sorted(str(file.relative_to(path)) for file in _visible(path) if file not in used)


def _folder(path: Path, size: Size | None) -> UserFiles:
    found = {part: _pictures(folder) for part, folder in _parts(path).items()}
    classes = sorted({name for pictures in found.values() for name in pictures})
    if not classes:
        raise InputError(f"a folder of images must have a subfolder for each class, but {path} has none")
    every = [picture for pictures in found.values() for each in pictures.values() for picture in each]
    channels, own = _headers(every, size)
    parts = {}
    for part, pictures in found.items():
        files = [file for each in pictures.values() for file in each]
        y_N = np.array([classes.index(name) for name, each in pictures.items() for _ in each], np.int64)
        names = [str(file.relative_to(path)) for file in files]
        parts[part] = Labelled(y_N, names, partial(_picture, files, every, channels, size))
    return UserFiles(parts, tuple(classes), channels, own)


def _parts(path: Path) -> dict[str, Path]:
    """Return the folder of each split that the user made; of train alone if there is no train/."""
    above = {each.name: each for each in _subfolders(path)}
    if "train" not in above:
        return {"train": path}
    parts = {PARTS[name]: folder for name, folder in above.items() if name in PARTS}
    if len(parts) < len(above):  # a split under two names would lose one of them
        law = "beside train/ there must be nothing but validation/ and test/"
        raise InputError(f"{law}, but {path} has {', '.join(sorted(set(above) - {'train'}))}")
    return parts


def _subfolders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))


def _pictures(folder: Path) -> dict[str, list[Path]]:
    """Return the picture files of each class, sorted; other files are ignored (`left_out`)."""
    return {
        each.name: sorted(p for p in _visible(each) if p.suffix.lower() in Image.registered_extensions())
        for each in _subfolders(folder)
    }


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def _headers(files: Sequence[Path], size: Size | None) -> tuple[int, Size]:
    """Return the channels and the size of all pictures; only their headers are read.

    Raises:
        InputError: a picture is broken or has 16 bits, or the sizes differ without `size`.
    """
    channels, first, broken = 1, None, dict[Path, InputError]()
    for file in files:
        try:
            with _opened_picture(file) as image:
                mode, own = image.mode, (image.height, image.width)
        except InputError as error:
            broken[file] = error
            continue
        if mode not in (*GREY, *COLOUR):
            raise InputError(f"an image must have 8 bits for each colour, but {file} is of Pillow's mode {mode}")
        channels = 3 if mode in COLOUR else channels
        first = first or own
        if size is None and own != first:
            law = "images must have one size, or be resized by --size"
            raise InputError(f"{law}, but {files[0]} has {_spoken(first)} pixels and {file} {_spoken(own)}")
    if broken:
        raise _unreadable(broken, len(files))
    if first is None:
        raise InputError(f"a class must have images ({', '.join(sorted(Image.registered_extensions())[:4])}, ...)")
    return channels, size or first


@contextmanager
def _opened_picture(file: Path) -> Iterator[Image.Image]:
    """Yield a picture, whose pixels are read when they are asked for; an InputError says why they cannot be."""
    try:
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError:  # whose message is the path again
        raise InputError(f"{file} must be a picture, but its content is none") from None
    except UNREADABLE as error:
        raise InputError(f"{file} must be a picture, but reading it fails: {line(error)}") from None


def _unreadable(broken: Mapping[Path, InputError], of: int) -> InputError:
    """Return the error of the first broken picture, with how many others there are and the first few of them."""
    first, *others = broken
    if not others:
        return broken[first]
    named = ", ".join(f"{file.parent.name}/{file.name}" for file in others[:FEW]) + ", ..." * (len(others) > FEW)
    return InputError(f"{broken[first]}; {len(others)} more of {of:,} cannot be read either: {named}")


def _picture(files: Sequence[Path], every: Sequence[Path], channels: int, size: Size | None, i: int) -> Pixels:
    """Return a picture as C x H x W; if it is broken, look `every` over, so that all are named at once."""
    try:
        with _opened_picture(files[i]) as image:
            return _planes(image.convert("RGB" if channels == 3 else "L"), size)
    except InputError as error:
        raise _unreadable({files[i]: error, **dict(_broken(every))}, len(every)) from None


def _broken(files: Sequence[Path]) -> Iterator[tuple[Path, InputError]]:
    for file in files:
        try:
            with _opened_picture(file) as image:
                image.load()
        except InputError as error:
            yield file, error


def _planes(image: Image.Image, size: Size | None) -> Pixels:
    """Return an image as C x H x W."""
    if size is not None and size != (image.height, image.width):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _npz(path: Path) -> dict[str, NDArray[Any]]:
    archive = _opened(path)
    try:
        return {name: archive[name] for name in archive.files}
    except Exception as error:  # as below
        raise InputError(f"{path} must hold arrays of numbers, but reading it fails: {line(error)}") from None


def _opened(path: Path) -> Any:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)  # of an .npz NumPy takes no notice of it
        if path.suffix.lower() != (kind := ".npy" if isinstance(found, np.ndarray) else ".npz"):
            raise ValueError(f"its content is that of an {kind}")
        return found
    except Exception as error:  # zipfile.BadZipFile, zlib.error: NumPy documents none of them
        raise InputError(f"{path} must be a whole NumPy file without pickles, but: {line(error)}") from None


def _arrays(arrays: Mapping[str, NDArray[Any]], path: Path, size: Size | None) -> UserFiles:
    ends = [end for name in arrays for end in [name.removeprefix("x_")] if end in PARTS and name != end]
    named = {PARTS[end]: end for end in ends}
    if "train" not in named or len(named) < len(ends) or any(f"y_{end}" not in arrays for end in named.values()):
        law = "an .npz must hold x_train and y_train, and the same with _test and _validation where you split them"
        raise InputError(f"{law}, but {path} holds {', '.join(arrays)}")
    images = {part: _images(arrays[f"x_{end}"], f"x_{end} of {path}") for part, end in named.items()}
    shapes = {part: x_NHWC.shape[1:] for part, x_NHWC in images.items()}
    channels = {shape[2] for shape in shapes.values()}
    if len(channels) > 1 or (size is None and len(set(shapes.values())) > 1):
        law = "the images of all splits must have one shape, or be resized by --size"
        raise InputError(f"{law}, but are {', '.join(f'{name} {shape}' for name, shape in shapes.items())} (HWC)")
    labels = {part: _labels(arrays[f"y_{end}"], len(images[part]), f"y_{end}") for part, end in named.items()}
    classes = _classes(arrays, labels)
    parts = {
        part: Labelled(labels[part], [""] * len(x_NHWC), partial(_row, x_NHWC, size)) for part, x_NHWC in images.items()
    }
    return UserFiles(parts, classes, channels.pop(), size or shapes["train"][:2])


def _images(x: NDArray[Any], name: str) -> NDArray[Any]:
    """Return images as N x H x W x C.

    Raises:
        InputError: they have another type or shape, or pixels outside [0, 1].
    """
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise InputError(f"images must be uint8, or float in [0, 1], but {name} is {x.dtype}")
    shape = " x ".join(map(str, x.shape))
    if x.ndim == 3:
        x = x[..., None]
    elif x.ndim != 4 or (x.shape[1] in (1, 3)) == (x.shape[3] in (1, 3)):
        law = "images must be N x H x W, or N x C x H x W or N x H x W x C with 1 or 3 channels C"
        raise InputError(f"{law}, but {name} is {shape}")
    elif x.shape[1] in (1, 3):
        x = x.transpose(0, 2, 3, 1)
    if not x.size:
        raise InputError(f"{name} must have images, but is {shape}")
    if x.dtype != np.uint8 and not (x.min() >= 0 and x.max() <= 1):  # also true for NaN
        raise InputError(f"images must be uint8, or float in [0, 1], but {name} goes from {x.min():g} to {x.max():g}")
    return x


def _labels(y: NDArray[Any], images: int, name: str) -> NDArray[np.int64]:
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.shape != (images,) or y.dtype.kind not in "iu":
        law = f"labels must be {images} whole numbers, one for each image"
        raise InputError(f"{law}, but {name} is {' x '.join(map(str, y.shape)) or 'a scalar'}, {y.dtype}")
    return np.asarray(y, np.int64)


def _classes(arrays: Mapping[str, NDArray[Any]], labels: Mapping[str, NDArray[np.int64]]) -> tuple[str, ...]:
    """Return the names of the classes: the array `classes`, else the numbers up to the largest label of train."""
    count = int(labels["train"].max()) + 1
    names = [str(name) for name in arrays["classes"]] if "classes" in arrays else [str(k) for k in range(count)]
    for part, y_N in labels.items():
        for worst in (int(y_N.min()), int(y_N.max())):
            if not 0 <= worst < len(names):
                law = f"labels must be from 0 to {len(names) - 1}, for the {len(names)} classes of train"
                raise InputError(f"{law}, but y_{part} has {worst}")
    return tuple(names)


def _row(x_NHWC: NDArray[Any], size: Size | None, i: int) -> Pixels:
    pixels = np.asarray(x_NHWC[i])
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels * 255.0).astype(np.uint8)
    return _planes(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels)), size)


def _spoken(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
