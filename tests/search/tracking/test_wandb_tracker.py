"""What W&B shows of a search: offline runs are written by the real wandb and read back by its own reader."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from attacks.threat import ThreatModel
from search.engine.run import run
from search.formatting import percent
from search.optimizer.history import SearchHistory
from search.storage.fingerprint import fingerprint
from search.study.verdict import verdict_of_audit, verdict_of_search
from search.study.winner import NOT_AUDITED, keep
from search.tracking.wandb_panels import pareto_chart, risk_chart
from search.tracking.wandb_tracker import WandbTracker, log_exports
from search.trial.pictures import png
from spaces.space import Params
from tests.conftest import digits_study
from tests.support.engine import Pretence
from tests.support.paths import ROOT
from tests.support.wandb_log import (
    BARE,
    CURVED,
    FRONT,
    HOST,
    KEY,
    SECRET,
    SIX,
    STUDY,
    candidate,
    folder_of,
    folders_of,
    held,
    inspect,
    machine,
    points,
    records,
    summaries,
    told,
    trial,
)


@pytest.fixture(scope="module", autouse=True)
def _machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with machine(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search's folder: trials that overlap, one of every end, and one that is still open at the end."""
    folder = tmp_path_factory.mktemp("runs") / "shown"
    folder.mkdir()
    picture = folder.parent / "picture.png"
    picture.write_bytes(png(torch.rand(4, 2, 1, 8, 8), caption="defended, attacked: 7 rejected"))
    said: list[str] = []
    tracker = WandbTracker("offline", folder, said.append)
    tracker.search_started(STUDY, BARE)
    for name in ("good", "bad", "dull", "open", "r001"):
        tracker.trial_started(trial(name))
    for epoch in (1, 2, 3):
        tracker.epoch_ended(trial("good"), epoch, {"loss": 1 / epoch, "cheap": 0.1 * epoch})
        tracker.epoch_ended(trial("bad"), epoch, {"loss": 10.0 * epoch, "cheap": 0.0})
    tracker.trial_ended(trial("bad"), "failed", [], None, "CUDA out of memory")
    tracker.trial_ended(trial("dull"), "pruned", [], None, "")
    tracker.trial_ended(trial("good"), "finished", SIX, picture, "")
    tracker.trial_ended(trial("r001"), "finished", [CURVED], None, "")
    tracker.trial_ended(trial("r002"), "failed", [], None, "the fit is gone")
    tracker.search_ended("finished", [*SIX, CURVED])
    tracker.close()
    assert said == []
    return folder


SETTING = {"defense": "puvae", "task": STUDY.task, "threat": "white-box", "norm": "Linf", "eps": 0.3, "seed": 3}


def test_a_trainings_run_holds_its_setting_and_the_figures_of_no_candidate(searched: Path) -> None:
    run = held(searched, "good")
    assert run["config"]["train"] == {"latent": 128} and run["config"]["inference"] == {"draws": 6}
    assert SETTING.items() <= run["config"].items()
    assert run["name"] == "shown-good" and run["project"] == "crucible"
    assert run["tags"] == [STUDY.defense, STUDY.task, STUDY.threat]
    own = {"state": "finished", "reason": "", "candidates": len(SIX), "best_candidate": "c5", "epoch": 3}
    summary = {name: value for name, value in run["summary"].items() if not name.startswith("_")}
    assert summary == own | {"cheap": {"max": pytest.approx(0.3)}, "loss": {"min": pytest.approx(1 / 3)}}


