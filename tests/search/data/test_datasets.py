"""SVHN, COIL-100 and CelebA: through the real decoding on small files that each test makes, in the official layouts.

With $CRUCIBLE_TEST_DATA, a folder laid out as a data folder, the real files that lie there are decoded too.
"""

from __future__ import annotations

import hashlib
import io
import os
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

from search.data import cache
from search.data.datasets import DATASETS, DataSet
from search.data.decoders import CROP, Pixels
from search.data.downloads import Official
from search.data.splits import check, checksum, fetch, load, open_test, sizes
from search.exceptions import AlteredFile, NoSource
from spaces.exceptions import InputError

SHARED = Path(os.environ.get("CRUCIBLE_TEST_DATA", "/nowhere"))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let no server answer, and keep the home cache out of it."""

    def refused(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refused)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def known(monkeypatch: pytest.MonkeyPatch, dataset: str, folder: Path, **fields: Any) -> DataSet:
    """Let the files in `folder` be a data set's official ones."""
    data = DATASETS[dataset]
    files = {name: digest_like(old, (folder / name).read_bytes()) for name, old in data.origin.files.items()}
    data = replace(data, origin=replace(data.origin, files=files), **fields)
    monkeypatch.setitem(DATASETS, dataset, data)
    return data


def digest_like(old: str, content: bytes) -> str:
    """Return the digest of `content` in the notation of another."""
    md5 = old.startswith("md5:")
    return f"md5:{hashlib.md5(content).hexdigest()}" if md5 else hashlib.sha256(content).hexdigest()


def put_svhn(path: Path, images: int, seed: int = 0) -> tuple[Pixels, Pixels]:
    """Write SVHN's layout; return X and y as they stand in it."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (32, 32, 3, images), np.uint8)
    y = rng.permutation(np.arange(images, dtype=np.uint8) % 10 + 1)[:, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"X": x, "y": y}, do_compression=True)
    return x, y


def split(dataset: str, folder: Path) -> list[tuple[Pixels, list[int]]]:
    """Return the pixels and labels of train, validation and test."""
    parts = (load(dataset, "train", folder), load(dataset, "validation", folder), open_test(dataset, folder))
    return [((x_NCHW * 255).round().byte().numpy(), y_N.tolist()) for x_NCHW, y_N in parts]


@pytest.mark.parametrize("place", ["raw/svhn", "svhn"])
def test_svhn_is_decoded_from_the_two_official_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = tmp_path / place
    x, y = put_svhn(folder / "train_32x32.mat", 40)
    x_test, y_test = put_svhn(folder / "test_32x32.mat", 15, seed=1)
    assert all(digest.startswith("md5:") for digest in DATASETS["svhn"].origin.files.values())
    known(monkeypatch, "svhn", folder, train=36, validation=4, test=15)
    train, validation, test = split("svhn", tmp_path)
    assert sizes("svhn", tmp_path) == (36, 4, 15)
    for (x_NCHW, y_N), images, labels in (
        (train, x[..., :36], y[:36]),
        (validation, x[..., 36:], y[36:]),
        (test, x_test, y_test),
    ):
        assert np.array_equal(x_NCHW, np.moveaxis(images, (3, 2), (0, 1)))
        assert y_N == [0 if label == 10 else label for label in labels[:, 0].tolist()]
    assert check("svhn", tmp_path).state == "ready"


def test_the_splits_of_the_first_10000_are_contiguous_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = put_svhn(tmp_path / "svhn" / "test_32x32_first10000.mat", 2_500)
    known(monkeypatch, "svhn-10k", tmp_path / "svhn", train=1_000, validation=500)
    parts = split("svhn-10k", tmp_path)
    assert [len(y_N) for _, y_N in parts] == [1_000, 500, 1_000]
    assert np.array_equal(np.concatenate([x_NCHW for x_NCHW, _ in parts]), x.transpose(3, 2, 0, 1))
    assert np.array_equal(np.concatenate([y_N for _, y_N in parts]), y[:, 0] % 10)


def test_a_file_whose_md5_is_wrong_is_refused(tmp_path: Path) -> None:
    put_svhn(tmp_path / "svhn" / "train_32x32.mat", 3)
    with pytest.raises(AlteredFile, match="the MD5 of its content must be e26dedcc434d2e4c54c9b2d4a06d8373, but is"):
        fetch("svhn", tmp_path)
    assert check("svhn", tmp_path).state == "altered"


def put_coil(folder: Path, objects: int, angles: range) -> dict[tuple[int, int], Pixels]:
    """Write COIL-100's layout in a disorder; return the picture of each object and angle."""
    rng = np.random.default_rng(0)
    pictures = {(k, a): rng.integers(0, 256, (128, 128, 3), np.uint8) for a in angles for k in range(1, objects + 1)}
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "coil-100.zip", "w") as archive:
        archive.writestr("coil-100/convertGroupppm2png.pl", "no picture")
        for k, a in reversed(sorted(pictures)):
            with io.BytesIO() as file:
                Image.fromarray(pictures[k, a]).save(file, "png")
                archive.writestr(f"coil-100/obj{k}__{a}.png", file.getvalue())
    return pictures


