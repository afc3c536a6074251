"""The rules that stop trainings early: who goes on, and that what was stopped is nowhere among what finished."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from search.engine.run import open_controller, run
from search.engine.worker import Report, Work
from search.optimizer.early_stopping import Halving, Median, rule_of
from search.optimizer.history import SearchHistory, state_of
from search.optimizer.proposer import Proposer
from search.report.charts import charts
from search.report.summary import summarise
from search.storage.fingerprint import fingerprint
from search.study.candidate import Latency, Proposal
from search.study.ranking import front
from search.study.study import Study
from spaces.space import Params
from tests.conftest import digits_study
from tests.support.engine import scored


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


def test_halving_is_the_default_and_none_never_stops(tmp_path: Path) -> None:
    assert isinstance(rule_of(digits_study(tmp_path)), Halving)
    never = rule_of(digits_study(tmp_path, stopping="none", patience=0))
    assert not any(never.stops(f"t{i}", epoch, 1.0 - i) for i in range(20) for epoch in (1, 2))


def test_the_median_rule_by_hand() -> None:
    """Averages up to epoch 2 are 0.4, 0.6, 0.8: a best score below 0.6 stops there, one equal to it does not."""
    for score, stops in ((0.59, True), (0.6, False)):
        rule = Median(epochs=4, grace=2, patience=3)
        for trial, first, second in (("a", 0.3, 0.5), ("b", 0.5, 0.7), ("c", 0.8, 0.8)):
            assert not rule.stops(trial, 1, first) and not rule.stops(trial, 2, second)
        assert not rule.stops("d", 1, 0.0)  # grace
        assert rule.stops("d", 2, score) is stops
    assert not rule.stops("e", 3, 0.0)  # nobody else was here: patience
    early = Median(epochs=3, grace=1, patience=1)
    assert not early.stops("a", 1, 0.9) and not early.stops("b", 1, 0.9)
    assert not early.stops("b", 2, 0.1)  # its best so far counts, not its last
    assert early.stops("c", 1, 0.1) and not early.stops("c", 3, 0.1)  # the last epoch stops nobody


def slow_median(log: list[tuple[str, int, float]], grace: int, epochs: int, patience: int) -> bool:
    """Say whether the last report stops its trial, from the whole log of (trial, epoch, score)."""
    trial, epoch, _ = log[-1]
    latest = {(who, when): score for who, when, score in log}
    averages = []
    for other in {who for who, when in latest if when == epoch} - {trial}:
        seen = [score for (who, when), score in latest.items() if who == other and when <= epoch]
        averages.append(sum(seen) / len(seen))
    best = max(score for (who, when), score in latest.items() if who == trial and when <= epoch)
    if not grace <= epoch < epochs or len(averages) < max(1, patience):
        return False
    return best < float(np.median(averages))


def slow_halving(log: list[tuple[str, int, float]], rungs: set[int], factor: float, patience: int) -> bool:
    trial, epoch, score = log[-1]
    there = {who: what for who, when, what in log if when == epoch}
    if epoch not in rungs or len(there) <= patience:
        return False
    place = Fraction(len(there) - 1) * (1 - 1 / Fraction(factor))
    below, above = (sorted(there.values())[min(len(there) - 1, math.floor(place) + more)] for more in (0, 1))
    return score < below + (above - below) * float(place - math.floor(place)) - 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_each_rule_is_the_slow_one(seed: int) -> None:
    """Sixty trainings side by side in a random order, some of which come again after their worker died."""
    dice = random.Random(seed)
    epochs, grace, patience = dice.choice([(6, 1, 4), (9, 2, 0), (5, 3, 8)])
    halving = Halving(epochs=epochs, grace=grace, factor=3.0, patience=patience)
    middle = Median(epochs=epochs, grace=grace, patience=patience)
    log, at = list[tuple[str, int, float]](), {f"t{i}": 0 for i in range(60)}
    stopped = 0
    while at:
        trial = dice.choice(list(at))
        at[trial] += 1
        epoch, score = at[trial], round(dice.random(), 1)
        log.append((trial, epoch, score))
        assert halving.stops(trial, epoch, score) is slow_halving(log, halving.rungs, 3.0, patience)
        stops = middle.stops(trial, epoch, score)
        assert stops is slow_median(log, grace, epochs, patience)
        stopped += stops
        if stops or epoch == epochs:
            del at[trial]
        elif dice.random() < 0.1:
            at[trial] -= 1  # its worker died: the epoch comes again
    assert 5 < stopped < 60


def fit_of(params: Params) -> str:
    return fingerprint(**params.train)


def quality(params: Params) -> float:
    """How good a training is, by its knobs."""
    return random.Random(fit_of(params)).uniform(0.2, 0.9)


def execute(study: Study, proposal: Proposal, report: Report) -> dict[str, Any]:
    """Stand in for a training of three epochs, whose cheap scores grow towards what it is worth."""
    fit, worth = fit_of(proposal.params), quality(proposal.params)
    curve = [worth * share for share in (0.6, 0.8, 1.0)]
    for epoch, cheap in enumerate(curve, start=1):
        report(fit, epoch, {"cheap": cheap, "loss": 1.0})
    return {"candidates": [scored(proposal.params, worth).to_json()], "curve": curve, "picture": ""}


PRETENDED = Work(
    needed=lambda study: [],
    classifier=lambda study, architecture: None,
    quick=lambda study: 0.0,
    undefended=lambda study: scored(Params({}, {}), 0.0),
    execute=execute,
    remeasure=lambda study, candidate: Latency(5.5, 6.0, 1.0, 0.0, "", 30),
)


@pytest.mark.parametrize(
    ("stopping", "method"),
    [("halving", "tpe"), ("median", "tpe"), ("none", "tpe"), *(("halving", m) for m in ("nsga2", "gp", "qmc", "grid"))],
)
def test_what_was_stopped_is_nowhere_among_what_finished(tmp_path: Path, stopping: str, method: str) -> None:
    study = digits_study(tmp_path, stopping=stopping, method=method, epochs=3, trials=8, patience=2, refine=0)
    assert run(study, [], debug=True, work=PRETENDED) == "finished"
    history = SearchHistory(study)
    states = {t.user_attrs["trial"]: state_of(t) for t in history.trials()}
    pruned = {fit_of(history.space.complete(t.params)) for t in history.trials() if state_of(t) == "pruned"}
    assert len(states) == 8 and set(states.values()) <= {"finished", "pruned"}
    assert bool(pruned) is (stopping != "none")
    found = summarise(study)
    assert {c.fit for c in found.candidates}.isdisjoint(pruned) and len(found.candidates) == 8 - len(pruned)
    assert {c.fit for c in (*found.front, *history.feasible())}.isdisjoint(pruned)
    told = [t for t in history.optuna.trials if t.values is not None]
    assert all(t.state == TrialState.COMPLETE for t in told)
    assert not any(t.intermediate_values for t in history.optuna.trials)
    drawn = charts(found)
    assert set(drawn["candidates"]["id"]) == {c.candidate for c in found.candidates}
    assert {c["trial"]: c["state"] for c in drawn["curves"]} == states
    assert all(len(c["y"]) < 3 for c in drawn["curves"] if c["state"] == "pruned")
    assert found.rank_correlation is not None
    assert {name for name, *_ in found.rank_correlation.points} == {n for n, s in states.items() if s == "finished"}
    # A second driver judges as the first would have gone on to.
    first, again = rule_of(study), open_controller(study, []).rule
    for trial in history.trials():
        for epoch, score in trial.user_attrs["curve"]:
            first.stops(trial.user_attrs["trial"], epoch, score)
    verdicts = [[rule.stops("new", 1, score / 100) for score in range(100)] for rule in (first, again)]
    assert verdicts[0] == verdicts[1] and any(verdicts[0]) is (stopping != "none")


def test_optunas_best_trials_are_our_front(tmp_path: Path) -> None:
    """Where latencies tie, Optuna names each of the best, and the front one."""
    study = digits_study(tmp_path, min_clean_accuracy=0.9, method="tpe")
    proposer, dice = Proposer(study), random.Random(0)
    for _ in range(4):
        proposal = proposer.propose()
        assert proposal is not None
        candidates = [
            scored(
                Params(proposal.params.train, {"sigma_eps": s}), dice.random(), clean=dice.choice((0.8, 0.95)), ms=ms
            )
            for s, ms in zip(
                dict.fromkeys((proposal.params.inference["sigma_eps"], 0.0, 0.01, 1.0)), (1, 2, 4, 8), strict=False
            )
        ]
        proposer.finish(proposal.name, candidates, {})
    found = {(c.score.attacked_error, c.score.latency_ms_p50) for c in front(study, proposer.candidates())}
    assert found == {tuple(t.values) for t in proposer.optuna.best_trials} and len(found) > 1
    assert all(c.score.clean_accuracy == 0.95 for c in front(study, proposer.candidates()))
