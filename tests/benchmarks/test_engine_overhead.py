"""What the engine itself costs: simulated trials through the real engine, in this process and under Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import latency_under_load
from benchmarks.engine_overhead import alone, asked_table, main, ours, proposals, table
from benchmarks.simulated import SLOTS, simulated, sweep
from search.optimizer.history import SearchHistory
from search.optimizer.proposer import Proposer

CPU = torch.device("cpu")


def test_a_simulated_search_goes_through_the_whole_engine(tmp_path: Path) -> None:
    timed = ours(tmp_path, 8, 0.0, debug=True)
    folder = tmp_path / "scale"
    assert len((folder / "candidates.csv").read_text().splitlines()) == 8 * 6 + 1
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 8 + 1
    assert (tmp_path / "display.txt").read_text().count("finished, 6 candidates") == 8
    assert (folder / "report.html").exists()
    history = SearchHistory(simulated(tmp_path, trials=8, method="tpe"))
    assert len(history.candidates()) == 48 and len(history.remeasured()) > 1  # the front was timed again
    assert len(timed.each_ms) == len(timed.driver_mib) == 4 and timed.ideal == 0
    assert "| 8 of 0 s | ours, tpe |" in table([timed])


def test_made_up_scores_are_lawful_and_depend_on_the_knobs_alone(tmp_path: Path) -> None:
    space = simulated(tmp_path).resolved.space
    params = space.drawn(np.random.default_rng(0))
    candidates = sweep(params)
    assert candidates[0].params == params and candidates == sweep(params)
    assert len({c.candidate for c in candidates}) == len({c.score.attacked_error for c in candidates}) == 6
    assert len({c.score.latency_ms_p50 for c in candidates}) == 1
    assert all(0 <= c.score.attacked_error <= 1 for c in candidates)


def test_what_a_proposal_costs_is_measured_at_ever_more_candidates() -> None:
    rows = list(proposals("random", 60, patience_s=10.0))
    assert [row.candidates for row in rows] == [12, 30, 60]
    assert all(row.propose_ms > 0 and row.finish_ms > 0 for row in rows)
    assert len(asked_table(rows).splitlines()) == 5


def test_a_sampler_that_takes_too_long_is_asked_no_more() -> None:
    assert [row.candidates for row in proposals("random", 6000, patience_s=0.0)] == [6]


def test_the_rows_can_be_had_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["scale", "--only", "proposals", "--methods", "random", "--upto", "6", "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    (row,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert row["method"] == "random" and row["candidates"] == 6


def test_a_trial_waits_for_the_disk_only_where_something_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposer, waits = Proposer(simulated(tmp_path)), list[int]()
    monkeypatch.setattr("search.optimizer.journal.os.fsync", waits.append)
    proposal = proposer.propose()
    assert proposal is not None
    proposer.finish(proposal.name, sweep(proposal.params), {"seconds": 1.0})
    # The trial itself, five further candidates, the end: of some 25 lines, the rest of which went to disk with these.
    assert len(waits) <= 8


@pytest.mark.slow
def test_the_lane_is_measured_beside_a_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    rows = latency_under_load.compare([1], 1, CPU)
    assert [(row.neighbours, row.device_lock) for row in rows] == [(0, True), (1, False), (1, True)]
    assert rows[0].ratio == 1 and all(row.ms_p50 > 0 for row in rows)
    assert latency_under_load.table(rows, CPU).count("\n| 1 | ") == 2


@pytest.mark.slow
def test_all_slots_are_used_and_a_free_one_is_filled_at_once() -> None:
    """Ray's own rule would start one worker, and drop the next whenever a trial ends before it is up."""
    timed = alone("ours", 16, 0.5)
    assert timed.ideal == 0.5 * 16 / SLOTS
    assert timed.trials_s < 3 * timed.ideal + 0.5 * timed.start, timed
