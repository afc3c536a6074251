"""The store: whole or not there, damaged or made again."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from search.storage.atomic import folder_atomic, write_atomic
from search.storage.fingerprint import fingerprint
from search.storage.outage import MARKER, MEANING, HeldError, WaitedFolder
from search.storage.store import Content, Store, to_bytes

FILES = {"a.bin": b"one", "b.bin": b"two"}


def test_a_fingerprint_changes_with_every_part_and_ignores_their_order() -> None:
    assert fingerprint(a=1, b=2) == fingerprint(b=2, a=1)
    assert len({fingerprint(a=1, b=2), fingerprint(a=2, b=2), fingerprint(a=1, c=2), fingerprint(a="1", b=2)}) == 4


def test_what_is_put_is_got(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get("fits", "k") is None
    folder = store.put("fits", "k", FILES, {"why": "test"})
    assert store.get("fits", "k") == folder
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert store.about("fits", "k") == {"why": "test"}


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing", "no entry", "entry is not JSON"])
def test_a_damaged_entry_is_set_aside(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    folder = store.put("fits", "k", FILES, {})
    match damage:
        case "changed":
            (folder / "a.bin").write_bytes(b"onE")
        case "truncated":
            (folder / "a.bin").write_bytes(b"on")
        case "missing":
            (folder / "a.bin").unlink()
        case "no entry":
            (folder / "entry.json").unlink()
        case _:
            (folder / "entry.json").write_text("{")
    assert store.get("fits", "k") is None
    assert (tmp_path / "damaged" / "k").is_dir()
    assert store.put("fits", "k", FILES, {}) == store.get("fits", "k")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.put("fits", "k", FILES, {})
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "file", b"x")
    assert store.get("fits", "k") is None
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["here"]


def test_fits_of_an_earlier_version_are_counted_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("fits", "k", FILES, {})
    assert store.outdated_fits() == 0, "a new store has none"
    (tmp_path / MARKER).write_bytes(MEANING)  # as it was until 2026-11
    assert Store(tmp_path).outdated_fits() == 1
    assert Store(tmp_path).outdated_fits() == 0
    assert Store(tmp_path / "absent").outdated_fits() == 0 and not (tmp_path / "absent").exists()


def test_an_entry_is_made_once_and_the_others_wait_for_it(tmp_path: Path) -> None:
    made, waits = list[int](), list[str]()

    def make() -> Content:
        time.sleep(0.2)
        made.append(1)
        return FILES, {"made": len(made)}

    @contextmanager
    def waiting() -> Iterator[None]:
        waits.append("in")
        yield
        waits.append("out")

    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: Store(tmp_path).cached("made", "k", make, waiting()), range(3)))
    assert made == [1] and waits.count("in") == waits.count("out") == 3
    assert folders == {tmp_path.resolve() / "made" / "k"} and Store(tmp_path).about("made", "k") == {"made": 1}
    with pytest.raises(ZeroDivisionError):
        Store(tmp_path).cached("made", "other", lambda: ({}, {"x": 1 // 0}))
    assert Store(tmp_path).lock("made", "other").acquire(timeout=1), "whoever failed has let go of the lock"


def test_a_folder_that_fails_half_way_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half way"), folder_atomic(tmp_path / "export") as folder:
        (folder / "file").write_text("x")
        raise ValueError("half way")
    assert list(tmp_path.iterdir()) == []


def test_a_file_can_be_read_by_whoever_the_umask_allows(tmp_path: Path) -> None:
    expected = tmp_path / "plain"
    expected.write_text("x")
    assert write_atomic(tmp_path / "atomic", b"x").stat().st_mode == expected.stat().st_mode


def test_progress_is_kept_replaced_and_dropped(tmp_path: Path) -> None:
    store, cpu = Store(tmp_path), torch.device("cpu")
    assert store.load_progress("k", cpu) is None
    for epoch in (1, 2):
        store.save_progress("k", {"curve": [{"loss": epoch / 3}] * epoch, "weights": torch.full((2,), float(epoch))})
    state = store.load_progress("k", cpu)
    assert state is not None and state["curve"] == [{"loss": 2 / 3}] * 2 and state["weights"].tolist() == [2.0, 2.0]
    store.drop_progress("k")
    assert store.load_progress("k", cpu) is None


def test_damaged_progress_is_no_progress(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save_progress("k", {"epoch": 1})
    path = tmp_path / "progress" / "k"
    path.write_bytes(path.read_bytes()[:-1])
    assert store.load_progress("k", torch.device("cpu")) is None
    assert not path.exists()


def test_weights_are_the_same_bytes_for_the_same_module() -> None:
    module = nn.Conv2d(2, 3, 3)
    module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)  # safetensors refuses it
    assert to_bytes(module) == to_bytes(module)


def count_up(root: Path, key: str) -> None:
    """Read, add one and write under the entry's lock."""
    path = root / "count"
    for _ in range(20):
        with Store(root).lock("fits", key):
            path.write_text(str(int(path.read_text()) + 1))


def test_a_lock_lets_one_process_in(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=count_up, args=(tmp_path, "k")) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (tmp_path / "count").read_text() == "40"


@pytest.mark.parametrize("goes", [1, 2], ids=["before the first attempt", "in an attempt"])
def test_a_lock_of_a_storage_that_has_just_gone_makes_nothing_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes: int
) -> None:
    store, gone, waits = Store(tmp_path / "store").make(), tmp_path / "gone", []

    def wait(folder: WaitedFolder) -> None:
        waits.append(folder)
        if len(waits) == goes:  # the first wait is `lock`'s own, the second that of the first attempt
            store.root.rename(gone)
        elif gone.exists():
            assert not store.root.exists()
            gone.rename(store.root)

    monkeypatch.setattr(WaitedFolder, "wait", wait)
    with store.lock("fits", "k"):
        assert len(waits) == goes + 1
        assert (store.root / "locks" / "fits-k").exists()


def test_a_lock_that_is_held_is_not_mistaken_for_a_storage_that_times_out(tmp_path: Path) -> None:
    store = Store(tmp_path).make()
    with store.lock("searches", "one"), pytest.raises(HeldError, match="is held by another process"):
        store.lock("searches", "one").acquire(timeout=0)
    assert not issubclass(HeldError, OSError)
    with store.lock("searches", "one").acquire(timeout=0):
        pass


def test_a_storage_whose_mount_is_broken_is_away(tmp_path: Path) -> None:
    broken = tmp_path / ("x" * 300)  # to ask for it is an error, and not that it is not found
    assert Store(broken).expected().away
