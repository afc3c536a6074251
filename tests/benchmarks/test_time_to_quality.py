"""The benchmark of time to quality: costs are counted right, and on real tables our search beats random and TPE."""

from __future__ import annotations

from contextlib import suppress
from statistics import geometric_mean, median

import pytest

from benchmarks.peers import randomly
from benchmarks.replay import CAP, FOLDER, Replay, Spent, Step, Table, reached, regret
from benchmarks.time_to_quality import lines, replayed

TABLES = sorted(FOLDER.glob("*.npz"))


@pytest.fixture(scope="module", params=TABLES, ids=[path.stem for path in TABLES])
def table(request: pytest.FixtureRequest) -> Table:
    return Table(request.param)


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)


def test_there_are_committed_tables() -> None:
    assert "puvae-digits" in {path.stem for path in TABLES}


def test_a_table_is_whole(table: Table) -> None:
    count = len(table.trainings)
    assert count == len({tuple(levels.values()) for levels in table.levels_T}) and table.epochs >= 6
    assert table.judged_TSN.shape == table.held_out_TSN.shape == table.clean_TSN.shape
    assert table.images == 300 and 0 < table.epoch_s and 0 < table.image_s
    whole = Replay(table, cap=1.001)
    for training in range(count):
        whole.train(training, table.epochs)
        whole.sweep(training)
    assert whole.cost == pytest.approx(table.whole_s) and table.winner == _winner(table)
    assert reached(table, whole.trail) <= 1 and regret(table, whole.trail, 1.0) >= 0


def _winner(table: Table) -> tuple[int, int]:
    """Return the best training and setting, by a loop."""
    every = [(t, s) for t in range(len(table.trainings)) for s in range(len(table.settings))]
    return max(every, key=lambda place: table.judged_TSN[place].mean())


def test_what_was_paid_for_once_is_free() -> None:
    table = Table(TABLES[0])
    replay = Replay(table)
    replay.train(3, 2)
    replay.train(3, 4)
    replay.train(3, 3)
    assert replay.cost == pytest.approx(4 * table.epoch_s)
    replay.attack(3, 0, 100)
    replay.attack(3, 0, 50)
    assert replay.cost == pytest.approx(4 * table.epoch_s + 100 * table.image_s) and replay.trail == []
    replay.attack(3, 0, table.images)
    assert replay.cost == pytest.approx(4 * table.epoch_s + table.images * table.image_s)
    (step,) = replay.trail
    assert step.judged == table.judged_TSN[3, 0].mean() and step.held_out == table.held_out_TSN[3, 0].mean()


def test_a_search_ends_at_its_cap_and_the_incumbent_is_chosen_by_the_judged_images() -> None:
    table = Table(TABLES[0])
    replay = Replay(table, cap=0.05)
    with pytest.raises(Spent):
        randomly(replay, 0)
    assert replay.cost / table.whole_s <= 0.05 and len(replay.trail) >= 2
    assert [step.judged for step in replay.trail] == sorted(step.judged for step in replay.trail)


def test_ours_beats_random_on_every_table_and_tpe_on_their_geometric_mean() -> None:
    """Median cost to the goal over a few seeds; a search that does not reach it within 0.3 of the grid costs 1.

    Where a twentieth of the grid is enough at random, that much is enough.
    """
    medians = {}
    for table in map(Table, TABLES):
        found = {
            arm: [min(1.0, reached(table, replayed(table, arm, seed, CAP))) for seed in range(5)]
            for arm in ("ours", "TPE")
        }
        found["random"] = [min(1.0, reached(table, at_random(table, seed, CAP))) for seed in range(40)]
        medians[table.name] = {arm: median(costs) for arm, costs in found.items()}
    assert all(costs["ours"] < max(costs["random"], 0.05) for costs in medians.values()), medians
    mean = {arm: geometric_mean(costs[arm] for costs in medians.values()) for arm in ("ours", "TPE")}
    assert mean["ours"] < 0.8 * mean["TPE"], medians


def at_random(table: Table, seed: int, cap: float) -> list[Step]:
    replay = Replay(table, cap)
    with suppress(Spent):
        randomly(replay, seed)
    return replay.trail


def test_the_table_of_results_names_seeds_and_what_was_not_reached() -> None:
    table = Table(TABLES[0])
    good = [Step(0.02, 0.5, 0.1), Step(0.04, 0.9, 1.0)]
    rows = [
        {"table": table.name, "arm": "ours", "seed": 0, "trail": good},
        {"table": table.name, "arm": "ours", "seed": 1, "trail": good},
        {"table": table.name, "arm": "theirs", "seed": 0, "trail": [(0.1, 0.2, 0.0)]},
    ]
    head, _, ours, theirs = lines(rows, [table])
    assert head.startswith("| search | ") and "| 0.040 (0.040 to 0.040; 2) | 2 of 2 | 0.040 |" in ours
    assert "not reached" in theirs and "| 0 of 1 | - |" in theirs
