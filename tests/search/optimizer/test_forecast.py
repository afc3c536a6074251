"""The model of a search: where it proposes, what it stops, and that it knows after a crash what it knew before."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import defenses
import spaces
from search.optimizer.forecast import FIRST, Forecast
from search.optimizer.proposer import Proposer
from search.study.candidate import Proposal
from search.study.loading import make_study
from search.study.study import Study
from spaces.domain import contains
from spaces.space import Params
from tests.conftest import digits_study
from tests.support.engine import scored


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)


def paper(folder: Path, **fields: object) -> Study:
    """PuVAE's grid of 216 trainings, of 8 epochs."""
    return digits_study(
        folder,
        **{
            "space": "paper",
            "knobs": {},
            "trials": 216,
            "epochs": 8,
            "cheap_images": 100,
            "eval_images": 100,
            **fields,
        },
    )


def good(params: Params) -> float:
    """An accuracy with one best training among 216."""
    far = [math.log10(float(params.train[name])) for name in ("lambda_rc", "lambda_kl", "lambda_ce")]
    return 0.1 + 0.4 * math.exp(-((far[0] - 1) ** 2 + (far[1] + 1) ** 2 + (far[2] - 2) ** 2) / 4)


def searched(study: Study, trainings: int, accuracy: Callable[[Params], float] = good) -> tuple[Proposer, list[float]]:
    """Return a search that ran so many trainings to their end, and their accuracies."""
    proposer, found = Proposer(study), []
    for _ in range(trainings):
        proposal = proposed(proposer)
        found.append(accuracy(proposal.params))
        for epoch in range(1, 9):
            proposer.forecast.saw(proposal.name, epoch, found[-1] * (0.5 + epoch / 16))
        proposer.finish(proposal.name, [scored(proposal.params, found[-1])], {"curve": [(8, found[-1])]})
    return proposer, found


def proposed(proposer: Proposer) -> Proposal:
    proposal = proposer.propose()
    assert proposal is not None
    return proposal


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_finds_the_best_of_216_trainings_in_25(tmp_path: Path, seed: int) -> None:
    study = paper(tmp_path, seed=seed)
    best = max(good(params) for params in study.resolved.space.grid())
    assert max(searched(study, 25)[1]) > best - 0.01


def test_the_first_proposals_are_far_from_each_other(tmp_path: Path) -> None:
    proposer = Proposer(paper(tmp_path))
    proposals = [proposed(proposer).params for _ in range(FIRST)]
    places = np.array([proposer.forecast._place(params) for params in proposals])
    apart = np.abs(places[:, None] - places[None]).sum(-1) + 10 * np.eye(FIRST)
    assert apart.min() >= 0.8


def test_workers_at_once_get_different_regions(tmp_path: Path) -> None:
    proposer, _ = searched(paper(tmp_path), 8)
    places = np.array([proposer.forecast._place(proposed(proposer).params) for _ in range(6)])
    apart = np.abs(places[:, None] - places[None]).max(-1) + 10 * np.eye(6)
    assert apart.min() > 0.1 and np.median(apart) > 0.3


def test_a_hopeless_training_is_stopped_and_a_hopeful_one_goes_on(tmp_path: Path) -> None:
    proposer, found = searched(paper(tmp_path), 12)
    assert max(found) - min(found) > 0.2
    for share, stops in ((0.05, True), (1.0, False)):
        proposal = proposed(proposer)
        curve = {epoch: share * max(found) * (0.5 + epoch / 16) for epoch in (1, 2, 4)}
        assert any([proposer.forecast.stops(proposal.name, *seen) for seen in curve.items()]) is stops


def test_early_scores_that_say_nothing_stop_no_training_that_is_better(tmp_path: Path) -> None:
    proposer, dice = Proposer(paper(tmp_path)), np.random.default_rng(0)
    best, missed = 0.0, 0
    for _ in range(25):
        proposal = proposed(proposer)
        final, stopped = good(proposal.params), False
        for epoch in (1, 2):
            stopped = stopped or proposer.forecast.stops(proposal.name, epoch, dice.uniform(0.1, 0.3))
        missed += stopped and final > best + 0.02
        if not stopped:
            best = max(best, final)
            proposer.forecast.saw(proposal.name, 8, final)
            proposer.finish(proposal.name, [scored(proposal.params, final)], {})
    assert missed <= 1 and best > 0.4