def test_a_candidates_run_holds_its_setting_and_what_was_measured_at_it(searched: Path) -> None:
    for of in (*SIX, CURVED):
        run = held(searched, of.candidate)
        config, summary = run["config"], run["summary"]
        assert run["name"] == f"shown-{of.candidate}" and run["exit_code"] == 0
        assert config["train"] == of.params.train and config["inference"] == of.params.inference
        whose = {"candidate": of.candidate, "fit": "f", "trial": "r001" if of is CURVED else "good"}
        assert (SETTING | whose).items() <= config.items()
        measured: dict[str, Any] = {
            "attacked_accuracy": of.score.attacked_accuracy,
            "clean_accuracy": of.score.clean_accuracy,
        }
        measured |= {"latency_ms_p50": of.score.latency_ms_p50, "white-box/bpda": of.score.white_box_accuracy}
        measured |= {"feasible": of.candidate != "wrong", "verdict": f"{verdict_of_search(of, BARE)}; {NOT_AUDITED}"}
        assert measured.items() <= summary.items()
        assert not set(summary) & {"draws", "latent", "candidate", "eps"}
        assert ("picture" in summary) == (of.candidate == "c5")
    picture = held(searched, "c5")["summary"]["picture"]
    assert (folder_of(searched, "c5") / "files" / picture["path"]).read_bytes().startswith(b"\x89PNG")
    assert picture["caption"] == "defended, attacked: 7 rejected"


def test_a_candidate_is_one_file_and_stands_apart_from_the_trainings(searched: Path) -> None:
    run = folder_of(searched, "c1")
    assert run.parent == searched / "wandb" / "candidates" / "wandb"
    assert [path.suffix for path in run.rglob("*") if path.is_file()] == [".wandb"]


def test_a_refinement_that_failed_is_a_failed_candidate(searched: Path) -> None:
    run = held(searched, "r002")
    assert run["config"]["inference"] == {"draws": 6} and run["name"] == "shown-r002"
    assert (run["exit_code"], run["summary"]["reason"]) == (1, "the fit is gone")
    assert folders_of(searched, "r001") == []


def test_a_candidate_whose_latency_was_measured_again_is_continued(tmp_path: Path) -> None:
    tracker = WandbTracker("offline", tmp_path, print)
    told(tracker)
    again = replace(SIX[0], score=replace(SIX[0].score, latency_ms_p50=0.5))
    tracker.search_ended("finished", [again, *SIX[1:]])
    tracker.close()
    first, second = folders_of(tmp_path, "c1")
    assert json.loads(inspect(second, "--summary"))["summary"]["latency_ms_p50"] == 0.5
    assert json.loads(inspect(first, "--summary"))["summary"]["latency_ms_p50"] == 1.0
    assert len(folders_of(tmp_path, "c2")) == 1
    tracker = WandbTracker("offline", tmp_path, print, known=SIX)
    tracker.search_started(STUDY, BARE)
    tracker.search_ended("finished", [again, *SIX[1:]])
    tracker.close()
    assert [len(folders_of(tmp_path, of.candidate)) for of in SIX] == [3, 1, 1, 1, 1, 1]


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
    search = summaries(folder_of(searched, "search"))
    assert search["trial/attacked_accuracy"] == ("trial", "max") and search["trial/latency_ms_p50"] == ("trial", "min")


def test_runs_are_grouped_by_the_search_and_typed(searched: Path) -> None:
    found = {key: records(folder_of(searched, key), "run")[0] for key in ("search", "good", "c1", "curved")}
    assert {about["run_group"] for about in found.values()} == {"shown"}
    assert [about["job_type"] for about in found.values()] == ["search", "training", "candidate", "candidate"]


def test_the_searchs_run_alone_says_what_it_ran_on_and_by_which_code(searched: Path) -> None:
    run = folder_of(searched, "search")
    (about,) = records(run, "run")
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert about["notes"] == "what it is for" and about.get("git", {}).get("commit", "") == git.stdout.strip()
    told, hardware = records(run, "environment")
    assert told["python"].startswith("CPython 3.") and told["program"] == "launch.py" and hardware["cpu_count"] > 0
    assert not {"username", "email"} & set(told) and told["host"] == "crucible" and told["executable"] == "python"
    assert "torch==" in (run / "files" / "requirements.txt").read_text()
    (code,) = (artifact for artifact in records(run, "artifact") if artifact["type"] == "code")
    saved = {entry["path"] for entry in code["manifest"]["contents"]}
    assert {"launch.py", "defenses/puvae.py", "search/study/fields.py"} <= saved
    assert not any(path.startswith(("tests", ".venv")) or "__pycache__" in path for path in saved)
    for key in ("good", "c1"):
        assert [records(folder_of(searched, key), kind) for kind in ("environment", "stats", "artifact")] == [
            [],
            [],
            [],
        ]


