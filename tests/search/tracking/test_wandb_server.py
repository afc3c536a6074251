"""W&B with a server: a stand-in on loopback keeps what the real wandb sends it, and fails in each way."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from search.engine.run import run
from search.optimizer.history import SearchHistory
from search.study.study import Study
from search.tracking import wandb_run
from search.tracking.wandb_tracker import WandbTracker
from search.tracking.wandb_writer import AT_ONCE
from tests.conftest import digits_study
from tests.support.engine import Pretence
from tests.support.wandb_log import BARE, KEY, SIX, STUDY, folder_of, held, machine, points, timed, trial
from tests.support.wandb_server import Server, Trouble, serving

EPOCHS = 6


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server, and an account on it."""
    with serving(Server()) as server, machine(tmp_path_factory.mktemp("home")) as patch:
        patch.setenv("WANDB_BASE_URL", server.url)
        patch.setattr(wandb_run, "PATIENCE_S", 6.0)
        yield server


def tell(tracker: WandbTracker, first: int = 1) -> None:
    """Tell of a search with one trial, but for its end."""
    tracker.search_started(STUDY, BARE)
    tracker.trial_started(trial("t"))
    for epoch in range(first, EPOCHS + 1):
        tracker.epoch_ended(trial("t"), epoch, {"loss": 1 / epoch, "cheap": 0.1 * epoch})


def end(tracker: WandbTracker) -> None:
    tracker.trial_ended(trial("t"), "finished", SIX, None, "")
    tracker.trial_started(trial("bad"))
    tracker.trial_ended(trial("bad"), "failed", [], None, "CUDA out of memory")
    tracker.trial_started(trial("dull"))
    tracker.trial_ended(trial("dull"), "pruned", [], None, "")
    tracker.search_ended("finished", SIX)
    tracker.close()


def test_runs_arrive_and_a_resumed_search_goes_on_in_them(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_run, "PATIENCE_S", 60.0)  # on a busy machine a server that is well is slow too
    said: list[str] = []
    for session in (1, 2):
        tracker = WandbTracker("online", tmp_path, said.append, ended={"finished": session - 1})
        tell(tracker)
        end(tracker)
        assert (tracker.mode, tracker.upload) == ("online", None)
    page = said.pop()
    assert said == [page] and page.startswith(f"W&B {server.url}/lab/crucible/runs/search-shown-")
    (trial,) = (run for name, run in server.runs.items() if name.startswith("t-"))
    assert trial.about["groupName"] == "shown" and trial.about["jobType"] == "training"
    assert trial.about["project"] == "crucible" and trial.about["tags"] == ["puvae", "mnist/A", "white-box"]
    epochs = [line["epoch"] for line in trial.history.values() if "loss" in line]
    assert epochs == [*range(1, EPOCHS + 1)] * 2 and trial.exit_code == 0
    assert [line["_step"] for line in trial.history.values()] == list(range(len(trial.history)))
    assert trial.summary["cheap"] == {"max": pytest.approx(0.6)}
    states = {name.split("-")[0]: (run.exit_code, run.summary["state"]) for name, run in server.runs.items()}
    assert states == {
        "search": (0, "finished"),
        "t": (0, "finished"),
        "bad": (1, "failed"),
        "dull": (0, "pruned"),
        **{of.candidate: (0, "finished") for of in SIX},
    }
    search = next(run for name, run in server.runs.items() if name.startswith("search-"))
    assert [line["trial"] for line in search.history.values() if "candidates" in line] == [1, 2, 3, 2, 3, 4]


def test_candidates_are_sent_several_at_once_to_a_server_that_is_far_away(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_run, "PATIENCE_S", 60.0)
    server.lag_s = 0.1
    tracker = WandbTracker("online", tmp_path, print)
    tell(tracker)
    many = [replace(SIX[0], candidate=f"c{nth:02d}") for nth in range(16)]
    tracker.trial_ended(trial("t"), "finished", many, None, "")
    tracker.search_ended("finished", many)
    tracker.close()
    assert {name[:3] for name, run in server.runs.items() if run.summary.get("feasible")} == {c.candidate for c in many}
    assert tracker.mode == "online" and 5 < server.most_open <= 2 + AT_ONCE  # two are the search's and the training's


