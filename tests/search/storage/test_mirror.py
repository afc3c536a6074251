"""A storage that is a URI: what lasts lies there, and each machine works in a folder of its own."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from rich.console import Console

from benchmarks.fault_injection import wait_for
from defenses.base import Metrics
from defenses.puvae import PuVAE
from search import session
from search.engine.local_backend import Stopped
from search.engine.run import run
from search.engine.worker import Report
from search.exceptions import Unreachable
from search.optimizer.history import SearchHistory, has_begun
from search.optimizer.proposer import Proposer
from search.storage import mirror as mirror_module
from search.storage.atomic import write_atomic
from search.storage.mirror import Mirror
from search.storage.store import Store
from search.storage.uri import local_folder
from search.study import sync
from search.study.callbacks import Callback
from search.study.candidate import Proposal
from search.study.catalog import open_search, search_names
from search.study.loading import make_study
from search.study.study import Study
from search.tracking.csv_log import CsvLog
from search.trial.pictures import png
from search.trial.runner import run_trial
from spaces.exceptions import InputError
from spaces.space import Params
from tests.conftest import digits_study
from tests.search.optimizer.test_early_stopping import PRETENDED
from tests.support.paths import ROOT

FILES = {"a.bin": b"one", "b.bin": b"two"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "REST", 0.0)
    monkeypatch.setattr(sync, "PAUSE_S", 0.01)
    monkeypatch.setattr(sync, "CLAIM_S", 0.0)


@pytest.fixture(params=["memory", "file"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "memory":
        monkeypatch.setattr(MemoryFileSystem, "async_impl", True)  # as object stores are
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
    assert [history.message for history in caplog.records] == [f"{uri}: it is gone; work goes on, and is sent later"]
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
    monkeypatch.setattr(mirror_module, "REST", 1e6)
    mirror = Mirror(f"file://{tmp_path}/far", "", tmp_path)
    with pytest.raises(Unreachable, match="it is gone"):
        mirror.read("x")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x").write_bytes(b"1")
    with pytest.raises(Unreachable, match="did not answer a moment ago"):
        mirror.read("x")
    mirror.retry()
    assert mirror.read("x") == b"1"


def far_study(tmp_path: Path, **fields: object) -> Study:
    (tmp_path / "far").mkdir(exist_ok=True)
    return make_study(digits_study(tmp_path, **fields).model_dump() | {"storage": f"file://{tmp_path}/far"})


def on(machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a machine, and return the folder in which it works."""
    monkeypatch.setenv("CRUCIBLE_CACHE", str(tmp_path / machine))
    return local_folder(f"file://{tmp_path}/far")


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "candidates.csv").open()))


def untrained(*args: object) -> Iterator[None]:
    raise AssertionError("nothing is to be trained")


def execute(study: Study, proposal: Proposal, report: Report) -> dict[str, Any]:
    """Stand in for a trial, and leave behind what one leaves."""
    last = PRETENDED.execute(study, proposal, report)
    study.store.put("fits", last["candidates"][0]["fit"], {"weights": b"w"}, {})
    (study.folder / "wandb" / proposal.name).mkdir(parents=True)
    (study.folder / "wandb" / proposal.name / "run.wandb").write_text(proposal.name)
    path = study.folder / "pictures" / f"{proposal.name}.png"
    path.parent.mkdir(exist_ok=True)
    return last | {"picture": str(write_atomic(path, png(torch.rand(3, 4, 1, 8, 8))))}


STAND_IN = replace(PRETENDED, execute=execute)


def search(study: Study, *listeners: Callback) -> list[str]:
    """Run a search without trainings, and return what was said of its storage."""
    said = list[str]()
    study.root.mkdir(parents=True, exist_ok=True)
    with sync.syncing(study, said.append) as syncs:
        csv_log = CsvLog(study.folder / "candidates.csv", SearchHistory(study).candidates() if has_begun(study) else [])
        assert run(study, [csv_log, *listeners, *syncs], debug=True, work=STAND_IN) == "finished"
        session.write_report(study)
    return said


