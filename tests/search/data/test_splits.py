"""Data sets and tasks on real data; what is damaged lies in a folder of the test's own."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import multiprocessing
import os
import shutil
import struct
import tarfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from search.classifiers.architectures import ARCHITECTURES, PARTNERS
from search.classifiers.task import TASKS, Task, find_task
from search.data import cache, splits
from search.data.datasets import DATASETS
from search.data.downloads import Folder, Npm, Official, Progress
from search.data.folders import data_folder
from search.data.official_files import Origin, gather
from search.data.splits import check, checksum, fetch, load, open_test, sizes

COUNTS = {
    "digits": (1_257, 180, 360, (1, 8, 8)),
    "mnist": (54_000, 6_000, 10_000, (1, 28, 28)),
    "fashion-mnist": (54_000, 6_000, 10_000, (1, 28, 28)),
    "cifar10": (45_000, 5_000, 10_000, (3, 32, 32)),
}
CHECKSUMS = {
    "digits": "9574b33fb757af729b0e4c47928a3f36de0e877f43f46fc021124abc4898b395",
    "mnist": "edc0d1098aa497be14ace79ddd5171e5a3dcf9c4d196c015389203eb3ba1f59b",
    "fashion-mnist": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
    "cifar10": "1e91790dbaf241617ca1f29a9aba08eb9a62df84cc90676b47edd05ad2ab3c94",
}
SLOW = ("fashion-mnist", "cifar10")
EVERY = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in COUNTS]
IDX = [name for name in EVERY if name.values != ("cifar10",)]


def read_idx(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read an IDX file again, apart from the code under test."""
    content = path.read_bytes()
    assert content[:3] == b"\0\0\x08"
    sizes = struct.unpack_from(f">{content[3]}I", content, 4)
    return np.frombuffer(content[4 + 4 * content[3] :], np.uint8).reshape(sizes)


@pytest.mark.parametrize("dataset", EVERY)
def test_splits_have_their_sizes_shapes_and_ranges(dataset: str) -> None:
    train, validation, test, shape = COUNTS[dataset]
    splits = (load(dataset, "train"), load(dataset, "validation"), open_test(dataset))
    for (x_NCHW, y_N), count in zip(splits, (train, validation, test), strict=True):
        assert x_NCHW.shape == (count, *shape) and y_N.shape == (count,)
        assert x_NCHW.dtype == torch.float32 and y_N.dtype == torch.int64
        assert x_NCHW.min() == 0 and x_NCHW.max() == 1
        assert y_N.unique().tolist() == list(range(10))
        assert y_N.bincount().min() > 0.07 * count and y_N.bincount().max() < 0.13 * count


@pytest.mark.parametrize("dataset", IDX)
def test_train_and_validation_are_the_official_training_set_in_order(dataset: str) -> None:
    x_NCHW, y_N = (torch.cat(pair) for pair in zip(load(dataset, "train"), load(dataset, "validation"), strict=True))
    raw = data_folder() / "raw" / dataset
    white = DATASETS[dataset].white
    assert np.array_equal((x_NCHW[:, 0] * white).round().byte().numpy(), read_idx(raw / "train-images-idx3-ubyte"))
    assert np.array_equal(y_N.numpy(), read_idx(raw / "train-labels-idx1-ubyte"))


@pytest.mark.parametrize("dataset", IDX)
def test_the_test_split_is_the_official_one(dataset: str) -> None:
    x_NCHW, y_N = open_test(dataset)
    raw = data_folder() / "raw" / dataset
    decoded = (x_NCHW[:, 0] * DATASETS[dataset].white).round().byte().numpy()
    assert np.array_equal(decoded, read_idx(raw / "t10k-images-idx3-ubyte"))
    assert np.array_equal(y_N.numpy(), read_idx(raw / "t10k-labels-idx1-ubyte"))


def test_digits_are_those_of_scikit_learn_in_order() -> None:
    from sklearn.datasets import load_digits

    x_NHW, y_N = load_digits(return_X_y=True)
    parts = (load("digits", "train"), load("digits", "validation"), open_test("digits"))
    assert np.array_equal(torch.cat([x for x, _ in parts]).flatten(1).numpy() * 16, x_NHW)
    assert np.array_equal(torch.cat([y for _, y in parts]).numpy(), y_N)


