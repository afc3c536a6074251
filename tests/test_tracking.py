"""Offline runs are written by the real wandb and read back by `wandb leet inspect`."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from wandb.sdk import wandb_setup
from wandb.util import get_core_path

from attacks.threat import ThreatModel
from search import logbook, wandb_run
from search.panels import pareto_chart, risk_chart
from search.pictures import png
from search.record import Record
from search.run import run
from search.score import Candidate, Score
from search.study import Study
from search.tracking import Tracker, log_exports
from search.wandb_run import Mode
from spaces.space import Params
from tests.conftest import digits_study
from tests.engine import Pretence

KEY = "0123456789abcdef" * 2 + "planted1"
SECRET = "planted-secret-in-the-environment"
HOST = "planted-host-name"
PARAMS = Params({"latent": 128}, {"draws": 6})
STUDY = Study.model_validate({"name": "shown", "seed": 3, "min_clean_accuracy": 0.8})


def candidate(name: str, attacked: float, ms: float, clean: float = 0.9, alarms: tuple[str, ...] = ()) -> Candidate:
    score = Score(
        threat=ThreatModel("Linf", 0.3, "white-box"),
        attacked_accuracy=attacked,
        attacked_error=1 - attacked,
        attacked_rejection=0.0,
        oblivious_accuracy=0.75,
        white_box_accuracy=attacked,
        clean_accuracy=clean,
        clean_rejection=0.0,
        latency_ms_p50=ms,
        latency_ms_p95=2 * ms,
        images=100,
        attacks={"white-box/bpda": attacked},
        alarms=alarms,
    )
    return Candidate(candidate=name, fit="f", defense="puvae", task="mnist/A", params=PARAMS, score=score)


BARE = candidate("undefended", 0.01, 0.0)
SIX = [candidate(f"c{i}", attacked=0.1 * i, ms=float(i)) for i in range(1, 6)]
FRONT = ["c5", "c4", "c3", "c2", "c1"]
CURVED = replace(
    SIX[2], candidate="curved", score=replace(SIX[2].score, risk_coverage=((0.0, 0.7), (0.02, 0.6), (0.05, 0.4)))
)
SIX.append(candidate("wrong", attacked=0.9, ms=9.0, clean=0.5))


@pytest.fixture(scope="module", autouse=True)
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A machine with secrets in its environment and no stored key."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ERROR_REPORTING", "WANDB_SILENT"):
            patch.setenv(name, "true" if name == "WANDB_SILENT" else "false")
        patch.setenv("HOME", str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("A_SECRET", SECRET)
        patch.setattr(socket, "gethostname", lambda: HOST)
        wandb.teardown()
        yield
        wandb.teardown()


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search's folder: trials that overlap, one of every end, and one that is still open at the end."""
    folder = tmp_path_factory.mktemp("runs") / "shown"
    picture = folder.parent / "picture.png"
    picture.write_bytes(png(torch.rand(4, 2, 1, 8, 8), caption="defended, attacked: 7 rejected"))
    said: list[str] = []
    tracker = Tracker("offline", folder, said.append)
    tracker.search_started(STUDY, BARE)
    for trial in ("good", "bad", "dull", "open", "r001"):
        tracker.trial_started(trial, PARAMS)
    for epoch in (1, 2, 3):
        tracker.epoch_ended("good", epoch, {"loss": 1 / epoch, "cheap": 0.1 * epoch})
        tracker.epoch_ended("bad", epoch, {"loss": 10.0 * epoch, "cheap": 0.0})
    tracker.trial_ended("bad", "failed", [], None, "CUDA out of memory")
    tracker.trial_ended("dull", "pruned", [], None, "")
    tracker.trial_ended("good", "finished", SIX, picture, "")
    tracker.trial_ended("r001", "finished", [CURVED], None, "")
    tracker.search_ended("finished", [*SIX, CURVED])
    tracker.close()
    assert said == []
    return folder


def folder_of(folder: Path, key: str) -> Path:
    (found,) = (folder / "wandb").glob(f"offline-run-*-{key}-????????")
    return found