def test_a_search_of_one_machine_is_seen_and_gone_on_with_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = far_study(tmp_path, trials=3, refine=0)
    one = on("one", tmp_path, monkeypatch)
    assert search(study) == []
    shutil.rmtree(one)  # the machine is gone

    two = on("two", tmp_path, monkeypatch)
    assert search_names(study.storage) == ["smoke"]
    said = session.status(open_search("smoke", study.storage, whole=False))
    assert (said["finished"], said["running"], said["candidates"]) == (3, 0, 3)
    assert {path.name for path in (two / "smoke").iterdir()} == {
        "study.yaml", "study.journal", "candidates.csv", "report.html"
    }  # fmt: skip
    found = open_search("smoke", study.storage)
    assert len(rows(two / "smoke")) == 3 and len(list((two / "smoke").glob("wandb/*/run.wandb"))) == 3
    assert session.write_report(found).read_text().count("data:image/png") >= 3
    assert search(found.model_copy(update={"trials": 5})) == []
    with pytest.raises(InputError, match="a search's name must be new"):
        session.begin(study, Console(quiet=True), debug=True)

    on("three", tmp_path, monkeypatch)
    study.folder.mkdir(parents=True)
    (study.folder / "study.journal").write_bytes(b"{}")  # it took part before, and is behind
    history = SearchHistory(open_search("smoke", study.storage))
    assert [t.user_attrs["trial"] for t in history.trials()] == ["t001", "t002", "t003", "t004", "t005"]
    assert len(rows(study.folder)) == len(study.store.keys("fits")) == 5


def test_a_training_goes_on_on_another_machine_and_is_done_once_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, heard = far_study(tmp_path), list[int]()
    params = Proposer(digits_study(tmp_path / "other")).propose()
    assert params is not None

    def dies(epoch: int, metrics: Metrics) -> None:
        raise Stopped

    one = on("one", tmp_path, monkeypatch)
    with pytest.raises(Stopped):
        run_trial(study, params.params, study.store, dies)
    shutil.rmtree(one)
    on("two", tmp_path, monkeypatch)
    candidates = run_trial(study, params.params, study.store, lambda epoch, metrics: heard.append(epoch))
    assert heard == [2] and not list((tmp_path / "far" / ".store" / "progress").glob("*"))
    on("three", tmp_path, monkeypatch)
    monkeypatch.setattr(PuVAE, "fit", untrained)
    again = run_trial(study, params.params, study.store, dies)
    assert [c.candidate for c in again] == [c.candidate for c in candidates]


class Away(Callback):
    """Takes the storage away when the first trial ends and the study has arrived there."""

    def __init__(self, far: Path) -> None:
        self.far = far

    def trial_ended(self, trial: Proposal, *rest: object) -> None:
        if trial.name == "t001":
            until = time.monotonic() + 60
            while not list(self.far.glob("*/study.yaml")) and time.monotonic() < until:
                time.sleep(0.05)
            self.far.rename(self.far.with_name("gone"))


def test_a_storage_that_goes_in_mid_search_stops_no_trial_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = far_study(tmp_path, trials=3, refine=0)
    one = on("one", tmp_path, monkeypatch)
    said = search(study, Away(tmp_path / "far"))
    assert len(said) == 1 and "does not answer: what it lacks is kept in" in said[0]
    assert len(rows(study.folder)) == 3 and not (tmp_path / "far").exists()
    (tmp_path / "gone").rename(tmp_path / "far")
    assert search(open_search("smoke", study.storage)) == []  # nothing is left to do but to send
    shutil.rmtree(one)
    on("two", tmp_path, monkeypatch)
    assert len(SearchHistory(open_search("smoke", study.storage)).candidates()) == 3
    assert len(study.store.keys("fits")) == 3 and not list((tmp_path / "far").rglob("*.part-*"))


def test_a_search_runs_on_one_machine_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = far_study(tmp_path)
    on("one", tmp_path, monkeypatch)
    study.root.mkdir(parents=True)
    study.write()
    with sync.syncing(study, print) as syncs:
        syncs[0].trial_ended(Proposal("t001", Params({}, {})), "pruned", [], None, "")
        until = time.monotonic() + 20
        while not (tmp_path / "far" / "smoke" / "study.yaml").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        assert sync.driver(study) is None  # it is its own
        on("two", tmp_path, monkeypatch)
        found = open_search("smoke", study.storage)
        assert sync.driver(found)
        with pytest.raises(InputError, match="a search must run once at a time, but 'smoke' runs on "):
            session.proceed(found, Console(quiet=True), debug=True)
        with monkeypatch.context() as later:
            later.setattr(sync, "TICK_S", 0.0)  # it was not heard of for long
            assert sync.driver(found) is None
        on("one", tmp_path, monkeypatch)
    on("two", tmp_path, monkeypatch)
    assert sync.driver(found) is None


