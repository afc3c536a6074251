"""The dashboard: a real server over real studies, asked by HTTP and opened in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import optuna_dashboard._app  # type: ignore[import-untyped]
import pytest
from optuna.trial import TrialState
from rich.console import Console

from search.engine.run import run
from search.exceptions import StorageError
from search.optimizer.history import SearchHistory, journal_path
from search.optimizer.proposer import Proposer
from search.report import dashboard
from search.report.dashboard import Followed, Shown, server
from search.study import ranking
from search.study.candidate import Candidate
from search.study.study import Study
from search.study.sync import JOURNAL
from spaces.exceptions import InputError
from spaces.space import Params
from tests.conftest import digits_study
from tests.support.engine import scored
from tests.support.paths import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --window-size=1300,1200 "
    "--virtual-time-budget=10000 --dump-dom"
).split()


@contextmanager
def served(study: Study, folder: Path) -> Iterator[str]:
    """Serve a study at a free port; yield the address."""
    with socket.socket() as free:
        free.bind((dashboard.HOST, 0))
        port = free.getsockname()[1]
    with server(study, port, folder) as site:
        thread = Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://{dashboard.HOST}:{site.server_port}"
        finally:
            site.shutdown()
            thread.join()


def asked(url: str) -> Any:
    with urlopen(url, timeout=20) as answer:
        return json.load(answer)


def attributes(trial: dict[str, Any]) -> dict[str, str]:
    return {each["key"]: each["value"] for each in trial["user_attrs"]}


def scored_at(params: Params, attacked: float, ms: float, clean: float, device: str = "this") -> Candidate:
    found = scored(params, attacked, ms=ms, clean=clean)
    return replace(found, score=replace(found.score, device=device))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A real, very small search on real digits."""
    fields: dict[str, Any] = {
        "trials": 1,
        "threat": "oblivious",
        "suite": "puvae",
        "refine": 0,
        "epochs": 2,
        "eps": 8 / 255,
    }
    few = {"train_images": 200, "eval_images": 20, "cheap_images": 10, "classifier_epochs": 1}
    study = digits_study(tmp_path_factory.mktemp("runs"), **fields, **few)
    assert run(study, [], debug=True) == "finished"
    return study


@pytest.mark.filterwarnings("ignore:Target and region quantiles")
def test_a_search_is_served_in_its_own_words(searched: Study, tmp_path: Path) -> None:
    history, before = SearchHistory(searched), journal_path(searched).read_bytes()
    with served(searched, tmp_path) as site:
        found = asked(f"{site}/api/studies/0")
        assert asked(f"{site}/api/studies/0/param_importances")["param_importances"]
        with urlopen(f"{site}/csv/0") as answer:
            table = answer.read().decode().splitlines()
    assert found["name"] == "smoke"
    assert found["objective_names"] == ["attacked error (oblivious, Linf eps 8/255)", "latency, p50 in ms"]
    told = {each["key"]: each["value"] for each in found["user_attrs"]}
    assert told["threat"] == "oblivious, Linf eps 8/255" and told["task"] == "digits/A"
    assert len(found["trials"]) == len(history.optuna.trials) == len(table) - 1 == 6
    values = {attributes(t)["candidate"]: t["values"] for t in found["trials"]}
    assert values == {c.candidate: [c.score.attacked_error, c.score.latency_ms_p50] for c in history.candidates()}
    [proposed] = [t for t in found["trials"] if attributes(t).get("trial") == "t001"]
    curve = [[each["step"], each["value"]] for each in proposed["intermediate_values"]]
    assert curve == history.trials()[0].user_attrs["curve"] and len(curve) == 2
    best = [attributes(t)["candidate"] for t in found["best_trials"]]
    assert set(best) == {c.candidate for c in ranking.front(searched, history.candidates())}
    assert journal_path(searched).read_bytes() == before


def test_the_front_keeps_to_the_constraints_and_counts_candidates_alone(tmp_path: Path) -> None:
    study = digits_study(tmp_path, min_clean_accuracy=0.9)
    proposer = Proposer(study)
    proposal = proposer.propose()
    assert proposal is not None
    figures = [(0.5, 9.0, 0.95, "this"), (0.9, 1.0, 0.2, "this"), (0.4, 5.0, 0.95, "this"), (0.4, 6.0, 0.95, "this")]
    figures += [(0.3, 7.0, 0.95, "that"), (0.2, 8.0, 0.95, "that")]
    settings = [Params(proposal.params.train, {"sigma_eps": sigma}) for sigma in (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)]
    found = [scored_at(at, *each) for at, each in zip(settings, figures, strict=True)]
    proposer.finish(proposal.name, found, {"curve": []})
    lesson = proposer._lesson(scored_at(settings[0], 1.0, 0.1, 1.0), {"from": "earlier"}, None)
    proposer.optuna.add_trial(lesson)
    with served(study, tmp_path) as site:
        said = asked(f"{site}/api/studies/0")
    assert [t["number"] for t in said["best_trials"]] == sorted(
        t.number for t in proposer.optuna.trials if t.values in ([0.5, 9.0], [0.6, 5.0], [0.7, 7.0])
    )
    feasible = {tuple(t["values"]): max(t["constraints"]) <= 0 for t in said["trials"]}
    assert not feasible[(1 - 0.9, 1.0)] and not feasible[(0.0, 0.1)]  # so that its charts grey them out
    assert sum(feasible.values()) == 5


