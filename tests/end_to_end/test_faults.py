"""What breaks under a search, what the user sees, and what is lost.

| fault | what the user sees | what is lost |
| --- | --- | --- |
| a defense raises, has a NaN loss, asks for too much memory | that trial failed, with the reason; exit 0 | nothing |
| a defense hangs, `--trial-timeout` | that trial failed, with the line where it stood; exit 0 | nothing |
| a worker dies (killed, out of memory) | nothing; failed, where it dies three times over | at most an epoch |
| a node dies, or is cut off for good | lines of Ray's; its trials go on elsewhere | at most an epoch of each |
| the driver is killed, -9 | `resume NAME` goes on | at most an epoch of each trial under way |
| Ctrl-C, SIGTERM | `interrupted; go on with: ...`, exit 130 | at most an epoch of each trial under way |
| standard output is closed | nothing any more; the search goes on | nothing |
| the disk is full | `error: the storage failed: ...` and what to do, exit 1 | what could not be written comes again |
| the storage is away for less than ten minutes | nothing; everything waits | nothing |
| it is away for longer | `error: the storage failed: ...` and what to do, exit 1 | at most an epoch of each trial |
| a fit is damaged | nothing; it is trained again | that fit |
| the journal ends in half a line, zeros or junk | nothing; that is cut off and kept beside | nothing: it comes again |
| the journal is damaged in its midst | one line; exit 2 | the study; the store keeps the trainings |
"""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from benchmarks import simulated
from benchmarks.fault_injection import below, fault_injection, fits, rows, wait_for, workers
from search.engine.run import open_controller, run
from search.engine.worker import Report
from search.exceptions import StorageError
from search.optimizer.history import SearchHistory, has_begun, journal_path, state_of
from search.optimizer.proposer import Proposer
from search.storage import outage
from search.storage.outage import trouble
from search.storage.store import Store
from search.study.candidate import Proposal
from search.study.loading import read_study
from search.study.study import Study
from search.tracking.csv_log import CsvLog
from spaces.exceptions import InputError
from tests.conftest import digits_study
from tests.search.cli.test_cli import launch
from tests.support.paths import ROOT, hiding

INSTANT = simulated.working(0.0)
TINY = ["--task", "digits/A", "--suite", "quick", "--eval-images", "40", "--cheap-images", "20", "--refine", "0"]
TINY += ["--train-images", "300", "--classifier-epochs", "2", "--wandb", "disabled", "--concurrent", "1"]
SMALL = [*TINY, "--space", "smoke", "--patience", "99", "--epochs", "3"]