@pytest.mark.slow
def test_cifar10_is_bit_for_bit_the_official_one() -> None:
    load("cifar10", "train", limit=1)
    raw = data_folder() / "raw" / "cifar10"
    for name, sha1 in (("data_batch_1.bin", "aadd24ac"), ("test_batch.bin", "67eb016d")):
        assert hashlib.sha1((raw / name).read_bytes()).hexdigest().startswith(sha1)
    x_NCHW, y_N = load("cifar10", "validation")
    row = (raw / "data_batch_5.bin").read_bytes()[3073 * 9_999 :]
    pixels = [[[row[1 + 1024 * c + 32 * h + w] for w in range(32)] for h in range(32)] for c in range(3)]
    assert y_N[-1] == row[0] and torch.equal((x_NCHW[-1] * 255).round().int(), torch.tensor(pixels, dtype=torch.int))


@pytest.mark.parametrize("dataset", EVERY)
def test_the_sizes_of_the_splits_are_known_before_and_after_fetching(dataset: str, tmp_path: Path) -> None:
    load(dataset, "train", limit=1)
    assert sizes(dataset) == sizes(dataset, tmp_path) == COUNTS[dataset][:3]


@pytest.mark.parametrize("dataset", EVERY)
def test_checksum_is_the_same_on_every_machine(dataset: str) -> None:
    assert checksum(dataset) == CHECKSUMS[dataset]
    assert check(dataset).state == "ready"


def test_limit_takes_the_first_images() -> None:
    for split in splits.SPLITS:
        x_NCHW, y_N = load("mnist", split, limit=100)
        all_NCHW, all_N = load("mnist", split)
        assert torch.equal(x_NCHW, all_NCHW[:100]) and torch.equal(y_N, all_N[:100])
    assert len(load("digits", "validation", limit=10_000)[0]) == 180


def test_every_task_has_a_name_an_eps_and_a_partner() -> None:
    assert [find_task(name).name for name in TASKS] == TASKS
    assert find_task("mnist/A") == Task("mnist/A", "mnist", "A", DATASETS["mnist"].shape, 0.3)
    assert find_task("cifar10/C").eps == 0.06 and find_task("cifar10/C").shape.channels == 3
    assert "".join(find_task(f"digits/{name}").partner for name in "ABCD") == "BADC"
    assert all(f"{find_task(name).dataset}/{find_task(name).partner}" in TASKS for name in TASKS)
    assert list(PARTNERS) == list(ARCHITECTURES) and all(name != partner for name, partner in PARTNERS.items())


def test_every_classifier_protects_every_data_set_that_it_fits() -> None:
    assert set(f"{d}/{c}" for d in DATASETS for c in ARCHITECTURES) - set(TASKS) == {"digits/defensegan-B"}


def test_a_bare_letter_is_puvaes() -> None:
    for letter in "ABCD":
        assert find_task(f"mnist/puvae-{letter}") == find_task(f"mnist/{letter}")
        assert find_task(f"mnist/puvae-{letter}").classifier == letter
        assert find_task(f"mnist/advae-{letter}").classifier == f"advae-{letter}"


def test_data_folder_is_the_argument_or_the_environment_or_the_home_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_DATA", "/data")
    assert data_folder("/mine") == Path("/mine") and data_folder() == Path("/data")
    monkeypatch.delenv("CRUCIBLE_DATA")
    assert data_folder() == Path.home() / ".cache" / "crucible"


def test_a_second_load_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("digits", "train", tmp_path)
    monkeypatch.setattr(cache, "gather", lambda *_: pytest.fail("fetched again"))
    fetch("digits", tmp_path)
    assert torch.equal(load("digits", "train", tmp_path)[0], first[0])