def test_the_command_that_is_printed_uploads_both_sessions_of_an_offline_search(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        tracker = WandbTracker("offline", tmp_path, print)
        tell(tracker)
        end(tracker)
    assert tracker.upload == f"wandb sync {tmp_path}/wandb {tmp_path}/wandb/candidates/wandb" and server.runs == {}
    command = [sys.executable, "-m", *shlex.split(tracker.upload)]
    subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=tmp_path)
    (trial,) = (run for name, run in server.runs.items() if name.startswith("t-"))
    assert [line["epoch"] for line in trial.history.values() if "loss" in line] == [*range(1, EPOCHS + 1)] * 2
    assert [line["_step"] for line in trial.history.values()] == list(range(len(trial.history)))
    assert len(server.runs) == 4 + len(SIX) and trial.about["groupName"] == "shown"
    for of in SIX:
        (found,) = (run for name, run in server.runs.items() if name.startswith(f"{of.candidate}-"))
        config = json.loads(found.about["config"])
        assert config["inference"]["value"] == of.params.inference and config["eps"]["value"] == 0.3
        assert found.summary["attacked_accuracy"] == pytest.approx(of.score.attacked_accuracy)


@pytest.mark.parametrize(
    ("trouble", "begins"),
    [
        ("refuses", "at once"),
        ("down", "at once"),
        ("hangs", "at once"),
        ("fails", "later"),
        ("down", "later"),
        ("hangs", "later"),
    ],
)
def test_a_server_in_trouble_slows_nothing_and_leaves_a_whole_offline_copy(
    server: Server, tmp_path: Path, trouble: Trouble | Literal["down"], begins: str
) -> None:
    def strike() -> None:
        if trouble == "down":
            server.shutdown()
            server.server_close()
        else:
            server.trouble = trouble

    said: list[str] = []
    if begins == "at once":
        strike()
    tracker = WandbTracker(None, tmp_path, said.append)
    assert tracker.mode == "online" and timed(tell, tracker) < 0.5
    if begins == "later":
        assert server.begun.wait(20)
        strike()
    assert timed(end, tracker) < 12
    (line,) = (line for line in said if not line.startswith("W&B http"))
    assert "logs offline" in line and f"wandb sync {tmp_path}/wandb" in line and KEY not in line
    copy = folder_of(tmp_path, "t")
    assert [epoch for epoch, _ in points(copy, "loss")] == list(range(1, EPOCHS + 1))
    assert held(tmp_path, "t")["summary"]["candidates"] == len(SIX)
    assert all(held(tmp_path, of.candidate)["summary"]["latency_ms_p50"] == of.score.latency_ms_p50 for of in SIX)
    assert held(tmp_path, "search")["summary"]["state"] == "finished" and held(tmp_path, "bad")["exit_code"] == 1


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_what_a_server_had_of_a_run_is_not_doubled_when_the_copy_is_uploaded(server: Server, tmp_path: Path) -> None:
    tracker = WandbTracker("online", tmp_path, print)
    tell(tracker)
    while not any("loss" in line for run in server.runs.values() for line in run.history.values()):
        time.sleep(0.2)  # W&B sends it every 15 s
    server.trouble = "fails"
    end(tracker)
    server.trouble = None
    assert tracker.upload is not None
    command = [sys.executable, "-m", *shlex.split(tracker.upload)]
    subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=tmp_path)
    (trial,) = (run for name, run in server.runs.items() if name.startswith("t-"))
    assert [line["epoch"] for line in trial.history.values() if "loss" in line] == list(range(1, EPOCHS + 1))
    assert trial.summary["state"] == "finished" and trial.exit_code == 0


def test_a_search_finds_the_same_in_the_same_time_whatever_its_server_does(server: Server, tmp_path: Path) -> None:
    def found(study: Study) -> tuple[float, list[str]]:
        tracker = WandbTracker(study.wandb, study.folder, lambda line: None)
        worth = Pretence(lambda params: 0.5)
        start = time.perf_counter()
        run(study, [tracker], debug=True, work=worth.work())
        seconds = time.perf_counter() - start
        tracker.close()
        return seconds, sorted(c.candidate for c in SearchHistory(study).candidates())

    studies = [digits_study(tmp_path / mode, trials=5, wandb=mode) for mode in ("disabled", "online")]
    server.trouble = "hangs"
    (quiet_s, quiet), (troubled_s, troubled) = map(found, studies)
    assert quiet == troubled and len(quiet) > 4
    assert troubled_s < quiet_s + 1