def start(storage: Path, name: str, *more: str, code: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(code / "launch.py"), "search", "--name", name, "--storage", str(storage), *more]
    return subprocess.Popen(
        command,
        cwd=code,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def status(storage: Path, name: str) -> dict[str, Any]:
    state = json.loads(launch("status", name, "--storage", str(storage), "--json").stdout)
    return {key: state[key] for key in ("finished", "pruned", "failed", "running", "interrupted")}


def candidates(study: Study) -> dict[str, Any]:
    """Return every finished candidate with its figures; one that stands twice fails."""
    told = [t for t in SearchHistory(study).optuna.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    found = [t.user_attrs["candidate"] for t in told if "candidate" in t.user_attrs]
    by_name = {candidate.candidate: candidate.to_json() for candidate in SearchHistory(study).as_measured()}
    assert len(by_name) == len(found)
    return by_name


def resumed(study: Study) -> SearchHistory:
    known = SearchHistory(study).candidates() if has_begun(study) else []
    assert run(study, [CsvLog(study.folder / "candidates.csv", known)], debug=True, work=INSTANT) == "finished"
    history = SearchHistory(study)
    states = Counter(state_of(trial) for trial in history.trials())
    assert states == {"finished": study.trials}
    assert not history.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
    rows = list(csv.DictReader((study.folder / "candidates.csv").open()))
    assert {row["candidate"] for row in rows} == candidates(study).keys() and len(rows) == len(candidates(study))
    return history


def test_a_journal_that_ends_anywhere_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """A driver killed after any line; a power cut that leaves half of the next one, zeros, or junk."""
    whole = digits_study(tmp_path / "whole", trials=2, refine=0)
    (tmp_path / "whole").mkdir()
    resumed(whole)
    lines = journal_path(whole).read_bytes().splitlines(keepends=True)
    ends = (b"", lines[0][:20], b"\0" * 64, b'{"op_code": 4,\n\xff\xfe\n')
    for count in range(0, len(lines), 3):  # each line was tried once, which takes half a minute
        study = digits_study(tmp_path / f"{count}", trials=2, refine=0)
        study.folder.mkdir(parents=True)
        study.write()
        end = ends[count % len(ends)]
        journal_path(study).write_bytes(b"".join(lines[:count]) + end)
        before = candidates(study) if has_begun(study) else {}
        resumed(study)
        assert before.items() <= candidates(study).items()
        damaged = study.folder / "study.journal.damaged"
        assert (damaged.read_bytes() if end else b"") == end


def test_a_journal_that_is_damaged_in_its_midst_is_refused(tmp_path: Path) -> None:
    study = digits_study(tmp_path, trials=1, refine=0)
    resumed(study)
    lines = journal_path(study).read_bytes().splitlines(keepends=True)
    journal_path(study).write_bytes(b"".join([*lines[:5], b"junk\n", *lines[6:]]))
    with pytest.raises(InputError, match="must be whole but for its end, but line 6 of .* is damaged"):
        Proposer(study)


def test_a_lock_that_a_killed_driver_left_on_the_journal_is_not_waited_for(tmp_path: Path) -> None:
    study = digits_study(tmp_path, trials=1, refine=0)
    Proposer(study)
    path = journal_path(study)
    path.with_name(f"{path.name}.lock").symlink_to(path)
    begin = time.monotonic()
    Proposer(study).optuna.set_user_attr("here", True)
    assert time.monotonic() - begin < 10  # Optuna would wait for 30 s


def test_half_a_line_is_taken_back_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = Proposer(digits_study(tmp_path, trials=1, refine=0))
    before = journal_path(proposer.study).read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            proposer.optuna.set_user_attr("lost", 1)
    assert journal_path(proposer.study).read_bytes() == before
    proposer.optuna.set_user_attr("kept", 2)
    assert SearchHistory(proposer.study).optuna.user_attrs["kept"] == 2


def test_a_store_that_went_away_is_waited_for_and_never_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "PATIENCE_S", 1.0)
    mount, away = tmp_path / "mount", tmp_path / "away"
    store = Store(mount / ".store")
    store.put("fits", "k", {"a": b"1"}, {})
    os.rename(mount, away)
    mount.mkdir()  # as the bare mount point of a disk
    with pytest.raises(StorageError, match=f"{mount} was away for 1 s"):
        store.get("fits", "k")
    with pytest.raises(StorageError):
        store.put("fits", "other", {"a": b"1"}, {})
    with pytest.warns(UserWarning, match="could not be kept"):
        store.save_progress("k", {"epoch": 1})
    assert not list(mount.iterdir())
    worker = Store(tmp_path / "elsewhere" / ".store").expected()
    with pytest.raises(StorageError):
        worker.lock("fits", "k")
    assert not (tmp_path / "elsewhere").exists()
    mount.rmdir()
    os.rename(away, mount)
    assert store.get("fits", "k") == mount / ".store" / "fits" / "k"


def lacks_room(study: Study, proposal: Proposal, report: Report) -> dict[str, Any]:
    """Fail once as a worker does whose disk is full."""
    if proposal.name == "t002" and not (study.folder / "failed").exists():
        (study.folder / "failed").touch()
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights")
        return {"interrupted": trouble(error)}
    return INSTANT.execute(study, proposal, report)


def test_a_trial_that_its_storage_let_down_is_no_failure_and_ends_the_search(tmp_path: Path) -> None:
    study = digits_study(tmp_path, trials=4, refine=0)
    work = replace(INSTANT, execute=lacks_room)
    with pytest.raises(StorageError, match="weights: No space left on device"):
        run(study, [], debug=True, work=work)
    assert [state_of(trial) for trial in SearchHistory(study).trials()] == ["finished", "running"]
    before = candidates(study)
    names = [trial.user_attrs["trial"] for trial in resumed(study).trials()]
    assert names == ["t001", "t002", "t003", "t004"] and before.items() <= candidates(study).items()


def test_a_damaged_fit_is_trained_again_and_no_other(tmp_path: Path) -> None:
    small = {"suite": "quick", "space": "smoke", "eval_images": 40, "train_images": 300, "epochs": 1, "trials": 2}
    study = digits_study(tmp_path, refine=0, classifier_epochs=2, knobs={"sigma_eps": 0}, **small)
    assert run(study, [], debug=True) == "finished"
    (first, *_), before = sorted(fits(tmp_path).items()), fits(tmp_path)
    weights = tmp_path / ".store" / "fits" / first[0] / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    again = study.model_copy(update={"name": "again"})
    assert run(again, [], debug=True) == "finished"
    changed = {key for key, at in fits(tmp_path).items() if before.get(key) != at}
    assert changed == {first[0]} and (tmp_path / ".store" / "damaged" / first[0]).is_dir()
    assert candidates(again).keys() == candidates(study).keys()


@pytest.mark.slow
def test_ctrl_c_and_sigterm_save_and_resume_finishes_what_is_left_even_unheard(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch.py"), "resume", "stop", "--storage", str(tmp_path)]
    search = start(tmp_path, "stop", *SMALL, "--trials", "3", "--epochs", "8")
    for sent in (signal.SIGINT, signal.SIGTERM):
        so_far = len(rows(tmp_path / "stop"))
        while len(rows(tmp_path / "stop")) == so_far or not workers(search.pid):
            assert search.poll() is None, search.communicate()[0]
            time.sleep(0.1)
        second = launch("resume", "stop", "--storage", str(tmp_path))
        assert second.returncode == 2 and "a search must run once at a time" in second.stderr
        below_it = [pid for pid, _ in below(search.pid)]
        search.send_signal(sent)
        output = search.communicate(timeout=120)[0]
        assert search.returncode == 130, output
        assert f"go on with: python launch.py resume stop --storage {tmp_path}" in output
        before = rows(tmp_path / "stop")
        until = time.monotonic() + 60
        while [pid for pid in below_it if alive(pid)] and time.monotonic() < until:
            time.sleep(0.1)
        assert below_it and not [pid for pid in below_it if alive(pid)]
        theirs = hiding(tmp_path / "theirs")
        search = subprocess.Popen(command, cwd=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert search.stdout is not None
    search.stdout.readline()
    search.stdout.close()  # as `| head -1` does
    assert search.wait(300) == 0
    after = rows(tmp_path / "stop")
    assert len(after) == 18 and before.items() <= after.items()
    trials = SearchHistory(read_study(tmp_path / "stop" / "study.yaml")).trials()
    assert [t.user_attrs["trial"] for t in trials] == ["t001", "t002", "t003"]


def alive(pid: int) -> bool:
    """Say whether a process runs; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_trial_whose_worker_died_is_not_handed_out_where_the_storage_failed(tmp_path: Path) -> None:
    controller = open_controller(digits_study(tmp_path, trials=3, refine=0), [])
    dead, let_down = controller.next(), controller.next()
    assert dead is not None and let_down is not None
    controller.died(dead.name)
    assert not controller.done
    controller.interrupted(let_down.name, "the disk is full")
    assert controller.next() is None and controller.done
    assert [t.user_attrs["trial"] for t in resumed(controller.study).trials()] == ["t001", "t002", "t003"]


@pytest.mark.slow
def test_each_setting_that_breaks_fails_alone_and_with_its_reason(tmp_path: Path) -> None:
    copy, runs = tmp_path / "code", tmp_path / "runs"
    for package in ("spaces", "attacks", "defenses", "search"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", copy)
    (copy / "defenses" / "doomed.py").write_text(DOOMED)
    fates = ["--defense", "doomed", "--method", "grid", "--trials", "6", "--trial-timeout", "15", "--knob", "epochs=1"]
    fates += ["--knob", "fate=well,raise,nan,memory,hang,kill", "--knob", "strength=0.5"]
    search = start(runs, "doomed", *fates, *TINY, code=copy)
    output = search.communicate(timeout=500)[0]
    assert search.returncode == 0, output
    hang = 1 + next(at for at, line in enumerate(DOOMED.splitlines()) if "re.match(" in line)
    for reason in (
        "failed: KeyError: 'on purpose'",
        "failed: TrialError: the training diverged: loss is nan after epoch 1",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 10995116277760 bytes",
        f"failed: no end after 15 s; it stood at doomed.py line {hang} in hangs",
        "failed: its worker died, 3 times over",
    ):
        assert reason in output, output
    assert len(rows(runs / "doomed")) == 1


@pytest.mark.slow
def test_a_search_on_a_full_disk_says_so_and_resume_finishes_it(disk: Path) -> None:
    search = start(disk, "full", *SMALL, "--trials", "3", "--debug")
    wait_for(lambda: rows(disk / "full"), search)
    before = rows(disk / "full")
    with (disk / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError, match="No space left"):
        while True:
            ballast.write(bytes(4096))
    output = search.communicate(timeout=300)[0]
    assert search.returncode == 1, output
    assert "error: the storage failed: " in output and "No space left on device" in output
    assert f"go on with: python launch.py resume full --storage {disk}" in output
    (disk / "ballast").unlink()
    trained = fits(disk)
    assert launch("resume", "full", "--storage", str(disk), "--debug").returncode == 0
    assert before.items() <= rows(disk / "full").items() and trained.items() <= fits(disk).items()
    assert status(disk, "full") == {"finished": 3, "pruned": 0, "failed": 0, "running": 0, "interrupted": 0}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.slow
def test_a_storage_that_goes_away_is_waited_for_and_then_the_search_ends(tmp_path: Path) -> None:
    storage, away = tmp_path / "runs", tmp_path / "away"
    search = start(storage, "gone", *SMALL, "--trials", "4", CRUCIBLE_STORAGE_PATIENCE_S="20")
    wait_for(lambda: rows(storage / "gone"), search)
    before, trained = rows(storage / "gone"), fits(storage)
    os.rename(storage, away)
    time.sleep(5)
    assert not storage.exists() and search.poll() is None
    os.rename(away, storage)
    wait_for(lambda: len(rows(storage / "gone")) > len(before), search)  # it goes on
    os.rename(storage, away)
    output = search.communicate(timeout=120)[0]
    assert search.returncode == 1, output
    assert f"error: the storage failed: {storage} was away for 20 s. What had ended is kept" in output
    assert not storage.exists()
    os.rename(away, storage)
    assert launch("resume", "gone", "--storage", str(storage), "--debug").returncode == 0
    assert before.items() <= rows(storage / "gone").items() and trained.items() <= fits(storage).items()
    assert status(storage, "gone") == {"finished": 4, "pruned": 0, "failed": 0, "running": 0, "interrupted": 0}


@pytest.mark.slow
def test_a_search_on_two_nodes_outlives_its_worker_a_node_and_its_driver(tmp_path: Path) -> None:
    fault_injection(tmp_path, 12, "--wandb", "offline")
    assert "attacked accuracy under white-box, Linf eps 0.3" in (tmp_path / "log").read_text()
    assert (tmp_path / "ordeal" / "report.html").stat().st_size > 1_000_000
    assert_seen_by_wandb(tmp_path / "ordeal")


def assert_seen_by_wandb(folder: Path) -> None:
    """Read a training's run, and a candidate's, back with W&B's own reader."""
    training = next(path for path in (folder / "wandb").glob("offline-run-*") if "-t001-" in path.name)
    candidate = next((folder / "wandb" / "candidates" / "wandb").glob("offline-run-*"))
    figures = ("attacked_accuracy", "latency_ms_p50", "clean_accuracy", "lambda_rc")
    for log, words in ((training, ("cheap", "lambda_rc")), (candidate, figures)):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", str(log)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for word in words:
            assert word in shown, shown


DOOMED = """
import os, re, signal
from dataclasses import dataclass
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from defenses.base import Defense, Knobs
from spaces.space import knob

FATES = ("well", "raise", "nan", "memory", "hang", "kill")

@dataclass(frozen=True)
class Train(Knobs):
    fate: str = knob("well", CategoricalDistribution(FATES), "what becomes of the training")
    epochs: int = knob(1, IntDistribution(1, 9), "passes over the training images")
    batch_size: int = knob(64, IntDistribution(1, 4096), "images a step")

@dataclass(frozen=True)
class Inference(Knobs):
    strength: float = knob(0.5, FloatDistribution(0, 1), "share of the blurred image")

class Doomed(Defense):
    Train, Inference = Train, Inference
    def build(self):
        self.weight = torch.nn.Parameter(torch.zeros(1))
    def fit(self, batches, classifier):
        for epoch in batches:
            if self.train_knobs.fate == "raise":
                raise KeyError("on purpose")
            if self.train_knobs.fate == "nan":
                yield {"loss": float("nan")}
            if self.train_knobs.fate == "memory":
                torch.empty(10 * 2**40, dtype=torch.uint8)
            if self.train_knobs.fate == "hang":
                self.hangs()
            if self.train_knobs.fate == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            yield {"loss": 0.0}
    def hangs(self):
        re.match("(a+)+$", 60 * "a" + "b")  # in C code, which never lets go of the interpreter
    def purify(self, x):
        return x.lerp(torch.nn.functional.avg_pool2d(x, 3, 1, 1), self.inference_knobs.strength)
"""