def test_what_another_machine_went_on_with_counts_and_not_what_was_never_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = far_study(tmp_path)
    one, there = on("one", tmp_path, monkeypatch), tmp_path / "far" / "smoke"
    study.root.mkdir(parents=True)
    study.write()
    there.mkdir(parents=True)
    (there / "study.yaml").write_bytes((study.folder / "study.yaml").read_bytes())
    (there / "study.journal").write_bytes(b"1\n2\nhal")
    (there / "study.journal.part-1").touch()  # its sender died
    journal = one / "smoke" / "study.journal"
    journal.write_bytes(b"1\n2\n3\n4\n5\n")
    open_search("smoke", study.storage)
    assert journal.read_bytes() == b"1\n2\n3\n4\n5\n"  # it is the same search, further on
    (there / "study.journal").write_bytes(b"1\nother\n")
    open_search("smoke", study.storage)
    assert journal.read_bytes() == b"1\nother\n"
    assert {path.name for path in (one / "smoke").glob("[!.]*")} == {"study.yaml", "study.journal"}


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("gs://bucket/runs", "pip install --constraint requirements.lock gcsfs"),
        ("sftp://host/runs", "pip install --constraint requirements.lock"),
        ("nothing://runs", "a URI that fsspec knows"),
        ("://runs", "a URI that fsspec knows"),
        ("ftp://me:secret@host/runs", "without a password"),
    ],
)
def test_a_uri_that_cannot_be_spoken_to_is_refused(storage: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_study({"storage": storage, "task": "digits/A"})
    with pytest.raises(InputError, match=words):
        search_names(storage)


def test_a_uri_that_cannot_be_written_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("one", tmp_path, monkeypatch)
    (tmp_path / "far").write_text("a file")
    study = make_study(digits_study(tmp_path).model_dump() | {"storage": f"file://{tmp_path}/far"})
    with pytest.raises(InputError, match="a storage must be a URI that can be written, but file://"):
        session.begin(study, Console(quiet=True), debug=True)


@pytest.mark.slow
def test_a_search_under_ray_whose_machine_dies_is_finished_by_another(tmp_path: Path) -> None:
    """Real processes: the driver and its workers are killed in mid-training, and their folder is lost."""
    (tmp_path / "far").mkdir()
    uri, far = f"file://{tmp_path}/far", tmp_path / "far"
    small = "--task digits/A --space smoke --suite quick --eval-images 40 --cheap-images 20 --refine 0 --trials 2"
    more = (
        "--epochs 6 --classifier-epochs 2 --knob sigma_eps=0,1 --concurrent 1 --wandb disabled --name moves --storage"
    )
    command = [sys.executable, str(ROOT / "launch.py"), "search", *small.split(), *more.split(), uri]
    one, two = (os.environ | {"CRUCIBLE_CACHE": str(tmp_path / name)} for name in ("one", "two"))
    process = subprocess.Popen(command, cwd=ROOT, env=one, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: (far / "moves" / "pictures" / "t001.png").exists(), process)
        before = {str(path): path.stat().st_mtime_ns for path in (far / ".store" / "fits").glob("*/*")}
        wait_for(lambda: any((far / ".store" / "progress").glob("[0-9a-f]*[0-9a-f]")), process)
    finally:
        process.kill()
        process.wait()
    shutil.rmtree(tmp_path / "one", ignore_errors=True)

    def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "launch.py"), *arguments, "--storage", uri]
        return subprocess.run(command, cwd=ROOT, env=two, text=True, capture_output=True)

    said = json.loads((far / "moves" / "driver.json").read_text())
    (far / "moves" / "driver.json").write_text(json.dumps(said | {"time": time.time()}))  # however slow this machine is
    refused = launch("resume", "moves")
    assert refused.returncode == 2 and "a search must run once at a time, but 'moves' runs on" in refused.stderr
    (far / "moves" / "driver.json").unlink()  # the minute is over
    resumed = launch("resume", "moves")
    assert resumed.returncode == 0, resumed.stderr
    state = json.loads(launch("status", "moves", "--json").stdout)
    assert (state["finished"], state["failed"], state["running"], state["candidates"]) == (2, 0, 0, 4)
    assert len(rows(far / "moves")) == 4 and (far / "moves" / "report.html").exists()
    after = {str(path): path.stat().st_mtime_ns for path in (far / ".store" / "fits").glob("*/*")}
    assert len(after) == 4 and before.items() <= after.items()  # what was trained was not trained again