@pytest.mark.parametrize("switched", [True, False])
def test_a_field_of_the_study_switches_system_metrics(tmp_path: Path, switched: bool) -> None:
    tracker = WandbTracker("offline", tmp_path, print)
    tracker.search_started(STUDY.model_copy(update={"system_metrics": switched}), BARE)
    tracker.search_ended("finished", [])
    tracker.close()
    found = records(folder_of(tmp_path, "search"), "stats")
    assert any("memory_percent" in stats["item"] for stats in found) == switched


def test_trials_that_overlap_do_not_mix(searched: Path) -> None:
    assert points(folder_of(searched, "good"), "loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert points(folder_of(searched, "bad"), "loss") == [(1, 10.0), (2, 20.0), (3, 30.0)]
    assert points(folder_of(searched, "dull"), "loss") == []


def test_the_searchs_run_sums_up_the_search(searched: Path) -> None:
    run = held(searched, "search")
    assert run["name"] == "shown" and run["config"]["min_clean_accuracy"] == 0.8
    assert (run["config"]["norm"], run["config"]["eps"]) == ("Linf", 0.3)  # the study leaves eps open
    summary = run["summary"]
    counts = {"trials/finished": 1, "trials/pruned": 1, "trials/failed": 1, "candidates": 7}
    assert counts.items() <= summary.items()
    assert summary["best/candidate"] == "c5" and summary["undefended/attacked_accuracy"] == 0.01
    assert summary["verdict"].startswith("better than no defense: ")
    assert (
        summary["verdict"].endswith("; not yet audited by heavier attacks") and "best/audited_accuracy" not in summary
    )
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
    bare = replace(BARE, score=replace(BARE.score, threat=ThreatModel("Linf", 8 / 255, "white-box")))
    assert "white-box, Linf eps 8/255, 100 images" in pareto_chart(STUDY, bare, SIX).layout.title.text


@pytest.mark.slow
def test_a_search_keeps_its_identities_when_it_is_resumed(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "one", tmp_path / "two"):
        folder.mkdir(exist_ok=True)
        tracker = WandbTracker("offline", folder, print)
        told(tracker)
        tracker.close()
    uploaded = tmp_path / "two" / "wandb"
    assert tracker.upload == f"wandb sync {uploaded} {uploaded}/candidates/wandb"
    for key in ("t", "c1"):
        folders = [*folders_of(tmp_path / "one", key), *folders_of(tmp_path / "two", key)]
        once, again, other = (records(folder, "run")[0]["run_id"] for folder in folders)
        assert once == again != other


AUDITED: dict[str, Any] = {
    **(accuracies := {"attacked_accuracy": 0.5, "white_box_accuracy": 0.5, "clean_accuracy": 0.9}),
    "images": 100,
    "threat": {"norm": "Linf", "eps": 0.1, "knowledge": "white-box"},
    "baselines": {"undefended": {**accuracies, "attacked_accuracy": 0.1}},
}


def worth(params: Params) -> float:
    return int(fingerprint(**params.flat()), 16) % 97 / 97


def test_every_candidate_of_a_search_has_a_run_of_its_own_setting(tmp_path: Path) -> None:
    study = digits_study(tmp_path, trials=3, refine=2, knobs={"sigma_eps": "0..1"}, wandb="offline")
    tracker = WandbTracker("offline", study.folder, print)
    run(study, [tracker], debug=True, work=Pretence(worth).work())
    tracker.close()
    candidates = SearchHistory(study).candidates()
    assert len({c.params.inference["sigma_eps"] for c in candidates}) > 5
    for of in candidates:
        log = held(study.folder, of.candidate)
        assert log["config"]["train"] == of.params.train and log["config"]["inference"] == of.params.inference
        assert log["summary"]["attacked_accuracy"] == pytest.approx(of.score.attacked_accuracy)
        assert log["name"] == f"smoke-{of.candidate}"
    for nth in (1, 2, 3):
        assert "attacked_accuracy" not in held(study.folder, f"t00{nth}")["summary"]


@pytest.mark.slow
def test_an_export_is_an_artifact_of_the_users_project_and_the_best_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_ENTITY", "lab")
    monkeypatch.setenv("WANDB_PROJECT", "purifiers")
    wandb.teardown()
    study = digits_study(tmp_path, trials=4, wandb="offline")
    run(study, [], debug=True, work=Pretence(worth).work())
    refused, best, other = SearchHistory(study).feasible()[:3]
    for of, alarms in ((refused, ["gradient: none"]), (best, [])):
        ours = {"search": "smoke", "candidate": of.candidate, "fit": of.fit, "threat": asdict(of.score.threat)}
        keep(study, {**AUDITED, **ours, "alarms": alarms})
    first, second = (tmp_path / "out" / c.candidate for c in (best, other))
    for folder in (second, first):
        folder.mkdir(parents=True)
        (folder / "evidence.json").write_text(json.dumps({**AUDITED, "gates": []}))
        (folder / "card.md").write_text("# A card")
    said: list[str] = []
    log_exports(study, [second, first], said.append)
    runs = [folder_of(study.folder, f"export-{folder.name}") for folder in (second, first)]
    for folder, logged_in in zip((second, first), runs, strict=True):
        (about,) = records(logged_in, "run")
        assert (about["entity"], about["project"], about["job_type"]) == ("lab", "purifiers", "export")
        run_of = json.loads(inspect(logged_in, "--summary"))
        (params,) = (c.params for c in SearchHistory(study).candidates() if c.candidate == folder.name)
        assert run_of["name"] == f"smoke-export-{folder.name}" and run_of["config"]["eps"] == 0.3
        assert run_of["config"]["train"] == params.train and run_of["config"]["inference"] == params.inference
        assert run_of["summary"]["audited/attacked_accuracy"] == 0.5
        assert run_of["summary"]["audited/verdict"] == verdict_of_audit(AUDITED)
    logged = [artifact for logged_in in runs for artifact in records(logged_in, "artifact")]
    assert {(artifact["name"], artifact["type"]) for artifact in logged} == {("puvae-digits-A", "model")}
    aliases = [set(artifact["aliases"]) - {"latest"} for artifact in logged]
    assert aliases == [{second.name}, {first.name, "best", "smoke"}]
    assert [entry["path"] for entry in logged[0]["manifest"]["contents"]] == ["card.md", "evidence.json"]
    assert all(Path(entry["local_path"]).exists() for entry in logged[0]["manifest"]["contents"])
    plain = {name: value for name, value in AUDITED.items() if not isinstance(value, dict)}
    assert json.loads(logged[0]["metadata"]) == plain | {"verdict": verdict_of_audit(AUDITED)}
    summary = json.loads(inspect(folder_of(study.folder, "search"), "--summary"))["summary"]
    assert (summary["best/candidate"], summary["best/audited_accuracy"]) == (first.name, 0.5)
    assert summary["verdict"].startswith(
        "better than no defense: 50.0 % against 10.0 % undefended (white-box, Linf eps "
    )
    assert summary["verdict"].endswith(
        f"; audited (the search's lighter attacks had left {percent(best.score.attacked_accuracy, ' %')}); "
        "the audit refused 1 candidate ranked above it"
    )
    folder = study.folder / "wandb"
    assert said == [f"logged offline; upload it with: wandb sync {folder} {folder}/candidates/wandb"]


def test_of_a_search_with_very_many_candidates_the_best_of_each_further_training_has_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.tracking.wandb_tracker.RUNS", 2)
    said: list[str] = []
    with machine(tmp_path):
        tracker = WandbTracker("offline", tmp_path, said.append)
        tracker.search_started(STUDY, BARE)
        for name, found in (("one", SIX[:2]), ("two", SIX[2:4]), ("three", SIX[4:])):
            tracker.trial_started(trial(name))
            tracker.trial_ended(trial(name), "finished", found, None, "")
        tracker.close()
    runs = {path.name.split("-")[3] for path in (tmp_path / "wandb" / "candidates" / "wandb").iterdir()}
    assert runs == {"c1", "c2", "c4", "c5"} and said == [
        "W&B: from here on, only the best candidate of a training has a run, after 2 of them"
    ]
