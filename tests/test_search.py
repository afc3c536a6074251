"""Whole searches on real digits: under a real Ray, killed, interrupted and resumed; and their in-process twin."""

from __future__ import annotations

import csv
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import nn

import defenses.puvae
from defenses.base import Batches, Metrics
from search import session
from search.events import Listener
from search.record import Record, state_of
from search.run import run
from search.study import Study, read
from spaces.space import Params
from tests.conftest import digits_study
from tests.test_cli import ROOT, launch

SMOKE = ["--task", "digits/A", "--space", "smoke", "--eval-images", "60", "--cheap-images", "20"]
SMOKE += ["--classifier-epochs", "4", "--patience", "9"]


def start(storage: Path, name: str, *more: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch.py"), "search", "--name", name, "--storage", str(storage)]
    return subprocess.Popen(
        [*command, *SMOKE, *more],
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def rows(folder: Path) -> dict[str, dict[str, str]]:
    """Return candidates.csv by candidate; a candidate that stands twice fails."""
    path = folder / "candidates.csv"
    if not path.exists():
        return {}
    found = list(csv.DictReader(path.open()))
    assert len({row["candidate"] for row in found}) == len(found)
    return {row["candidate"]: row for row in found}


def wait_for(what: Callable[[], object], process: subprocess.Popen[str], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.05)


def below(pid: int) -> Iterator[tuple[int, str]]:
    """Yield pid and command of every process under `pid`."""
    children: dict[int, list[int]] = {}
    commands: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(re.sub(r"^.*\) ", "", (entry / "stat").read_text()).split()[1])
            commands[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.name))
    todo = [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            yield child, commands[child]
            todo.append(child)


def alive(pid: int) -> bool:
    """Say whether a process runs; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_killed_worker_loses_no_finished_candidate_and_the_search_ends_well(tmp_path: Path) -> None:
    search = start(tmp_path, "kill", "--trials", "4", "--epochs", "6", "--concurrent", "1", "--wandb", "offline")
    wait_for(lambda: len(rows(tmp_path / "kill")) >= 6, search)
    before = rows(tmp_path / "kill")
    progress = tmp_path / ".store" / "progress"
    wait_for(lambda: any(progress.glob("[0-9a-f]*")), search)  # the next trial is under way
    (worker,) = [pid for pid, command in below(search.pid) if "ray::ImplicitFunc" in command]
    os.kill(worker, signal.SIGKILL)
    output = search.communicate(timeout=300)[0]
    assert search.returncode == 0, output
    after = rows(tmp_path / "kill")
    assert len(after) == 24 and before.items() <= after.items()
    state = json.loads(launch("status", "kill", "--storage", str(tmp_path), "--json").stdout)
    assert (state["finished"], state["failed"], state["running"], state["candidates"]) == (4, 0, 0, 24)
    assert len(list((tmp_path / ".store" / "fits").glob("[!.]*"))) == 4
    assert "undefended" in output and "attacked accuracy under white-box, Linf eps 0.3" in output
    assert_seen_by_wandb(tmp_path / "kill")
    assert (tmp_path / "kill" / "report.html").stat().st_size > 1_000_000


def assert_seen_by_wandb(folder: Path) -> None:
    """Read a trial's run back with W&B's own reader."""
    runs = [path for path in (folder / "wandb").glob("offline-run-*") if "-t001" in path.name]
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", str(runs[0])]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in ("attacked_accuracy", "latency_ms_p50", "clean_accuracy", "lambda_rc", "cheap"):
        assert word in shown, shown


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_finishes_what_is_left(tmp_path: Path) -> None:
    search = start(tmp_path, "stop", "--trials", "3", "--epochs", "8", "--wandb", "disabled", "--concurrent", "1")
    wait_for(lambda: len(rows(tmp_path / "stop")) >= 6, search)
    second = launch("resume", "stop", "--storage", str(tmp_path))
    assert second.returncode == 2 and "a search must run once at a time" in second.stderr
    workers = [pid for pid, _ in below(search.pid)]
    search.send_signal(signal.SIGINT)
    output = search.communicate(timeout=120)[0]
    assert search.returncode == 130, output
    assert f"go on with: python launch.py resume stop --storage {tmp_path}" in output
    before = rows(tmp_path / "stop")
    assert workers and not [pid for pid in workers if alive(pid)]
    resumed = launch("resume", "stop", "--storage", str(tmp_path))
    assert resumed.returncode == 0, resumed.stderr
    after = rows(tmp_path / "stop")
    assert len(after) == 18 and before.items() <= after.items()
    trials = Record(read(tmp_path / "stop" / "study.yaml")).trials()
    assert [t.user_attrs["trial"] for t in trials] == ["t001", "t002", "t003"]


class Diary(Listener):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def trial_started(self, trial: str, params: Params) -> None:
        self.heard.append(f"{trial} started")

    def epoch_ended(self, trial: str, epoch: int, metrics: Metrics) -> None:
        self.heard.append(f"{trial} {epoch}")

    def trial_ended(self, trial: str, state: str, *rest: object) -> None:
        self.heard.append(f"{trial} {state}")


def test_the_in_process_twin_tells_the_same_story(tmp_path: Path) -> None:
    diary = Diary()
    assert run(digits_study(tmp_path, trials=2), [diary], debug=True) == "finished"
    assert diary.heard == [f"{t} {what}" for t in ("t001", "t002") for what in ("started", "1", "2", "finished")]


def test_a_defense_that_raises_fails_its_trial_and_not_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = defenses.puvae.PuVAE.fit

    def raises_once(self: defenses.puvae.PuVAE, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        if self.train_knobs.conv_maps == 8:
            raise RuntimeError("conv_maps 8 on purpose")
        yield from honest(self, batches, classifier)

    monkeypatch.setattr(defenses.puvae.PuVAE, "fit", raises_once)
    study = digits_study(tmp_path, trials=8)
    assert run(study, [], debug=True) == "finished"
    record = Record(study)
    states = [(state_of(t), t.user_attrs.get("reason", "")) for t in record.trials()]
    assert states.count(("failed", "RuntimeError: conv_maps 8 on purpose")) == 4
    assert states.count(("finished", "")) == 4 and len(record.candidates()) == 24


def test_pruned_trials_are_told_as_pruned_and_bring_no_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.9, 0.9, 0.1, 0.9, 0.9])
    monkeypatch.setattr("search.exam.Exam.cheap", lambda *args: next(scores))
    study = digits_study(tmp_path, trials=3, patience=1, halving=2.0)
    diary = Diary()
    assert run(study, [diary], debug=True) == "finished"
    assert diary.heard[-3:] == ["t003 1", "t003 2", "t003 finished"] and "t002 pruned" in diary.heard
    record = Record(study)
    assert [state_of(t) for t in record.trials()] == ["finished", "pruned", "finished"]
    assert [t.user_attrs["curve"] for t in record.trials()] == [[[1, 0.9], [2, 0.9]], [[1, 0.1]], [[1, 0.9], [2, 0.9]]]
    assert len(record.candidates()) == 12
    assert not list((tmp_path / ".store" / "progress").glob("*"))  # a pruned fit is not gone on with


def test_a_search_without_a_feasible_candidate_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    study: Study = digits_study(tmp_path, trials=1, min_clean_accuracy=1.0)
    assert session.begin(study, Console(width=160), debug=True) == 0
    shown = capsys.readouterr().out
    assert "no candidate is within the constraints" in shown and "undefended" in shown
    assert len(rows(study.folder)) == 6
    assert session.proceed(study, Console(width=160, quiet=True), debug=True) == 0  # nothing is left to do
    assert len(rows(study.folder)) == 6


@pytest.mark.slow
def test_a_search_runs_on_a_cluster_that_was_started_by_hand(tmp_path: Path) -> None:
    """`ray start` twice on one machine: two nodes, to which the code travels with the job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    options = {
        "env": os.environ | token,
        "cwd": tmp_path,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "start_new_session": True,
    }
    address = f"127.0.0.1:{port}"
    head = subprocess.Popen([*ray, "--head", f"--port={port}", "--include-dashboard=false"], **options)  # type: ignore[call-overload]
    nodes = [head]
    try:
        wait_for(lambda: answers(port), head, 60)
        nodes.append(subprocess.Popen([*ray, f"--address={address}"], **options))  # type: ignore[call-overload]
        time.sleep(5)
        more = ("--trials", "2", "--epochs", "2", "--wandb", "disabled", "--address", address)
        search = start(tmp_path, "away", *more, **token)
        output = search.communicate(timeout=300)[0]
        assert search.returncode == 0, output
        assert len(rows(tmp_path / "away")) == 12
    finally:
        for node in nodes:
            os.killpg(node.pid, signal.SIGTERM)
        for node in nodes:
            node.wait(60)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
