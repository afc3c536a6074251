"""Whether cheap scores rank trainings as final scores do, and what is said where they do not."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from search.optimizer.proposer import Proposer
from search.report.rank_correlation import Rank, RankCorrelation, rank_correlation, ranks
from search.study.study import Study
from spaces.space import Params
from tests.conftest import digits_study
from tests.support.engine import scored

CHEAP = [0.1, 0.5, 0.3, 0.9, 0.7, 0.2, 0.8, 0.4]


def slow_rho(a: list[float], b: list[float]) -> float:
    """Spearman's rho where nothing ties: 1 - 6 sum d^2 / (n (n^2 - 1))."""
    places = [[sorted(values).index(value) for value in values] for values in (a, b)]
    n = len(a)
    return 1 - 6 * sum((i - j) ** 2 for i, j in zip(*places, strict=True)) / (n * (n**2 - 1))


def slow_tau(a: list[float], b: list[float]) -> float:
    """Kendall's tau where nothing ties: pairs in the same order less the others."""
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    return sum(1 if (a[i] < a[j]) == (b[i] < b[j]) else -1 for i, j in pairs) / len(pairs)


def made_of(study: Study, curves: list[dict[int, float]], finals: list[float]) -> RankCorrelation:
    points = [(f"t{i}", curve[max(curve)], final) for i, (curve, final) in enumerate(zip(curves, finals, strict=True))]
    return RankCorrelation(study, True, points, ranks(curves, finals, [1]))


def test_rho_and_tau_are_the_slow_ones_at_each_epoch() -> None:
    dice = random.Random(0)
    curves = [{1: dice.random(), 3: dice.random(), 9: dice.random()} for _ in range(20)]
    curves[0].pop(3)  # as where an epoch is not known
    finals = [0.5 * curve[9] + 0.5 * dice.random() for curve in curves]
    for found, epoch in zip(ranks(curves, finals, [1, 3]), (1, 3, 9), strict=True):
        on = [(c[epoch], f) for c, f in zip(curves, finals, strict=True) if epoch in c]
        a, b = ([pair[side] for pair in on] for side in (0, 1))
        assert (found.epoch, found.trainings) == (None if epoch == 9 else epoch, len(on))
        assert found.rho == pytest.approx(slow_rho(a, b)) and found.tau == pytest.approx(slow_tau(a, b))
        assert found.rho and found.low and found.high and found.low < found.rho < found.high


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Over 300 samples of 30 pairs with a normal correlation of 0.6, whose rho is known: 6 / pi asin(0.3) = 0.582."""
    dice, covered = random.Random(1), 0
    for _ in range(300):
        a = [dice.gauss(0, 1) for _ in range(30)]
        b = [0.6 * x + 0.8 * dice.gauss(0, 1) for x in a]
        rank = ranks([{1: x} for x in a], b, [])[0]
        assert rank.low is not None and rank.high is not None
        covered += rank.low <= 0.582 <= rank.high
    assert 0.90 * 300 <= covered <= 0.99 * 300


def test_little_or_equal_scores_have_no_correlation_and_a_perfect_one_no_interval() -> None:
    assert ranks([{1: 0.1}] * 3, [0.1, 0.2, 0.3], [1]) == [Rank(1, 3), Rank(None, 3)]
    assert ranks([], [], [1]) == [Rank(1, 0), Rank(None, 0)]
    assert ranks([{1: 0.5}] * 9, CHEAP + [0.0], [])[0] == Rank(None, 9)
    perfect = ranks([{1: c} for c in CHEAP], CHEAP, [])[0]
    assert perfect.rho == pytest.approx(1) and perfect.low is None and not perfect.poor


def test_a_poor_guide_is_warned_of_with_what_to_do(tmp_path: Path) -> None:
    study = digits_study(tmp_path)
    good = made_of(study, [{1: c, 2: c} for c in CHEAP], CHEAP)
    assert good.warning == "" and "Spearman's rho 1.00, Kendall's tau 1.00, after epoch 1 1.00" in good.line
    early = made_of(study, [{1: 1 - c, 2: c} for c in CHEAP], CHEAP).warning
    assert early == (
        "the quick score after epoch 1 ranks badly (rho -1.00) 8 finished trainings; "
        "try a later --grace than 1, or --stopping none: good trainings may have been stopped"
    )
    never = study.model_copy(update={"stopping": "none"})
    flat = made_of(never, [{1: 0.2, 2: 0.2} for _ in CHEAP], CHEAP).warning
    assert flat == (
        "the quick score after epoch 1 is the same for all of 8 finished trainings; try more --cheap-images than 20"
    )
    assert "equal under attack" in made_of(study, [{2: c} for c in CHEAP], [0.0] * 8).warning
    few = made_of(study, [{1: 1 - c, 2: c} for c in CHEAP[:7]], CHEAP[:7])
    assert few.warning == ""
    assert made_of(study, [{2: 0.5}] * 4, CHEAP[:4]).line.endswith("no rank correlation, one of the two does not vary")
    assert made_of(study, [], []).line.endswith("of 0 finished trainings: no rank correlation, they need 4")


def test_final_scores_are_those_of_the_usual_setting_or_each_trainings_best(tmp_path: Path) -> None:
    """The best setting of all ranks the trainings the other way round."""
    study = digits_study(tmp_path)
    proposer = Proposer(study)
    usual = dict(proposer.space.usual())
    for nth in range(5):
        proposal = proposer.propose()
        assert proposal is not None
        at = [Params(proposal.params.train, setting) for setting in (usual, {"sigma_eps": 100.0})]
        told = [scored(at[0], nth / 10), scored(at[1], 0.9 - nth / 10)]
        proposer.finish(proposal.name, told, {"curve": [[1, 0.5], [2, nth / 10]]})
    candidates = proposer.candidates()
    found = rank_correlation(proposer, candidates)
    assert found.usual and found.setting == "at the usual inference setting"
    assert found.last.trainings == 5 and found.last.rho == pytest.approx(1)
    elsewhere = [replace(c, params=Params(c.params.train, {"sigma_eps": 0.5})) for c in candidates]
    found = rank_correlation(proposer, elsewhere)
    assert not found.usual and found.last.rho == pytest.approx(-1)
    assert found.to_json()["final"] == "at each training's best inference setting"
    assert found.points[0][:2] == ("t001", 0.0) and found.points[0][2] == pytest.approx(0.9)
