"""Whatever W&B does, it never stops, slows or fails a search, and the user is told once."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.sdk import wandb_setup

from search.tracking import wandb_run, wandb_writer
from search.tracking.wandb_run import Mode
from search.tracking.wandb_tracker import WandbTracker
from tests.support.paths import ROOT
from tests.support.wandb_log import KEY, SIX, folders_of, held, inspect, machine, timed, told, trial


@pytest.fixture(scope="module", autouse=True)
def _machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with machine(tmp_path_factory.mktemp("home")):
        yield


def test_disabled_writes_and_says_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = WandbTracker("disabled", tmp_path / "runs", said.append)
    told(tracker)
    tracker.search_ended("finished", SIX)
    assert said == [] and list(tmp_path.iterdir()) == []


def test_wandb_is_online_only_where_a_key_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found() -> Mode:
        wandb.teardown()
        return wandb_run.found_mode()

    assert found() == "online"
    monkeypatch.delenv("WANDB_API_KEY")
    assert found() == "offline"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert found() == "online"
    monkeypatch.chdir(tmp_path)
    for command, mode in (("offline", "offline"), ("disabled", "disabled"), ("online", "online")):
        subprocess.run([sys.executable, "-m", "wandb", command], check=True, capture_output=True)
        assert found() == mode, command
    for asked, mode in (("dryrun", "offline"), ("run", "online"), ("disabled", "disabled"), ("nonsense", "offline")):
        monkeypatch.setenv("WANDB_MODE", asked)
        assert found() == mode, asked


@pytest.fixture(params=["raises", "hangs"])
def dead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A wandb that does not start; yields the reason that the user is told."""
    released = threading.Event()

    def init(**_: Any) -> None:
        if request.param == "raises":
            raise wandb.Error("the server is on fire")
        released.wait()

    monkeypatch.setattr(wandb, "init", init)
    yield "on fire" if request.param == "raises" else "no answer within 0.3 s"
    released.set()
    for thread in threading.enumerate():
        if thread.name in ("wandb", "within"):
            thread.join(10)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_wandb_that_does_not_start_slows_nothing_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dead: str, mode: Mode
) -> None:
    monkeypatch.setattr(wandb_run, "PATIENCE_S", 0.3)
    said: list[str] = []
    tracker = WandbTracker(mode, tmp_path, said.append)
    assert max(told(tracker)) < 0.5
    assert timed(tracker.search_ended, "finished", SIX) < 0.5
    assert timed(tracker.close) < 5
    assert len(said) == 1 and dead in said[0] and "goes on without it" in said[0]
    assert tracker.mode == "disabled"


@pytest.mark.parametrize("dead", ["hangs"], indirect=True)
@pytest.mark.usefixtures("dead")
def test_the_end_of_a_search_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wandb_writer, "FLUSH_S", 0.2)
    monkeypatch.setattr(wandb_run, "PATIENCE_S", 0.5)
    said: list[str] = []
    tracker = WandbTracker("offline", tmp_path, said.append)
    told(tracker)
    tracker.search_ended("interrupted", SIX)
    assert timed(tracker.close) < 2
    tracker.close()
    assert len(said) == 1 and "goes on without it" in said[0]


def test_a_search_outlives_the_death_of_wandbs_own_process(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = WandbTracker("offline", tmp_path, said.append)
    told(tracker)
    while not folders_of(tmp_path, "wrong"):
        time.sleep(0.05)
    process = wandb_setup.singleton().assert_service()._proc
    assert process is not None
    process._process.kill()
    tracker.trial_started(trial("u"))
    tracker.trial_ended(trial("u"), "failed", [], None, "CUDA out of memory")
    tracker.search_ended("finished", SIX)
    tracker.close()
    assert tracker.mode == "offline" and len(said) == 1 and "logs offline" in said[0]
    latest = [folders_of(tmp_path, key)[-1] for key in ("u", "search")]
    one, search = (json.loads(inspect(run, "--summary")) for run in latest)
    assert one["exit_code"] == 1 and search["summary"]["trials/finished"] == 1


def processes() -> list[str]:
    """Return the names of the processes that W&B runs below this one."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            head, _, tail = status.read_text().rpartition(")")
            found[int(status.parent.name)] = head.partition("(")[2], int(tail.split()[1])
    below = {os.getpid()}
    for _ in range(3):
        below |= {pid for pid, (_, parent) in found.items() if parent in below}
    return sorted(found[pid][0] for pid in below if found[pid][0].startswith("wandb"))


def test_however_many_runs_are_open_or_written_two_processes_serve_them(tmp_path: Path) -> None:
    def until(runs: int) -> list[str]:
        while len(list((tmp_path / "wandb").glob("offline-run-*"))) < runs:
            time.sleep(0.05)
        return processes()

    tracker = WandbTracker("offline", tmp_path, print)
    told(tracker)
    few = until(2)
    for nth in range(30):
        tracker.trial_started(trial(f"t{nth:03d}"))
    assert until(32) == few and set(few) == {"wandb-core", "wandb-symon"}
    tracker.search_ended("finished", SIX)
    tracker.close()


def test_a_picture_that_is_missing_costs_the_picture_alone(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = WandbTracker("offline", tmp_path, said.append)
    told(tracker)
    tracker.trial_started(trial("u"))
    tracker.trial_ended(trial("u"), "finished", SIX, tmp_path / "missing.png", "")
    tracker.search_ended("finished", SIX)
    tracker.close()
    assert len(said) == 1 and "logs offline" in said[0]
    assert held(tmp_path, "u")["summary"]["state"] == "finished"
    best = json.loads(inspect(folders_of(tmp_path, "c5")[-1], "--summary"))
    assert best["summary"]["attacked_accuracy"] == 0.5 and best["exit_code"] == 0


def test_a_shell_of_one_run_names_none_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An agent's shell has variables that name its own run; a search opens many."""
    for name in ("RUN_ID", "NAME", "RUN_GROUP", "JOB_TYPE", "SWEEP_ID"):
        monkeypatch.setenv(f"WANDB_{name}", "theirs")
    monkeypatch.setenv("WANDB_RESUME", "must")
    wandb.teardown()
    said: list[str] = []
    tracker = WandbTracker("offline", tmp_path, said.append)
    told(tracker)
    tracker.search_ended("finished", SIX)
    tracker.close()
    assert said == []
    names = {held(tmp_path, key)["name"] for key in ("search", "t", *(c.candidate for c in SIX))}
    assert names == {"shown", "shown-t", *(f"shown-{c.candidate}" for c in SIX)}
    assert b"theirs" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*.wandb"))


WRITES = """
import os, sys
from pathlib import Path
from search.tracking.wandb_writer import WandbWriter
about = {"name": "s", "group": "s", "job_type": "search", "tags": [], "config": {}}
writer = WandbWriter("offline", Path(sys.argv[1]), print)
writer.open("search", about)
writer.write("search", lambda run: print(run.id, os.environ["WANDB_SERVICE"], flush=True) or os._exit(9))
writer.close()
"""


def test_a_search_that_was_killed_finds_its_run_free_whatever_wandb_core_its_parent_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    wandb_setup.singleton().ensure_service()
    said = [
        subprocess.run([sys.executable, "-c", WRITES, str(tmp_path)], capture_output=True, text=True, cwd=ROOT).stdout
        for _ in range(2)
    ]
    (first, own), (second, another) = (line.split() for line in said)
    assert first == second and len({own, another, os.environ["WANDB_SERVICE"]}) == 3
