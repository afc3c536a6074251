"""A storage that is a URI: what lasts lies there, and each machine works in a folder of its own."""

from __future__ import annotations

import csv
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from defenses.puvae import PuVAE
from search import courier, remote, session
from search.record import Record
from search.remote import Mirror, Unreachable
from search.run import run
from search.store import Store
from search.study import Study, make
from spaces.space import InputError
from tests.conftest import digits_study

FILES = {"a.bin": b"one", "b.bin": b"two"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "REST", 0.0)
    monkeypatch.setattr(courier, "PAUSE_S", 0.01)


@pytest.fixture(params=["memory", "file"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    (tmp_path / "far").mkdir()
    return f"file://{tmp_path}/far"


def machine(uri: str, root: Path, part: str = ".store") -> Store:
    """Return the store as one machine has it."""
    mirror = Mirror(uri, part, root)
    if not mirror.storage.startswith("file"):
        mirror.reach()
    return Store(root / part, mirror)


def mirror_of(store: Store) -> Mirror:
    assert store.mirror is not None
    return store.mirror


def there(uri: str) -> dict[str, int]:
    return Mirror(uri, "", Path("unused")).sizes()


def test_an_entry_of_one_machine_is_had_by_another(uri: str, tmp_path: Path) -> None:
    here, elsewhere = machine(uri, tmp_path / "one"), machine(uri, tmp_path / "two")
    assert elsewhere.get("fits", "k") is None
    here.put("fits", "k", FILES, {"why": "test"})
    assert elsewhere.keys("fits") == ["k"] and elsewhere.about("fits", "k") == {"why": "test"}
    assert not (tmp_path / "two" / ".store" / "fits" / "k").exists()  # what is looked at is not brought
    folder = elsewhere.get("fits", "k")
    assert folder is not None and {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert set(there(uri)) == {".store/fits/k/a.bin", ".store/fits/k/b.bin", ".store/fits/k/entry.json"}


def test_an_upload_that_was_cut_is_no_entry(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = machine(uri, tmp_path / "one"), machine(uri, tmp_path / "two")
    send = Mirror.send

    def dies(self: Mirror, name: str) -> None:
        if name.endswith("b.bin"):
            raise KeyboardInterrupt
        send(self, name)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Mirror, "send", dies)
        here.put("fits", "k", FILES, {})
    assert list(there(uri)) == [".store/fits/k/a.bin"]
    assert elsewhere.get("fits", "k") is None and elsewhere.keys("fits") == []
    here.put("fits", "other", FILES, {})  # whoever sends next sends what is missing
    assert elsewhere.keys("fits") == ["k", "other"] and elsewhere.get("fits", "k") is not None


def test_an_entry_that_is_damaged_here_is_fetched_anew_and_one_that_is_damaged_there_is_made_anew(
    uri: str, tmp_path: Path
) -> None:
    here, elsewhere = machine(uri, tmp_path / "one"), machine(uri, tmp_path / "two")
    folder = here.put("fits", "k", FILES, {})
    (folder / "a.bin").write_bytes(b"onE")
    assert here.get("fits", "k") == folder and (folder / "a.bin").read_bytes() == b"one"
    (folder / "a.bin").write_bytes(b"onE")
    mirror_of(here).send("fits/k/a.bin")
    assert elsewhere.get("fits", "k") is None and here.get("fits", "k") is None
    elsewhere.put("fits", "k", FILES, {})
    assert here.get("fits", "k") == folder


def test_half_done_fits_go_on_where_the_one_that_got_further_stopped(uri: str, tmp_path: Path) -> None:
    here, elsewhere = machine(uri, tmp_path / "one"), machine(uri, tmp_path / "two")
    here.save_progress("k", {"curve": [1, 2]})
    shutil.copy(tmp_path / "one" / ".store" / "progress" / "k", tmp_path / "kept")
    state = elsewhere.load_progress("k", CPU)
    assert state == {"curve": [1, 2]}
    elsewhere.save_progress("k", {"curve": [1, 2, 3]})
    assert here.load_progress("k", CPU) == {"curve": [1, 2, 3]}
    shutil.copy(tmp_path / "kept", tmp_path / "one" / ".store" / "progress" / "k")
    mirror_of(here).send("progress/k")  # late, by a machine that was left behind
    assert elsewhere.load_progress("k", CPU) == {"curve": [1, 2, 3]}
    elsewhere.drop_progress("k")
    here.drop_progress("k")
    assert here.load_progress("k", CPU) is None and there(uri) == {}


def test_a_storage_that_is_away_costs_nothing_and_gets_the_rest_when_it_returns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far, uri = tmp_path / "far", f"file://{tmp_path}/far"
    far.mkdir()
    here = machine(uri, tmp_path / "one")
    here.put("fits", "k1", FILES, {})
    far.rename(tmp_path / "gone")
    here.put("fits", "k2", FILES, {})
    here.save_progress("k", {"curve": [1]})
    assert here.get("fits", "k2") is not None and here.get("fits", "k3") is None and here.keys("fits") == ["k1", "k2"]
    assert not far.exists()  # nothing is written below a bare mount point
    assert [record.message for record in caplog.records] == [
        f"{uri}: it is gone; work goes on, and is sent later"
    ]
    (tmp_path / "gone").rename(far)
    here.put("fits", "k3", FILES, {})
    assert machine(uri, tmp_path / "two").keys("fits") == ["k1", "k2", "k3"]


def test_a_file_arrives_in_full_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far").mkdir()
    mirror = Mirror(f"file://{tmp_path}/far", "", tmp_path / "one")
    (tmp_path / "one").mkdir()
    path = tmp_path / "one" / "journal"
    path.write_bytes(b"1\n")
    mirror.send("journal")
    path.write_bytes(b"1\n2\n")

    def cut(self: object, source: str, to: str) -> None:
        Path(to).write_bytes(b"1\n2")
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched, pytest.raises(Unreachable, match="Input/output error"):
        patched.setattr("fsspec.implementations.local.LocalFileSystem.put_file", cut)
        mirror.send("journal")
    assert mirror.read("journal") == b"1\n" and mirror.sizes() == {"journal": 2}
    with pytest.raises(FileNotFoundError):
        mirror.read("nothing")


def test_a_storage_that_does_not_answer_is_left_alone_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "REST", 1e6)
    mirror = Mirror(f"file://{tmp_path}/far", "", tmp_path)
    with pytest.raises(Unreachable, match="it is gone"):
        mirror.read("x")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x").write_bytes(b"1")
    with pytest.raises(Unreachable, match="did not answer a moment ago"):
        mirror.read("x")
    mirror.retry()
    assert mirror.read("x") == b"1"