def test_each_object_of_coil_has_neighbouring_angles_in_each_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = put_coil(tmp_path / "coil-100", 11, range(240, 360, 40))
    known(monkeypatch, "coil-100", tmp_path / "coil-100", train=11, validation=11, test=11)
    for (x_NCHW, y_N), angle in zip(split("coil-100", tmp_path), (240, 280, 320), strict=True):
        assert y_N == list(range(11))
        assert np.array_equal(x_NCHW, np.stack([pictures[k + 1, angle] for k in y_N]).transpose(0, 3, 1, 2))


def test_the_angles_of_coil_add_up_to_a_turn() -> None:
    data = DATASETS["coil-100"]
    angles = [range(0, 260, 5), range(260, 310, 5), range(310, 360, 5)]
    assert [100 * len(block) for block in angles] == [data.train, data.validation, data.test]
    assert data.train + data.validation + data.test == 7_200


def put_celeba(folder: Path, images: int, partition: str | None = None) -> list[int]:
    """Write CelebA's layout, each face red in the square that is kept; return who is male."""
    (folder / "img_align_celeba").mkdir(parents=True)
    male = [int(i % 3 == 0) for i in range(images)]
    left, top, right, bottom = CROP
    for i in range(images):
        picture = np.zeros((218, 178, 3), np.uint8)
        picture[top:bottom, left:right] = (200, 20 * (i % 10), 0)
        Image.fromarray(picture).save(folder / "img_align_celeba" / f"{i + 1:06}.jpg", quality=95)
    rows = [f"{i + 1:06}.jpg  1 {2 * one - 1:2d} -1" for i, one in enumerate(male)]
    (folder / "list_attr_celeba.txt").write_text("\n".join([f"{images}", "Bald Male Young ", *rows]) + "\n")
    if partition:
        lines = [f"{i + 1:06}.jpg {part}" for i, part in enumerate(partition)]
        (folder / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return male


@pytest.mark.parametrize(("partition", "train", "validation"), [(None, 8, 1), ("0000011222", 5, 2)])
def test_celeba_follows_its_partition_or_else_its_order(
    tmp_path: Path, partition: str | None, train: int, validation: int
) -> None:
    male = put_celeba(tmp_path / "celeba", 10, partition)
    assert sizes("celeba", tmp_path) == (162_770, 19_867, 19_962)
    parts = split("celeba", tmp_path)
    assert sizes("celeba", tmp_path) == (train, validation, 10 - train - validation)
    assert [len(y_N) for _, y_N in parts] == list(sizes("celeba", tmp_path))
    assert sum((y_N for _, y_N in parts), []) == male
    x_NCHW = np.concatenate([x_NCHW for x_NCHW, _ in parts]).astype(int)
    assert x_NCHW.shape == (10, 3, 64, 64)
    wanted_NC = np.array([(200, 20 * i, 0) for i in range(10)])
    assert np.abs(x_NCHW.mean((2, 3)) - wanted_NC).max() < 4  # as far as JPEG keeps it
    assert np.abs(x_NCHW[:, :, 2:-2, 2:-2].std((2, 3))).max() < 2


def test_a_partition_that_is_out_of_order_is_followed(tmp_path: Path) -> None:
    male = put_celeba(tmp_path / "celeba", 6, "201010")
    chosen = ([1, 3, 5], [2, 4], [0])
    for (x_NCHW, y_N), numbers in zip(split("celeba", tmp_path), chosen, strict=True):
        assert y_N == [male[i] for i in numbers]
        assert np.abs(x_NCHW[:, 1].mean((1, 2)) - 20 * np.array(numbers)).max() < 4


def test_the_check_of_celeba_says_that_no_digest_is_known(tmp_path: Path) -> None:
    put_celeba(tmp_path / "celeba", 10)
    assert "but not decoded: python launch.py data fetch celeba" in check("celeba", tmp_path).detail
    fetch("celeba", tmp_path)
    status = check("celeba", tmp_path)
    assert status.state == "ready" and "8 train, 1 validation, 1 test images" in status.detail
    assert "no digest of the official files is known" in status.detail
    assert len(checksum("celeba", tmp_path)) == 64


def spoil(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("img_align_celeba/000004.jpg", "no picture", "000004.jpg must be a picture, but reading it fails"),
        ("list_attr_celeba.txt", "", "a count, the names of the attributes and a row for each image"),
        ("list_attr_celeba.txt", "1\nBald Young\n000001.jpg 1 1\n", "'Male' is not in list"),
        ("list_attr_celeba.txt", "1\nBald Male\n000001.jpg 1\n", "list index out of range"),
        ("list_attr_celeba.txt", "1\nMale\n000001.jpg 1\n", "train, validation and test must each have an image"),
        ("list_eval_partition.txt", "000001.jpg 0\n", "must have a row NAME 0, 1 or 2 for each image"),
        ("list_eval_partition.txt", "000001.jpg\n", "must have a row NAME 0, 1 or 2 for each image"),
        ("list_eval_partition.txt", "".join(f"{i:06}.jpg 3\n" for i in range(1, 11)), "must each have an image"),
    ],
)
def test_a_celeba_that_is_not_in_the_official_layout_is_refused_in_one_line(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    put_celeba(tmp_path / "celeba", 10)
    spoil(tmp_path / "celeba", name, text)
    with pytest.raises(AlteredFile) as caught:
        fetch("celeba", tmp_path)
    assert words in str(caught.value) and str(tmp_path / "celeba") in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "decoded" / "celeba").exists()


