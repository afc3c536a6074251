"""The W&B workspace of a search: made on a server that runs here, of names that the search really logged."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from search.engine.run import run
from search.study.study import Study
from search.tracking.wandb_tracker import WandbTracker
from search.tracking.wandb_workspace import view
from spaces.exceptions import InputError
from tests.conftest import digits_study
from tests.support.engine import Trained
from tests.support.wandb_server import Server, serving

KEY = "0123456789abcdef0123456789abcdef01234567"


class Lab(Server):
    """A W&B server that keeps the workspaces, too, which are made on it."""

    def __init__(self) -> None:
        super().__init__()
        self.views: list[dict[str, Any]] = []

    def _GetDefaultEntity(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": "lab"}}

    def _UpsertView2(self, given: dict[str, Any]) -> dict[str, Any]:
        self.views.append(given)
        return {"upsertView": {"view": {"id": "v", "name": given["name"]}, "inserted": True}}


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home without a key; wandb is set up anew."""
    home = tmp_path_factory.mktemp("home")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ERROR_REPORTING", "WANDB_SILENT"):
        monkeypatch.setenv(name, "true" if name == "WANDB_SILENT" else "false")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    with serving(Lab()) as server:
        assert isinstance(server, Lab)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


def logged(study: Study) -> list[str]:
    """Log a search on the server; return what the user was told."""
    said: list[str] = []
    tracker = WandbTracker("online", study.folder, said.append)
    assert run(study, [tracker], debug=True, work=Trained(lambda params: 0.5).work()) == "finished"
    tracker.close()
    return said


def spec_of(given: dict[str, Any]) -> dict[str, Any]:
    return json.loads(given["spec"])["section"]


def panels(given: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the configurations of a workspace's panels, by their kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for section in spec_of(given)["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            found.setdefault(panel["viewType"], []).append(panel["config"])
    return found


def test_a_workspace_shows_what_the_search_logged(lab: Lab, tmp_path: Path) -> None:
    study = digits_study(tmp_path, trials=2, refine=0)
    (line,) = logged(study)
    assert line.startswith(f"W&B {lab.url}")
    url = view(study)
    (made,) = lab.views
    assert re.fullmatch(rf"{lab.url}/lab/crucible\?nw=\w+", url)
    assert (made["entityName"], made["projectName"], made["type"]) == ("lab", "crucible", "project-view")
    assert made["displayName"] == "smoke: puvae on digits/A"
    shown = panels(made)
    (runs,) = spec_of(made)["runSets"]
    assert runs["filters"]["filters"][0]["key"]["name"] == "group" and runs["filters"]["filters"][0]["value"] == "smoke"

    found = {run.about["jobType"]: run for run in lab.runs.values()}
    training, candidate, search = found["training"], found["candidate"], found["search"]
    (scatter,) = shown["Scatter Plot"]
    assert (scatter["xAxis"], scatter["yAxis"]) == ("summary:latency_ms_p50", "summary:attacked_accuracy")
    assert "white-box, Linf eps 0.3" in scatter["chartTitle"]
    figures = {"latency_ms_p50", "attacked_accuracy", "clean_accuracy"}
    assert figures <= set(candidate.summary) and not figures & set(training.summary)
    first, second = (key["key"]["name"] for key in runs["sort"]["keys"])
    assert (first, second) == ("jobType", "attacked_accuracy") and not runs["sort"]["keys"][0]["ascending"]
    assert sorted(found) == ["candidate", "search", "training"]  # those with curves come first
    assert set(runs["runFeed"]["columnPinned"]) - {"run:displayName"} <= {
        f"summary:{name}" for name in candidate.summary
    }

    config = json.loads(candidate.about["config"])
    (knobs,) = shown["Parallel Coordinates Plot"]
    paths = [column["accessor"].partition(":")[2].split(".value.") for column in knobs["columns"][:-2]]
    assert sorted(knob for _, knob in paths) == ["conv_maps", "lambda_kl", "lambda_rc", "sigma_eps"]
    assert all(knob in config[when]["value"] for when, knob in paths)
    swept = {
        json.loads(run.about["config"])["inference"]["value"]["sigma_eps"]
        for run in lab.runs.values()
        if run.about["jobType"] == "candidate"
    }
    assert len(swept) > 1

    logs = {name for point in training.history.values() for name in point}
    learning, best = shown["Run History Line Plot"]
    assert learning["xAxis"] == "epoch" and {"epoch", *learning["metrics"]} <= logs
    assert {"trial", *best["metrics"]} <= {name for point in search.history.values() for name in point}
    assert shown["Parameter Importance"] == [shown["Parameter Importance"][0] | {"targetKey": "attacked_accuracy"}]
    charts, pictures = shown["Media Browser"]
    assert set(pictures["mediaKeys"]) <= set(search.summary) and "pareto" in charts["mediaKeys"]
    assert {"pareto", "leaderboard"} <= set(search.summary)
    assert '"val":"leaderboard"' in json.dumps(shown["Weave"], separators=(",", ":"))


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("offline", r"those of smoke are not: upload them with: wandb sync \S+/smoke/wandb \S+/candidates/wandb$"),
        ("disabled", r"those of smoke are not: search again under another name with --wandb online, which trains "),
    ],
)
def test_a_search_of_which_no_run_is_on_a_server_is_told_how_to_get_there(
    mode: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    study = digits_study(tmp_path, trials=1, refine=0)
    tracker = WandbTracker(mode, study.folder, print)
    run(study, [tracker], debug=True, work=Trained(lambda params: 0.5).work())
    tracker.close()
    with pytest.raises(InputError, match=said) as refused:
        view(study)
    assert "\n" not in str(refused.value)


def test_a_run_that_was_uploaded_later_counts(lab: Lab, tmp_path: Path) -> None:
    study = digits_study(tmp_path)
    folder = study.folder / "wandb" / "offline-run-20260101_000000-smoke-t001-0000"
    folder.mkdir(parents=True)
    (folder / "run-smoke-t001-0000.wandb.synced").touch()
    assert view(study).startswith(lab.url)


def test_what_a_server_that_failed_left_behind_does_not_count(online: Study) -> None:
    (online.folder / "wandb" / "offline-run-20260101_000100-smoke-t001-0000").mkdir()
    with pytest.raises(
        InputError, match=r"those of smoke are not: upload them with: wandb sync \S+/smoke/wandb \S+/candidates/wandb$"
    ):
        view(online)


@pytest.fixture
def online(tmp_path: Path) -> Study:
    """A search that has a run on some server."""
    study = digits_study(tmp_path)
    (study.folder / "wandb" / "run-20260101_000000-smoke-t001-0000").mkdir(parents=True)
    return study


def test_no_key_is_told_in_one_line(online: Study) -> None:
    with pytest.raises(InputError, match="^a workspace needs a W&B key, but there is none: run `wandb login` or set "):
        view(online)


def test_a_server_that_is_not_there_is_told_at_once(online: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        with pytest.raises(InputError, match=f"a workspace needs a W&B server, but {url} does not answer: .*refused"):
            view(online)


@pytest.mark.parametrize("trouble", ["refuses", "fails"])
def test_a_server_that_does_not_take_it_is_told_in_one_line(
    trouble: Any, online: Study, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.tracking.wandb_workspace.SAVE_S", 2.0)  # wandb would try again and again
    lab.trouble = trouble
    with pytest.raises(InputError, match=f"a workspace needs a W&B server that takes it, but {lab.url} d") as refused:
        view(online)
    assert "\n" not in str(refused.value) and KEY not in str(refused.value)