def test_mnist_comes_from_nothing_and_leaves_no_rubbish(tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    fetch("mnist", tmp_path, lambda *progress: heard.append(progress))
    assert checksum("mnist", tmp_path) == CHECKSUMS["mnist"]
    assert heard and all(0 <= done and (total == 0 or done <= total) for _, done, total in heard)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [".work", "decoded", "raw"]
    assert not list((tmp_path / ".work").iterdir())


def put_by_hand(folder: Path) -> Path:
    """Put the gzipped files of digits into `folder`."""
    load("digits", "train", limit=1)
    folder.mkdir(parents=True)
    for name in DATASETS["digits"].origin.files:
        (folder / f"{name}.gz").write_bytes(gzip.compress((data_folder() / "raw" / "digits" / name).read_bytes()))
    return folder


def sourced(monkeypatch: pytest.MonkeyPatch, *sources: Folder | Official | Npm) -> None:
    """Let digits come from these sources alone."""
    data = DATASETS["digits"]
    monkeypatch.setitem(DATASETS, "digits", replace(data, origin=replace(data.origin, sources=sources)))


@pytest.mark.parametrize("folder", ["raw/digits", "digits"])
def test_official_files_put_by_hand_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    put_by_hand(tmp_path / folder)
    sourced(monkeypatch)
    assert check("digits", tmp_path).detail.startswith(f"in {tmp_path / folder}, but not decoded: python launch.py")
    assert checksum("digits", tmp_path) == CHECKSUMS["digits"]


def test_a_data_folder_that_must_not_be_written_has_its_cache_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CRUCIBLE_DATA", str(tmp_path / "full"))
    shared = put_by_hand(tmp_path / "shared" / "digits").parent
    shared.chmod(0o555)
    sourced(monkeypatch)
    assert checksum("digits", shared) == CHECKSUMS["digits"]
    assert [path.name for path in shared.iterdir()] == ["digits"]
    assert check("digits", shared).state == "ready"
    monkeypatch.setattr(cache, "gather", lambda *_: pytest.fail("fetched again"))
    assert len(load("digits", "train", shared)[0]) == 1_257
    assert f"{tmp_path}/home/.cache/crucible/read-only" in check("digits", shared).detail


def test_a_cache_in_a_data_folder_that_must_not_be_written_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fetch("digits", tmp_path / "shared")
    (tmp_path / "shared").chmod(0o555)
    assert len(load("digits", "train", tmp_path / "shared")[0]) == 1_257
    assert not (tmp_path / "home").exists()


def test_a_system_package_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sourced(monkeypatch, Folder("system package in", put_by_hand(tmp_path / "usr")))
    assert checksum("digits", tmp_path) == CHECKSUMS["digits"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serve tmp_path/www."""
    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_the_official_download_is_used_and_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    sizes = {f"{p.name}": p.stat().st_size for p in put_by_hand(tmp_path / "www").iterdir()}
    sourced(monkeypatch, Official(server, tuple(sizes)))
    heard: list[tuple[str, int, int]] = []
    fetch("digits", tmp_path, lambda *progress: heard.append(progress))
    assert checksum("digits", tmp_path) == CHECKSUMS["digits"]
    assert [step for step in heard if step[0] in sizes] == [(name, size, size) for name, size in sizes.items()]


def test_a_login_page_in_place_of_the_download_leads_to_the_next_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    good = put_by_hand(tmp_path / "usr")
    (tmp_path / "www").mkdir()
    for path in good.iterdir():
        (tmp_path / "www" / path.name).write_text("<html>please log in</html>")
    sourced(monkeypatch, Official(server, tuple(p.name for p in good.iterdir())), Folder("disk", good))
    assert checksum("digits", tmp_path) == CHECKSUMS["digits"]


def load_counting(folder: Path) -> None:
    """Load digits as a worker would, noting in a file that a fetch took place."""

    def noted(origin: Origin, places: Sequence[Path], raw: Path, work: Path, progress: Progress) -> Path:
        with (folder / "fetches").open("a") as file:
            file.write("x")
        return gather(origin, places, raw, work, progress)

    pytest.MonkeyPatch().setattr(cache, "gather", noted)
    assert len(load("digits", "train", folder)[0]) == 1_257


def test_two_workers_fetch_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=load_counting, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "fetches").read_text() == "x"


@pytest.mark.slow
def test_the_official_cifar10_archive_put_by_hand_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("cifar10", "train", limit=1)
    (tmp_path / "raw" / "cifar10").mkdir(parents=True)
    with tarfile.open(tmp_path / "raw" / "cifar10" / "cifar-10-binary.tar.gz", "w:gz", compresslevel=1) as tar:
        for name in DATASETS["cifar10"].origin.files:
            tar.add(data_folder() / "raw" / "cifar10" / name, f"cifar-10-batches-bin/{name}")
    monkeypatch.setenv("PATH", "")
    assert checksum("cifar10", tmp_path) == CHECKSUMS["cifar10"]


@pytest.mark.slow
def test_the_debian_package_comes_without_package_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("no apt-get here")
    (tmp_path / "lists").mkdir()
    (tmp_path / "apt.conf").write_text(f'Dir::State::Lists "{tmp_path / "lists"}";')
    monkeypatch.setenv("APT_CONFIG", os.fspath(tmp_path / "apt.conf"))
    fetch("fashion-mnist", tmp_path)
    assert checksum("fashion-mnist", tmp_path) == CHECKSUMS["fashion-mnist"]
