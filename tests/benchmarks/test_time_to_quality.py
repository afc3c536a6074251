"""The benchmark of time to quality counts right: trainings and epochs until a search is within a point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.time_to_quality import Spent, Table, Training, grid_of, header, row, spend, study_of
from search.engine.run import run
from search.study.candidate import Candidate
from search.study.study import Study
from spaces.exceptions import InputError
from spaces.space import Params, SearchSpace
from tests.support.engine import scored

FOUND = 13
"""The training, in the grid's order, that is good; the others are useless."""


def table_of(study: Study, curve: Callable[[int], list[float]]) -> Table:
    space = study.resolved.space
    grid = SearchSpace(space.train, {}, space.defaults).grid()
    trainings = {}
    for i, params in enumerate(grid, start=1):
        found = [Params(params.train, {"sigma_eps": sigma}) for sigma in (0.1, 0.0)]  # the usual one first
        attacked = 0.6 if i == FOUND else 0.2
        candidates = [scored(found[0], attacked), scored(found[1], attacked - 0.1)]
        if i == 3:  # an alarm makes it worthless
            candidates = [_alarming(scored(one, 0.9)) for one in found]
        trainings[Table.key(params)] = Training(curve(i), candidates)
    return Table(scored(Params({}, {}), 0.1), trainings, 0.6, sum(len(t.curve) for t in trainings.values()))


def _alarming(candidate: Candidate) -> Candidate:
    return replace(candidate, score=replace(candidate.score, alarms=("gradient",)))


@pytest.fixture
def small(tmp_path: Path) -> Study:
    """A part of the grid, of 18 trainings."""
    knobs = {"lambda_rc": 1.0, "lambda_ce": [0.1, 1.0, 10.0]}
    return study_of(tmp_path, "replay", method="grid", stopping="none", knobs=knobs)


def test_the_grid_is_the_papers() -> None:
    assert grid_of(Path("quality"), 1).resolved.space.trainings() == 216


def test_all_epochs_until_the_goal_count(small: Study) -> None:
    table = table_of(small, lambda i: [0.5] * 8)
    assert (table.epochs, len(table.trainings)) == (18 * 8, 18)
    assert spend(small, table.best - 0.01, table.work()) == Spent(FOUND, 8 * FOUND, True)


def test_epochs_of_stopped_trainings_count_too(small: Study) -> None:
    table = table_of(small, lambda i: [0.9 if i == FOUND else 0.5 - i / 100] * 8)  # each worse than those before
    halving = small.model_copy(update={"stopping": "halving", "grace": 1})  # at epochs 1 and 3, after 8 trainings
    assert spend(halving, table.best - 0.01, table.work()) == Spent(FOUND, 8 * 8 + (FOUND - 9) * 1 + 8, True)


def test_a_goal_that_is_never_reached_costs_everything(small: Study) -> None:
    table = table_of(small, lambda i: [0.5] * 8)
    assert spend(small, 0.61, table.work()) == Spent(18, 18 * 8, False)


def test_a_table_is_read_back_from_a_finished_grid(small: Study) -> None:
    table = table_of(small, lambda i: [0.5, 0.25] * 4)
    assert run(small, [], debug=True, work=table.work()) == "finished"
    assert Table.of(small) == table


def test_a_grid_that_has_not_ended_is_no_table(small: Study) -> None:
    table = table_of(small, lambda i: [0.5] * 8)
    assert spend(small, 0.0, table.work()).trainings == 1
    with pytest.raises(InputError, match="a table needs a finished grid, but replay has 1 of 18 trainings"):
        Table.of(small)


def test_a_line_has_medians_the_share_of_the_grid_and_what_missed(small: Study) -> None:
    table = table_of(small, lambda i: [0.5] * 8)
    found = [[Spent(2, 16, True), Spent(4, 32, True), Spent(18, 144, False)], [Spent(1, 8, True)] * 3]
    assert row("ours", found, [table, table]) == "| ours | 32 (4) | 8 (1) | 12 (2) | 0.083 | 1 of 6 |"
    lines = header([1, 2], [table, table]).splitlines()
    assert {line.count("|") for line in lines} == {7}
    assert "| 144 (18), best 60 % | 144 (18), best 60 % |" in lines[2]