def test_a_face_that_is_missing_or_of_another_size_is_named(tmp_path: Path) -> None:
    put_celeba(tmp_path / "celeba", 10)
    face = tmp_path / "celeba" / "img_align_celeba" / "000007.jpg"
    Image.new("RGB", (178, 178)).save(face)
    with pytest.raises(AlteredFile, match=r"000007.jpg must have 178 x 218 pixels, but has 178 x 178$"):
        fetch("celeba", tmp_path)
    face.unlink()
    with pytest.raises(AlteredFile, match="000007.jpg must be a picture, but .*No such file"):
        fetch("celeba", tmp_path)


@pytest.mark.parametrize(
    ("dataset", "reason", "files"),
    [
        ("celeba", "its licence forbids passing it on", "img_align_celeba, list_attr_celeba.txt"),
        ("svhn-10k", "being no official file", "test_32x32_first10000.mat"),
    ],
)
def test_what_cannot_be_downloaded_says_where_to_put_it(tmp_path: Path, dataset: str, reason: str, files: str) -> None:
    folder = tmp_path / "raw" / ("svhn" if dataset == "svhn-10k" else dataset)
    status = check(dataset, tmp_path)
    assert status.state == "absent" and reason in status.detail and "cannot be downloaded" in status.detail
    assert f"put {files}" in status.detail and f"into {folder}, then python launch.py data fetch" in status.detail
    with pytest.raises(NoSource) as caught:
        fetch(dataset, tmp_path)
    assert reason in str(caught.value) and f"put {files}" in str(caught.value) and f"into {folder}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_half_of_celeba_is_named(tmp_path: Path) -> None:
    (tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True)
    with pytest.raises(NoSource, match=r"celeba: no list_attr_celeba\.txt"):
        fetch("celeba", tmp_path)