def inspect(run: Path, *flags: str) -> str:
    """Return what `wandb leet inspect` prints; the command itself takes half a second to begin."""
    (log,) = run.glob("*.wandb")
    command = [get_core_path(), "leet", "inspect", "--no-observability", *flags, "--json"]
    command += ["--run-file", str(log), str(run.parent)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def held(folder: Path, key: str) -> dict[str, Any]:
    """Return what the run of a trial, or of the search, holds."""
    return json.loads(inspect(folder_of(folder, key), "--summary"))


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind, in order."""
    found = map(json.loads, inspect(run).splitlines())
    return [record[kind] for record in found if record["type"] == kind]


def points(run: Path, name: str) -> list[tuple[int, float]]:
    """Return (epoch, value) of every point of a metric."""
    items = [history["item"] for history in records(run, "history")]
    return [(item["epoch"], item[name]) for item in items if name in item]


def summaries(run: Path) -> dict[str, tuple[str, str]]:
    """Return against what each metric is drawn, and which of its values the summary keeps."""
    found = {metric["name"]: metric for metric in records(run, "metric") if "summary" in metric}
    return {name: (metric["step_metric"], *metric["summary"]) for name, metric in found.items()}


def timed(call: Callable[..., None], *args: Any) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def told(tracker: Tracker) -> list[float]:
    """Tell of a whole search but its end; return how long each call took."""
    calls: list[tuple[Any, ...]] = [(tracker.search_started, STUDY, BARE), (tracker.trial_started, "t", PARAMS)]
    calls += [(tracker.epoch_ended, "t", epoch, {"cheap": 0.5}) for epoch in range(1, 20)]
    calls += [(tracker.trial_ended, "t", "finished", SIX, None, "")]
    return [timed(*call) for call in calls]


def test_a_trials_run_holds_its_setting(searched: Path) -> None:
    run = held(searched, "good")
    assert run["config"]["train"] == {"latent": 128} and run["config"]["inference"] == {"draws": 6}
    about = {"defense": "puvae", "task": STUDY.task, "threat": "white-box", "eps": 0.3, "seed": 3}
    assert about.items() <= run["config"].items()
    assert run["name"] == "good" and run["project"] == "crucible"
    assert run["tags"] == [STUDY.defense, STUDY.task, STUDY.threat]


def test_a_trials_run_sums_up_its_best_feasible_candidate(searched: Path) -> None:
    summary = held(searched, "good")["summary"]
    best = {"candidate": "c5", "attacked_accuracy": 0.5, "oblivious_accuracy": 0.75, "clean_accuracy": 0.9}
    assert best.items() <= summary.items()
    assert summary["latency_ms_p50"] == 5.0 and summary["white-box/bpda"] == 0.5
    assert summary["threat"] == "white-box" and summary["candidates"]["nrows"] == len(SIX)
    picture = folder_of(searched, "good") / "files" / summary["picture"]["path"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert summary["picture"]["caption"] == "defended, attacked: 7 rejected"


@pytest.mark.parametrize(
    ("trial", "state", "exit_code", "reason"),
    [
        ("good", "finished", 0, ""),
        ("dull", "pruned", 0, ""),
        ("bad", "failed", 1, "CUDA out of memory"),
        ("open", "interrupted", 255, None),
    ],
)
def test_a_run_tells_how_its_trial_ended(
    searched: Path, trial: str, state: str, exit_code: int, reason: str | None
) -> None:
    run = held(searched, trial)
    assert (run["summary"]["state"], run["exit_code"]) == (state, exit_code)
    assert run["summary"].get("reason") == reason
    assert ("pruned" in run["tags"]) == (state == "pruned")


def test_metrics_are_drawn_by_epoch_and_sums_keep_the_most_robust_and_the_least_loss(searched: Path) -> None:
    assert summaries(folder_of(searched, "good")) == {"cheap": ("epoch", "max"), "loss": ("epoch", "min")}
    summary = held(searched, "good")["summary"]
    assert summary["loss"] == {"min": pytest.approx(1 / 3)} and summary["cheap"] == {"max": pytest.approx(0.3)}
    search = summaries(folder_of(searched, "search"))
    assert search["trial/attacked_accuracy"] == ("trial", "max") and search["trial/latency_ms_p50"] == ("trial", "min")


def test_runs_are_grouped_by_the_search_and_typed(searched: Path) -> None:
    found = {key: records(folder_of(searched, key), "run")[0] for key in ("search", "good", "r001")}
    assert {about["run_group"] for about in found.values()} == {"shown"}
    assert [about["job_type"] for about in found.values()] == ["search", "trial", "refinement"]


def test_trials_that_overlap_do_not_mix(searched: Path) -> None:
    assert points(folder_of(searched, "good"), "loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert points(folder_of(searched, "bad"), "loss") == [(1, 10.0), (2, 20.0), (3, 30.0)]
    assert points(folder_of(searched, "dull"), "loss") == []


def test_the_searchs_run_sums_up_the_search(searched: Path) -> None:
    run = held(searched, "search")
    assert run["name"] == "shown" and run["config"]["min_clean_accuracy"] == 0.8
    summary = run["summary"]
    counts = {"trials/finished": 1, "trials/pruned": 1, "trials/failed": 1, "candidates": 7}
    assert counts.items() <= summary.items()
    assert summary["best/candidate"] == "c5" and summary["undefended/attacked_accuracy"] == 0.01
    files = folder_of(searched, "search") / "files"
    board = json.loads((files / summary["leaderboard"]["path"]).read_text())
    column = {name: [row[nth] for row in board["data"]] for nth, name in enumerate(board["columns"])}
    assert column["attacked_accuracy"] == sorted(column["attacked_accuracy"], reverse=True)
    assert dict(zip(column["candidate"], column["feasible"], strict=True))["wrong"] is False
    assert [name for name, best in zip(column["candidate"], column["pareto"], strict=True) if best] == FRONT
    assert (files / summary["pareto"]["path"]).exists()
    assert summary["picture"]["caption"] == "defended, attacked: 7 rejected"  # of the best trial
    curve = json.loads((files / summary["risk_coverage"]["path"]).read_text())["data"][0]
    assert curve["x"] == [0.0, 0.02, 0.05] and curve["y"] == [0.7, 0.6, 0.4]


def test_no_secret_and_no_host_name_is_written(searched: Path) -> None:
    written = b"".join(path.read_bytes() for path in searched.rglob("*") if path.is_file())
    assert b"CUDA out of memory" in written
    for secret in (KEY, SECRET, HOST):
        assert secret.encode() not in written


def test_the_chart_names_the_threat_and_draws_the_feasible_front() -> None:
    beaten, alarmed = candidate("beaten", 0.2, 4.0), candidate("alarmed", 0.9, 0.1, alarms=("masked",))
    chart = pareto_chart(STUDY, BARE, [*SIX, beaten, alarmed])
    front = next(trace for trace in chart.data if trace.name == "Pareto front")
    assert list(front.text) == FRONT
    assert "white-box, Linf eps 0.3, 100 images" in chart.layout.title.text
    assert risk_chart(STUDY, BARE, SIX) is None  # none can reject


@pytest.mark.slow
def test_a_search_keeps_its_identities_when_it_is_resumed(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "one", tmp_path / "two"):
        tracker = Tracker("offline", folder, print)
        told(tracker)
        tracker.close()
    assert tracker.upload == f"wandb sync {tmp_path / 'two' / 'wandb'}"
    once, again = sorted((tmp_path / "one" / "wandb").glob("offline-run-*-t-*"))
    (other,) = (tmp_path / "two" / "wandb").glob("offline-run-*-t-*")
    assert once.name.split("-t-")[1][:8] == again.name.split("-t-")[1][:8] != other.name.split("-t-")[1][:8]


@pytest.mark.slow
def test_an_export_is_an_artifact_of_the_users_project_and_the_best_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_ENTITY", "lab")
    monkeypatch.setenv("WANDB_PROJECT", "purifiers")
    wandb.teardown()
    study = digits_study(tmp_path, trials=4, wandb="offline")
    run(study, [], debug=True, work=Pretence(lambda params: hash(str(params)) % 97 / 97).work())
    first, second = (tmp_path / "out" / c.candidate for c in Record(study).feasible()[1:3])
    for folder in (second, first):
        folder.mkdir(parents=True)
        (folder / "evidence.json").write_text(json.dumps({"attacked_accuracy": 0.5, "gates": []}))
        (folder / "card.md").write_text("# A card")
    said: list[str] = []
    log_exports(study, [second, first], said.append)
    run_folder = folder_of(study.folder, "export")
    (about,) = records(run_folder, "run")
    assert (about["entity"], about["project"], about["job_type"]) == ("lab", "purifiers", "export")
    logged = records(run_folder, "artifact")
    assert {artifact["name"] for artifact in logged} == {"puvae-digits-A"}
    aliases = [set(artifact["aliases"]) - {"latest"} for artifact in logged]
    assert aliases == [{second.name}, {first.name, "best", "smoke"}]
    assert [entry["path"] for entry in logged[0]["manifest"]["contents"]] == ["card.md", "evidence.json"]
    assert all(Path(entry["local_path"]).exists() for entry in logged[0]["manifest"]["contents"])
    assert json.loads(logged[0]["metadata"]) == {"attacked_accuracy": 0.5}
    assert said == [f"logged offline; upload it with: wandb sync {study.folder / 'wandb'}"]


def test_disabled_writes_and_says_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = Tracker("disabled", tmp_path / "runs", said.append)
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
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert found() == "disabled"


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
    tracker = Tracker(mode, tmp_path, said.append)
    assert max(told(tracker)) < 0.5
    assert timed(tracker.search_ended, "finished", SIX) < 0.5
    assert timed(tracker.close) < 5
    assert len(said) == 1 and dead in said[0] and "goes on without it" in said[0]
    assert tracker.mode == "disabled"


@pytest.mark.parametrize("dead", ["hangs"], indirect=True)
@pytest.mark.usefixtures("dead")
def test_the_end_of_a_search_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(logbook, "FLUSH_S", 0.2)
    monkeypatch.setattr(wandb_run, "PATIENCE_S", 0.5)
    said: list[str] = []
    tracker = Tracker("offline", tmp_path, said.append)
    told(tracker)
    tracker.search_ended("interrupted", SIX)
    assert timed(tracker.close) < 2
    tracker.close()
    assert len(said) == 1 and "goes on without it" in said[0]


def test_a_search_outlives_the_death_of_wandbs_own_process(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = Tracker("offline", tmp_path, said.append)
    told(tracker)
    while not list((tmp_path / "wandb").glob("*-t-*/files/media/table/*")):
        time.sleep(0.05)
    process = wandb_setup.singleton().assert_service()._proc
    assert process is not None
    process._process.kill()
    tracker.trial_started("u", PARAMS)
    tracker.trial_ended("u", "failed", [], None, "CUDA out of memory")
    tracker.search_ended("finished", SIX)
    tracker.close()
    assert tracker.mode == "offline" and len(said) == 1 and "logs offline" in said[0]
    logs = {key: list((tmp_path / "wandb").glob(f"offline-run-*-{key}-*/*.wandb")) for key in ("u", "search")}
    latest = [max(found, key=lambda log: log.stat().st_mtime_ns).parent for found in logs.values()]
    trial, search = (json.loads(inspect(run, "--summary")) for run in latest)
    assert trial["exit_code"] == 1 and search["summary"]["trials/finished"] == 1


def test_a_picture_that_is_missing_costs_the_picture_alone(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = Tracker("offline", tmp_path, said.append)
    told(tracker)
    tracker.trial_started("u", PARAMS)
    tracker.trial_ended("u", "finished", SIX, tmp_path / "missing.png", "")
    tracker.search_ended("finished", SIX)
    tracker.close()
    assert len(said) == 1 and "logs offline" in said[0]
    assert held(tmp_path, "u")["summary"]["state"] == "finished"