def test_nothing_is_stopped_before_a_result_or_the_grace(tmp_path: Path) -> None:
    proposer = Proposer(paper(tmp_path))
    assert not proposer.forecast.stops(proposed(proposer).name, 1, 0.0)
    proposer, _ = searched(paper(tmp_path / "other", grace=3), 12)
    name = proposed(proposer).name
    assert not proposer.forecast.stops(name, 2, 0.0) and proposer.forecast.stops(name, 3, 0.0)


def test_a_fast_training_is_not_stopped_for_a_slow_one(tmp_path: Path) -> None:
    knobs = {"conv_maps": [2, 4, 8], "lambda_ce": [0.1, 1.0, 10.0, 100.0]}
    study = paper(tmp_path, knobs=knobs, space="smoke", trials=12)
    proposer, forecast = Proposer(study), None
    ms = {2: 1.0, 4: 5.0, 8: 20.0}
    for maps, accuracy in ((8, 0.6), (8, 0.6), (4, 0.5), (2, 0.2), (8, 0.6), (2, 0.2)):
        proposal = proposed(proposer)
        params = Params({**proposal.params.train, "conv_maps": maps}, proposal.params.inference)
        forecast = proposer.forecast
        forecast._trainings[proposal.name].at = forecast._place(params)
        for epoch in (4, 8):
            forecast.saw(proposal.name, epoch, accuracy)
        forecast.ended(proposal.name, [scored(params, accuracy, ms=ms[maps])])
    assert forecast is not None
    usual = study.resolved.space.setting(study.resolved.space.usual_of)
    verdicts = {}
    for maps in (2, 8):
        forecast.began(f"new {maps}", Params({**usual.train, "conv_maps": maps}, usual.inference))
        verdicts[maps] = forecast.stops(f"new {maps}", 4, 0.2)
    assert verdicts == {2: False, 8: True}


def test_a_resumed_search_knows_what_it_knew(tmp_path: Path) -> None:
    study = paper(tmp_path)
    before = searched(study, 10)[0].forecast
    after = Proposer(study).forecast
    for name, training in before._trainings.items():
        again = after._trainings[name]
        assert (again.accuracy, again.images, again.latency) == (training.accuracy, training.images, training.latency)
        assert (again.at == training.at).all() and not again.running


def test_an_infeasible_training_counts_as_bad(tmp_path: Path) -> None:
    proposer = Proposer(paper(tmp_path, min_clean_accuracy=0.9))
    for clean in (0.95, 0.5):
        proposal = proposed(proposer)
        proposer.finish(proposal.name, [scored(proposal.params, 0.6, clean=clean)], {})
    first, second = proposer.forecast._trainings.values()
    assert first.accuracy == pytest.approx(0.6) and second.accuracy == pytest.approx(0.2)


@pytest.mark.parametrize("defense", defenses.names())
@pytest.mark.parametrize("space", ["wide", "smoke"])
def test_proposals_lie_in_every_space(tmp_path: Path, defense: str, space: str) -> None:
    if space not in spaces.names(defense):
        pytest.skip(f"{defense} has no space {space}")
    fields = {"defense": defense, "task": "mnist/A", "space": space, "trials": 50, "wandb": "disabled"}
    study = make_study({**fields, "storage": str(tmp_path), "name": "s"})
    forecast = Forecast(study, study.resolved.space, 0)
    rng = np.random.default_rng(0)
    for number in range(9):
        params = forecast.propose(None)
        flat, domains = params.flat(), study.resolved.space.searched()
        for name, domain in domains.items():
            assert contains(domain, flat[name]) or not study.resolved.space.matters(name, flat)
        assert study.resolved.space.complete({n: v for n, v in flat.items() if n in domains}).train == params.train
        forecast.began(f"t{number}", params)
        forecast.ended(f"t{number}", [scored(params, float(rng.random()), ms=float(rng.random()))])