@pytest.mark.parametrize("dataset", ["svhn", "coil-100"])
def test_what_can_be_downloaded_names_its_server_where_that_is_silent(tmp_path: Path, dataset: str) -> None:
    (source,) = DATASETS[dataset].origin.sources
    assert isinstance(source, Official)
    with pytest.raises(NoSource, match="no network here") as caught:
        fetch(dataset, tmp_path)
    assert source.folder in str(caught.value) and f"into {tmp_path}/raw/{dataset}" in str(caught.value)


def test_a_large_data_set_is_written_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_svhn(tmp_path / "svhn" / "test_32x32_first10000.mat", 3_500)
    known(monkeypatch, "svhn-10k", tmp_path / "svhn", train=2_000, validation=500)
    heard: list[tuple[str, int, int]] = []
    fetch("svhn-10k", tmp_path, lambda *progress: heard.append(progress))
    image = 3 * 32 * 32
    steps = [*((2_500, n) for n in (1_000, 2_000, 2_500)), (1_000, 1_000)]
    assert heard == [("decoding svhn-10k", n * image, total * image) for total, n in steps]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A data folder with the real files, whose cache goes with the test."""
    if not SHARED.is_dir():
        pytest.skip("$CRUCIBLE_TEST_DATA names no folder with real files")
    for path in SHARED.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_the_real_first_10000_of_svhn(shared: Path) -> None:
    found = loadmat(shared / "svhn" / "test_32x32_first10000.mat")
    parts = split("svhn-10k", shared)
    assert [len(y_N) for _, y_N in parts] == [8_000, 1_000, 1_000]
    for number in (0, 7_999, 8_000, 9_999):
        part, i = divmod(number, 8_000) if number < 8_000 else (1 + (number - 8_000) // 1_000, number % 1_000)
        assert np.array_equal(parts[part][0][i], found["X"][..., number].transpose(2, 0, 1))
        assert parts[part][1][i] == found["y"][number, 0] % 10
    assert all(set(y_N) == set(range(10)) for _, y_N in parts)
    assert check("svhn-10k", shared).state == "ready"


def test_the_real_coil_100(shared: Path) -> None:
    fetch("coil-100", shared)
    assert sizes("coil-100", shared) == (5_200, 1_000, 1_000)
    for part in (load("coil-100", "validation", shared), open_test("coil-100", shared)):
        assert part[0].shape == (1_000, 3, 128, 128) and part[1].bincount().tolist() == 100 * [10]
    x_NCHW, y_N = load("coil-100", "train", shared, limit=300)
    assert y_N.tolist() == 3 * list(range(100))
    with zipfile.ZipFile(shared / "coil-100" / "coil-100.zip") as archive:
        picture = np.asarray(Image.open(io.BytesIO(archive.read("coil-100/obj42__10.png"))))
    assert torch.equal((x_NCHW[241] * 255).round().byte(), torch.tensor(picture).permute(2, 0, 1))
    assert check("coil-100", shared).state == "ready"


def test_a_real_folder_that_must_not_be_written_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, shared: Path) -> None:
    if SHARED.stat().st_mode & 0o222:
        pytest.skip(f"{SHARED} may be written")
    before = sorted(SHARED.rglob("*"))
    with pytest.raises(InputError):
        fetch("celeba", SHARED)
    assert len(load("svhn-10k", "validation", SHARED, limit=10)[0]) == 10
    assert sorted(SHARED.rglob("*")) == before and cache.caches("svhn-10k", SHARED)[-1].exists()
