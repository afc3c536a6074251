"""Successive halving: where the rungs lie, and who goes on."""

from __future__ import annotations

import pytest

from search.halving import Halving


@pytest.mark.parametrize(
    ("epochs", "grace", "factor", "rungs"),
    [
        (9, 1, 3.0, {1, 3}),
        (27, 1, 3.0, {1, 3, 9}),
        (4, 1, 2.0, {1, 2}),
        (1, 1, 3.0, set()),
        (10, 2, 1.5, {2, 3, 4, 6, 9}),
        (5, 1, 1.1, {1, 2, 3, 4}),
    ],
)
def test_rungs_lie_at_powers_and_never_at_the_last_epoch(
    epochs: int, grace: int, factor: float, rungs: set[int]
) -> None:
    assert Halving(epochs=epochs, grace=grace, factor=factor, patience=0).rungs == rungs


def test_one_in_factor_goes_on() -> None:
    halving = Halving(epochs=9, grace=1, factor=3.0, patience=0)
    for i in range(300):
        halving.stops(f"t{i}", 1, i / 300)
    assert halving.stops("low", 1, 0.6) and not halving.stops("high", 1, 0.7)


def test_nobody_stops_before_patience_is_reached_nor_between_rungs() -> None:
    halving = Halving(epochs=9, grace=1, factor=3.0, patience=3)
    assert [halving.stops(f"t{i}", 1, 1 - i / 10) for i in range(5)] == [False, False, False, True, True]
    assert not halving.stops("late", 2, 0.0)


def test_a_trial_that_reaches_a_rung_again_is_counted_once() -> None:
    halving = Halving(epochs=9, grace=1, factor=2.0, patience=2)
    for _ in range(5):
        assert not halving.stops("same", 1, 0.0)


def test_equal_scores_all_go_on() -> None:
    halving = Halving(epochs=9, grace=1, factor=3.0, patience=0)
    assert not any(halving.stops(f"t{i}", 1, 0.0) for i in range(20))
