"""One driver in virtual time: the whole engine is exercised, and no training costs more than the first."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import driver_scale
from benchmarks.driver_scale import Driven, drive, table
from benchmarks.simulated import simulated
from search.engine.controller import Controller
from search.optimizer.history import SearchHistory
from search.optimizer.journal import Line
from search.optimizer.proposer import Proposer
from search.report.summary import summarise

GROWTH = 2  # a processor's own speed varies by half while it is shared
"""The last quarter of a search may cost so many times the CPU time of the first, per training; it costs 0.7 times."""


@pytest.fixture(autouse=True)
def _short_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let reports follow each other without pauses, in which Ray Tune asks for a trial ten times a second."""
    monkeypatch.setattr(driver_scale, "SECONDS", 20.0)


def grown(row: Driven) -> float:
    """Of the dearest quarter, over the first; the last one starts few trainings, since starts run ahead of ends."""
    return max(row.each_ms) / row.each_ms[0]


def test_a_simulated_cluster_goes_through_the_whole_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_scale, "DYING", 0.3)
    row = drive(tmp_path, 4, 12 * 6, wandb="disabled", stopping="halving")
    folder = tmp_path / "scale"
    summary = summarise(simulated(tmp_path, trials=12, method="forecast", epochs=20, stopping="halving"))
    assert summary.ended == 12 and not summary.faults or all(f.state == "restarted" for f in summary.faults)
    assert row.deaths == sum(trial.restarts for trial in summary.trials) > 0
    assert all(len(trial.curve) == 20 for trial in summary.trials if trial.state == "finished")
    assert (
        len((folder / "candidates.csv").read_text().splitlines())
        == row.candidates + 1
        == 6 * summary.count("finished") + 1
    )
    lines = (tmp_path / "display.txt").read_text().splitlines()
    assert sum(" epoch " in line for line in lines) == sum(len(trial.curve) for trial in summary.trials)
    busy = [trial.seconds for trial in summary.trials if trial.state == "finished"]
    assert all(seconds and 15 < seconds < 70 for seconds in busy)  # of virtual time
    assert row.journal_mib > 0 and row.report_mib > 4 and "| 4 | " in table([row])


def test_the_last_trainings_of_a_search_cost_no_more_than_the_first(tmp_path: Path) -> None:
    row = drive(tmp_path, 20, 150 * 6, wandb="disabled", method="random")
    assert grown(row) < GROWTH, row.each_ms


def test_a_cost_that_grows_with_the_search_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = Controller.started

    def slower(controller: Controller, name: str) -> None:
        for _ in range(6):
            controller.leaders()  # of all candidates
        started(controller, name)

    monkeypatch.setattr(Controller, "started", slower)
    assert grown(drive(tmp_path, 20, 150 * 6, wandb="disabled", method="random")) > GROWTH


def test_a_drivers_memory_holds_no_texts_of_candidates(tmp_path: Path) -> None:
    """A reader has their text; the driver, which lives for days, has the place of each in the journal."""
    drive(tmp_path, 2, 12, wandb="disabled")
    study = simulated(tmp_path, trials=2, method="forecast", epochs=20)
    reader, driver = SearchHistory(study), Proposer(study)
    for history, kind in ((reader, str), (driver, Line)):
        told = [trial.user_attrs["candidate"] for trial in history.all() if "candidate" in trial.user_attrs]
        assert len(told) == 12 and all(isinstance(text, kind) for text in told)
    assert driver.candidates() == reader.candidates()
    offsets = vars(driver._storage._backend)["_log_number_offset"]
    assert len(offsets) == 2  # the beginning, and the end