def test_new_trials_appear_while_a_search_runs(study: Study, tmp_path: Path) -> None:
    proposer = Proposer(study)
    with served(study, tmp_path) as site:
        assert asked(f"{site}/api/studies/0")["trials"] == []
        first = proposer.propose()
        assert first is not None
        proposer.finish(first.name, [scored(first.params, 0.5)], {"curve": [[1, 0.3]]})
        second, third = proposer.propose(), proposer.propose()
        assert second is not None and third is not None
        proposer.stop(second.name, TrialState.FAIL, {"reason": "it diverged"})
        until = time.monotonic() + 30
        while len(trials := asked(f"{site}/api/studies/0")["trials"]) < 3 and time.monotonic() < until:
            time.sleep(0.2)
    assert [t["state"] for t in trials] == ["Complete", "Fail", "Running"]
    assert attributes(trials[1])["reason"] == "it diverged"


def test_whatever_would_write_is_refused(searched: Study, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in searched.folder.rglob("*") if path.is_file()}
    shown = Shown(searched, Followed(searched, tmp_path / JOURNAL))
    routes = [r for r in optuna_dashboard._app.create_app(shown).routes if r.method not in ("GET", "HEAD")]
    assert len(routes) > 10
    with served(searched, tmp_path) as site:
        for route in routes:
            path = re.sub(r"<[^>]*>", "0", route.rule)
            body = json.dumps({"user_attrs": {"a": 1}, "state": "Fail", "version": 1, "body": "a note"}).encode()
            request = Request(site + path, body, {"Content-Type": "application/json"}, method=route.method)
            with pytest.raises(HTTPError) as refused:
                urlopen(request, timeout=20)
            assert refused.value.code == 405, path
            assert "only reads" in json.load(refused.value)["reason"]
    with pytest.raises(StorageError, match="only reads"):
        shown.delete_study(0)
    assert {path: path.read_bytes() for path in searched.folder.rglob("*") if path.is_file()} == before


def test_a_search_that_runs_elsewhere_is_fetched_again(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRUCIBLE_CACHE", str(tmp_path / "here"))
    monkeypatch.setattr(dashboard, "REFRESH_S", 0.0)
    monkeypatch.setattr(dashboard, "SHARE", 0.0)
    there = Proposer(study)
    here = study.model_copy(update={"storage": f"file://{study.storage}"})
    here.folder.mkdir(parents=True)
    shutil.copy(journal_path(study), journal_path(here))
    shown = Shown(here, Followed(here, tmp_path / JOURNAL))
    assert shown.get_all_trials(0) == []
    for number in range(2):
        proposal = there.propose()
        assert proposal is not None
        there.finish(proposal.name, [scored(proposal.params, 0.5)], {"curve": []})
        assert len(shown.get_all_trials(0)) == number + 1
    away = journal_path(study).rename(tmp_path / "away")
    assert len(shown.get_all_trials(0)) == 2  # what there is is shown
    assert journal_path(here).read_bytes() != away.read_bytes()  # a driver of this machine may be writing it


@pytest.mark.parametrize("notice", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_well_and_a_port_of_its_own_is_found_where_8080_is_taken(
    notice: signal.Signals, searched: Study, tmp_path: Path
) -> None:
    command = [sys.executable, "launch.py", "dashboard", searched.name, "--storage", str(searched.root)]
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((dashboard.HOST, dashboard.PORT))
            taken.listen()
        except OSError:
            pass  # somebody else has it: as well
        env = {**os.environ, "TMPDIR": str(tmp_path)}
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # A script ignores Ctrl-C for what it puts an `&` behind: there SIGTERM alone can end it.
        ctrl_c = signal.SIG_DFL if notice == signal.SIGINT else signal.SIG_IGN
        pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, ctrl_c)
        process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
        assert process.stdout is not None
        said = process.stdout.readline()
        [port] = re.findall(r"^smoke: http://127\.0\.0\.1:(\d+)/dashboard/studies/0 \(read-only", said)
        assert port != "8080" and asked(f"http://127.0.0.1:{port}/api/meta")
        process.send_signal(notice)
        rest, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and rest == "" and not list(tmp_path.glob("crucible-*"))


@pytest.mark.parametrize("port", [None, 70000, -1])
def test_a_port_that_cannot_be_had_is_named(port: int | None, searched: Study, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind((dashboard.HOST, 0))
        other.listen()
        wanted = other.getsockname()[1] if port is None else port
        with pytest.raises(InputError, match=f"^port must be a free one from 1 to 65535, but {wanted} is not to be "):
            server(searched, wanted, tmp_path)


def test_a_search_that_has_not_begun_has_no_dashboard(study: Study) -> None:
    with pytest.raises(InputError, match="a search that has begun is needed"):
        dashboard.serve(study, None, Console(quiet=True))
    assert not study.folder.exists()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed: apt-get install chromium")
def test_a_browser_draws_it_without_a_word_or_a_request_elsewhere(searched: Study, tmp_path: Path) -> None:
    log = tmp_path / "net.json"
    with served(searched, tmp_path) as site:
        more = [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}"]
        command = [str(CHROMIUM), *FLAGS, *more, f"{site}/dashboard/studies/0"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
    assert "Pareto Front" in ran.stdout and ran.stdout.count("main-svg") > 4
    assert "attacked error (oblivious, Linf eps 8/255)" in ran.stdout
    events = [event.get("params") or {} for event in json.loads(log.read_text())["events"]]
    # What the browser asks for on its own behalf has no origin.
    asked_for = {e["url"] for e in events if "url" in e and e.get("initiator", "not an origin") != "not an origin"}
    assert f"{site}/static/bundle.js" in asked_for
    assert [url for url in asked_for if not url.startswith((site, "data:", "blob:"))] == []
