"""What is said of a search while it runs and after: constraints, devices, pace, faults; and searches side by side."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from launch import main
from search import session
from search.engine.run import run
from search.engine.worker import Report
from search.optimizer.history import SearchHistory
from search.report.leaderboard import WORDS, leaderboard, refusals
from search.report.status import board, busy, details
from search.study import ranking
from search.study.candidate import Candidate, Proposal
from search.study.catalog import open_search
from search.study.study import Study
from search.study.winner import keep
from search.tracking.live_table import LiveTable
from spaces.space import Params
from tests.conftest import digits_study
from tests.search.cli.test_cli import launch
from tests.search.optimizer.test_early_stopping import PRETENDED, execute
from tests.support.engine import Pretence, scored
from tests.support.paths import ROOT

PARAMS = Params({"lambda_rc": 1.0}, {"sigma_eps": 0.0})


def on(device: str, attacked: float, ms: float, **more: Any) -> Candidate:
    found = scored(PARAMS, attacked, ms=ms)
    score = dataclasses.replace(found.score, device=device, **more)
    return dataclasses.replace(found, candidate=f"{device}-{attacked}-{ms}", score=score)


def test_latencies_of_different_devices_do_not_compare(study: Study) -> None:
    """The H200's slow candidate is beaten by its own fast one; the T4's slow ones only by each other."""
    fast, slow = on("H200", 0.6, 1.0), on("H200", 0.5, 2.0)
    other, alike, worse = on("T4", 0.6, 9.0), on("T4", 0.4, 5.0), on("T4", 0.4, 6.0)
    found = ranking.front(study, [worse, slow, alike, other, fast])
    assert found == [fast, other, alike]
    assert ranking.ranked([other, fast, on("H200", 0.6, 10.0)])[-1] is other
    for device in ("H200", "T4"):
        own = [c for c in (fast, slow, other, alike, worse) if c.score.device == device]
        assert ranking.front(study, own) == [c for c in found if c.score.device == device]


def test_each_constraint_and_gate_counts_what_it_refuses_and_what_it_refuses_alone(tmp_path: Path) -> None:
    study = digits_study(tmp_path, min_clean_accuracy=0.9, max_latency_ms=10)
    told = [
        on("", 0.5, 5.0),
        on("", 0.6, 20.0),
        on("", 0.7, 20.0, clean_accuracy=0.8),
        on("", 0.8, 5.0, alarms=("noise",)),
        on("", 0.9, 5.0, alarms=("gradient", "noise")),
    ]
    found = {(one.constraint, one.gate): (one.within, one.refused, one.alone) for one in ranking.refusals(study, told)}
    assert list(found.items()) == [
        (("alarms", ""), (3, 2, 2)),
        (("alarms", "noise"), (3, 2, 1)),
        (("alarms", "gradient"), (4, 1, 0)),
        (("max_latency_ms", ""), (3, 2, 1)),
        (("min_clean_accuracy", ""), (4, 1, 0)),
        (("max_clean_rejection", ""), (5, 0, 0)),
    ]
    assert refusals(study, told) == (
        "constraints: 1 of 5 candidates meet all; 2 of 5 fail the audit check noise (1 for this alone), 2 are slower "
        "than 10 ms (1 for this alone), 1 fails the audit check gradient, 1 has clean accuracy below 90.0 %; "
        "reasons overlap"
    )
    assert refusals(study, told[1:3]).startswith("no candidate meets all constraints: 2 of 2 are slower than 10 ms")
    assert refusals(study, told[:1]) == "constraints: 1 of 1 candidates meet all"
    assert "overlap" not in refusals(study, told[:2])
    assert [one.within for one in ranking.refusals(study, [])] == [0] * 4


def test_the_leaderboard_names_the_devices_where_there_are_several(study: Study) -> None:
    console = Console(width=300)
    with console.capture() as shown:
        console.print(leaderboard(study, [], None, [on("H200", 0.6, 1.0), on("T4", 0.5, 9.0)]))
    assert "timed on" in shown.get() and "T4" in shown.get()
    with console.capture() as shown:
        console.print(leaderboard(study, [], None, [on("T4", 0.5, 9.0)]))
    assert "timed on" not in shown.get()


def test_a_terminal_that_is_narrow_shows_the_leaderboard_in_parts_and_cuts_nothing(tmp_path: Path) -> None:
    study = digits_study(tmp_path, defense="puvae")
    knobs = {"lambda_rc": 0.001, "lambda_kl": 0.1, "conv_maps": 16, "sigma_eps": 0.25}
    best = dataclasses.replace(on("", 0.625, 1234.5, clean_accuracy=0.975), params=Params(knobs, {}))
    for width, parts in ((80, 2), (40, 5), (300, 1)):
        console = Console(width=width)
        with console.capture() as shown:
            console.print(leaderboard(study, list(knobs), best, [best]))
        lines = shown.get().splitlines()
        assert all(len(line.rstrip()) <= width for line in lines[1:]) and "…" not in shown.get()
        assert sum(line.startswith("candidate") for line in lines) == parts == shown.get().count("\nundefended")
        assert set(shown.get().split()) >= {"0.001", "lambda_rc", "62.5", "97.5", "1234.5", best.candidate}


def test_time_in_which_nothing_ran_is_not_counted() -> None:
    """Two side by side for 10 s and 15 s, an hour of nothing, one for 5 s, and one that runs since 2 s."""
    begin = datetime(2026, 1, 1)
    spans: list[tuple[int, int | None]] = [(0, 10), (5, 20), (3620, 3625), (3640, None)]
    trials = [
        FrozenTrial(
            number=nth,
            state=TrialState.RUNNING if end is None else TrialState.PRUNED,
            value=None,
            datetime_start=begin + timedelta(seconds=start),
            datetime_complete=None if end is None else begin + timedelta(seconds=end),
            params={},
            distributions={},
            user_attrs={},
            system_attrs={},
            intermediate_values={},
            trial_id=nth,
        )
        for nth, (start, end) in enumerate(spans)
    ]
    assert busy(reversed(trials), begin + timedelta(seconds=3642)) == 27
    assert busy([], begin) == 0


REASON = "ValueError: on purpose, [/x] and [1, 2]"
"""Words that a terminal might take for markup."""


def one_fails(study: Study, proposal: Proposal, report: Report) -> dict[str, Any]:
    time.sleep(0.1)
    return {"failed": REASON} if proposal.name == "t002" else execute(study, proposal, report)


def test_status_says_pace_rule_constraints_correlation_and_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = digits_study(tmp_path, epochs=3, trials=7, stopping="median", refine=0, max_latency_ms=1.0)
    assert run(study, [], debug=True, work=dataclasses.replace(PRETENDED, execute=one_fails)) == "finished"

    def status(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["launch.py", "status", "smoke", "--storage", str(tmp_path), *more])
        assert main() == 0
        return capsys.readouterr().out

    found = json.loads(status("--json"))
    assert (found["finished"], found["failed"], found["runs"], found["best"]) == (6, 1, False, None)
    assert (found["stopping"], found["refinements"], found["restarts"]) == ("median", 0, 0)
    assert found["failures"] == {"t002": REASON}
    assert found["feasible"] == 0 and found["constraints"][0]["constraint"] == "max_latency_ms"
    assert found["constraints"][0]["within"] == 0 and found["constraints"][0]["alone"] == 6
    last = found["rank_correlation"]["ranks"][-1]
    assert last["trainings"] == 6 and last["rho"] == pytest.approx(1)
    assert found["seconds"] > 0 and found["seconds_left"] is None
    assert found["trainings_per_minute"] == pytest.approx(7 / found["seconds"] * 60, rel=0.2)
    words = status()
    assert "6 of 7 finished, 1 failed" in words and " trainings a minute" in words
    assert (
        "stopping: median; quick scores (for early stopping) against final scores of 6 finished trainings: "
        "Spearman's rho 1.00, Kendall's tau 1.00" in words
    )
    assert "no candidate meets all constraints: 6 of 6 are slower than 1 ms" in words
    assert f"t002 failed: {REASON}" in words


def test_status_and_a_searchs_end_say_what_the_best_is_worth(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert session.begin(study.model_copy(update={"trials": 1}), Console(width=200), debug=True) == 0
    shown, found = capsys.readouterr().out, session.status(study)
    line = f"verdict on {found['best']['candidate']}: {found['verdict']}"
    assert " undefended" in found["verdict"] and found["verdict"].endswith("; not yet audited by heavier attacks")
    assert line in shown.splitlines() and WORDS in shown.splitlines() and line in details(found)


def test_status_says_whose_attacks_left_the_best_what_it_shows(tmp_path: Path) -> None:
    study = digits_study(tmp_path, trials=1)
    run(study, [], debug=True, work=Pretence(lambda params: 0.75).work())
    best = SearchHistory(study).feasible()[0]
    console = Console(width=300)

    def shown() -> str:
        with console.capture() as printed:
            console.print(board([session.status(study)]))
        return " ".join(printed.get().split())

    assert f"75.0 % by the search (white-box, Linf eps 0.3), {best.candidate}" in shown()
    ours = {"search": "smoke", "candidate": best.candidate, "fit": best.fit, "threat": asdict(best.score.threat)}
    accuracies = {"attacked_accuracy": 0.5, "white_box_accuracy": 0.5, "clean_accuracy": 0.9}
    keep(study, {**ours, **accuracies, "images": 100, "alarms": [], "baselines": {"undefended": accuracies}})
    assert f"75.0 % by the search, 50.0 % audited (white-box, Linf eps 0.3), {best.candidate}" in shown()
    assert session.status(study)["audited_accuracy"] == 0.5


def test_what_failed_is_told_in_its_own_words(study: Study) -> None:
    console = Console(width=300)
    with console.capture() as shown, closing(LiveTable(console, study, [], 1, 0)) as display:
        display.trial_ended(Proposal("t002", Params({}, {})), "failed", [], None, REASON)
    assert shown.get() == f"t002 failed: {REASON}\n"


def test_what_is_left_is_told_while_a_search_runs(tmp_path: Path) -> None:
    from search import session

    study = digits_study(tmp_path, epochs=3, trials=2, refine=0)
    run(study, [], debug=True, work=PRETENDED)
    longer = study.model_copy(update={"trials": 6})
    with study.store.lock("searches", study.name):
        found = session.status(longer)
    assert found["runs"] and found["seconds_left"] == pytest.approx(2 * found["seconds"], abs=0.2)


@pytest.mark.slow
def test_two_searches_at_once_share_classifiers_and_fits(tmp_path: Path) -> None:
    """The same two trainings asked for by both: one trains each, the other waits and loads it."""
    asked = "--task digits/A --space smoke --suite quick --eval-images 20 --cheap-images 10 --classifier-epochs 1 "
    asked += (
        f"--epochs 2 --knob sigma_eps=0,1 --debug --method grid --trials 2 --wandb disabled --storage {tmp_path} --name"
    )
    command = [sys.executable, str(ROOT / "launch.py"), "search", *asked.split()]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    searches = [subprocess.Popen([*command, name], cwd=ROOT, **pipes) for name in ("one", "other")]
    said = [search.communicate(timeout=550)[0] for search in searches]
    assert [search.returncode for search in searches] == [0, 0], said
    epochs = [line for text in said for line in text.splitlines() if " epoch " in line]
    assert len(epochs) == 4, epochs  # two trainings of two epochs, in whichever search
    ours, theirs = (SearchHistory(open_search(name, str(tmp_path))) for name in ("one", "other"))
    assert len(ours.as_measured()) == 4 and ours.as_measured() == theirs.as_measured()  # each times its own front again
    assert all(len(list(csv.DictReader((tmp_path / n / "candidates.csv").open()))) == 4 for n in ("one", "other"))
    assert len(list((tmp_path / ".store" / "fits").glob("[!.]*"))) == 2
    states = json.loads(launch("status", "--storage", str(tmp_path), "--json").stdout)
    assert [(state["name"], state["finished"], state["runs"]) for state in states] == [
        ("one", 2, False),
        ("other", 2, False),
    ]
    assert set(ours.remeasured()) <= {candidate.candidate for candidate in ours.as_measured()}
