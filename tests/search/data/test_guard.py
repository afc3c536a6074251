"""The guard: while a defense's own code runs, no way that Python knows leads to the data that it is judged by."""

from __future__ import annotations

import gc
import inspect
import logging
import multiprocessing
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.checkpoint import checkpoint

from search.data import splits
from search.data.cache import ensure
from search.data.folders import data_folder
from search.data.guard import closed, watch
from search.exceptions import TrialError
from tests.support.paths import ROOT


@pytest.fixture
def images() -> Path:
    """The file with the training and the validation images."""
    return ensure("digits", None) / "x_train.npy"


def linked(images: Path, folder: Path, link: Callable[[Path, Path], None]) -> Path:
    link(images, folder / "innocent.npy")
    return folder / "innocent.npy"


def from_an_open_folder(images: Path) -> int:
    folder = os.open(data_folder(), os.O_RDONLY)
    try:
        return os.open(images.relative_to(data_folder()), os.O_RDONLY, dir_fd=folder)
    finally:
        os.close(folder)


def in_a_thread(images: Path) -> object:
    with ThreadPoolExecutor() as pool:
        return pool.submit(np.load, images).result()


def in_a_new_python(images: Path) -> None:
    multiprocessing.get_context("spawn").Process(target=np.load, args=(images,)).start()


WAYS: dict[str, Callable[[Path], object]] = {
    "the loader": lambda images: splits.load("digits", "validation"),
    "the held-out images": lambda images: splits.load_held_out("digits"),
    "the test split": lambda images: splits.open_test("digits"),
    "its sizes": lambda images: splits.sizes("digits"),
    "numpy.load": np.load,
    "a memory map": lambda images: np.load(images, mmap_mode="r"),
    "numpy.fromfile": lambda images: np.fromfile(images, np.uint8),
    "a path in bytes": lambda images: open(os.fsencode(images), "rb"),
    "os.open": lambda images: os.open(images, os.O_RDONLY),
    "a relative path": lambda images: os.open(os.path.relpath(images), os.O_RDONLY),
    "an open folder": from_an_open_folder,
    "the official files": lambda images: (data_folder() / "raw" / "digits" / "train-images-idx3-ubyte").read_bytes(),
    "scikit-learn's own copy": lambda images: load_digits(),
    "torch.from_file": lambda images: torch.from_file(str(images), size=100, dtype=torch.uint8),
    "a storage of torch": lambda images: torch.UntypedStorage.from_file(str(images), False, 100),
    "a thread": in_a_thread,
    "another program": lambda images: subprocess.run(["cat", images]),
    "a shell": lambda images: os.system(f"cat {images}"),
    "another Python": in_a_new_python,
    "another time for it": lambda images: os.utime(images, (0, 0)),
    "another name for it": lambda images: os.rename(images, images.with_suffix(".moved")),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_leads_to_the_data(way: str, images: Path) -> None:
    with pytest.raises(TrialError, match="must not get at the data that it is judged by, but it .* while it is tried"):
        with closed("tried"):
            WAYS[way](images)
    assert len(splits.load("digits", "validation")[0]) == 180  # they are there, and open to us


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic link", "hard link"])
def test_a_link_elsewhere_is_no_way_around(
    link: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRUCIBLE_DATA", str(tmp_path / "data"))  # on one disk with the link
    other = linked(ensure("digits", None) / "x_train.npy", tmp_path, link)
    with pytest.raises(TrialError, match="it opens .*innocent.npy"), closed("tried"):
        np.load(other)
    assert len(np.load(other)) == 1437


def test_a_folder_under_another_name_is_no_way_around(tmp_path: Path) -> None:
    splits.load("digits", "train", tmp_path / "data")
    with pytest.raises(TrialError), closed("tried"):
        (tmp_path / "data").rename(tmp_path / "moved")
        np.load(tmp_path / "moved" / "decoded" / "digits" / "y_train.npy")


def test_a_new_file_with_the_inode_of_a_deleted_one_is_not_the_data(tmp_path: Path) -> None:
    old = tmp_path / "images" / "0" / "old.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"data")
    watch(tmp_path / "images")
    with closed("tried"):
        inode = old.stat().st_ino
    old.unlink()
    (tmp_path / "0.png").write_bytes(b"another")
    if (tmp_path / "0.png").stat().st_ino != inode:
        pytest.skip("this file system does not use an inode again at once")
    with closed("tried"):
        assert (tmp_path / "0.png").read_bytes() == b"another"


def test_data_in_a_folder_of_the_study_are_kept_too(tmp_path: Path) -> None:
    splits.load("digits", "train", tmp_path)
    with pytest.raises(TrialError), closed("tried"):
        np.load(tmp_path / "decoded" / "digits" / "y_train.npy")


def test_a_refusal_that_is_caught_is_told_all_the_same(images: Path) -> None:
    with pytest.raises(TrialError, match="x_train.npy"), closed("tried"):
        with pytest.raises(TrialError):
            np.load(images)


def by_a_traceback() -> object:
    try:
        raise KeyError
    except KeyError as error:
        assert error.__traceback__ is not None
        return error.__traceback__.tb_frame.f_back


LOOKS: dict[str, Callable[[], object]] = {
    "its frame": sys._getframe,
    "inspect": inspect.currentframe,
    "the stack": inspect.stack,
    "logging": logging.currentframe,
    "all threads": sys._current_frames,
    "a traceback": by_a_traceback,
    "all objects": gc.get_objects,
    "referrers": lambda: gc.get_referrers(WAYS),
    "a profiler": lambda: sys.setprofile(lambda *_: None),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_defense_cannot_look_at_its_callers_for_labels(look: str) -> None:
    try:
        with pytest.raises(TrialError, match="it looks at its callers or at all objects while it is tried"):
            with closed("tried"):
                LOOKS[look]()
    finally:
        sys.setprofile(None)


def test_what_asks_for_the_name_of_its_caller_alone_may(caplog: pytest.LogCaptureFixture) -> None:
    with closed("tried"):
        Pair = namedtuple("Pair", ["x", "y"])
        Two = Enum("Two", ["A", "B"])
        logging.getLogger("of a defense").warning("said")
        answer = checkpoint(nn.Linear(2, 2), torch.ones(1, 2), use_reentrant=False)
    assert Pair(1, 2).y == Two.B.value == 2 and answer.shape == (1, 2)
    assert "said" in caplog.text


def test_a_thread_of_the_library_alone_learns_nothing_and_is_no_refusal() -> None:
    """It may be asyncio's that logs an error, or one through which a defense looks."""
    with closed("tried"), ThreadPoolExecutor(1) as pool:
        for look in (sys._current_frames, partial(gc.get_objects), sys._getframe):
            assert isinstance(pool.submit(look).exception(), TrialError)


def test_packages_of_another_environment_are_trusted_too(tmp_path: Path) -> None:
    """As torch, which notes the stack at each seed, where this environment takes it from another one."""
    (tmp_path / "other-1.0.dist-info").mkdir()
    (tmp_path / "other.py").write_text("import traceback\ndef notes(): return traceback.format_stack()")
    ask = "from search.data.guard import closed; import other\nwith closed('tried'): assert other.notes()"
    subprocess.run([sys.executable, "-c", ask], env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, check=True)


@pytest.mark.parametrize("doing", ["audited", "trained"])
def test_a_defense_that_is_audited_leaves_no_notes(doing: str, tmp_path: Path) -> None:
    def write() -> None:
        (tmp_path / "notes").write_text("5")

    ways: list[Callable[[], object]] = [write, lambda: os.environ.update(NOTE="5"), (tmp_path / "5").mkdir]
    for way in ways:
        if doing == "audited":
            with pytest.raises(TrialError, match="it leaves notes of what it is asked"), closed(doing):
                way()
        else:
            with closed(doing):
                way()
    os.environ.pop("NOTE", None)


def test_another_error_inside_stays_what_it_was() -> None:
    with pytest.raises(KeyError), closed("tried"):
        raise KeyError("its own")


def test_all_else_goes_on(tmp_path: Path) -> None:
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    with closed("tried"), closed("tried within"):
        torch.save(torch.ones(3), tmp_path / "own.pt")
        found = torch.load(tmp_path / "own.pt", mmap=True)
        assert torch.from_file(str(tmp_path / "own.pt"), size=3).shape == (3,)  # whose event has no flags
        assert torch.compile(doubled, backend="eager")(found).tolist() == [2, 2, 2]
        assert [path.name for path in tmp_path.iterdir()] == ["own.pt"]
