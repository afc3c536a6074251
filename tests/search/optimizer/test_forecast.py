"""The model of a search: where it proposes, and that it knows after a crash what it knew before."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import defenses
import spaces
from search.optimizer.forecast import Forecast
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


def test_a_space_that_cannot_be_listed_gets_no_proposal_twice(tmp_path: Path) -> None:
    proposer, _ = searched(paper(tmp_path, space="default"), 20)
    assert not [trial for trial in proposer.all() if trial.user_attrs.get("duplicate")]


@pytest.mark.parametrize("space", ["paper", "default"])
def test_the_first_training_is_the_middle_unless_one_began_elsewhere(tmp_path: Path, space: str) -> None:
    study = paper(tmp_path, space=space)
    forecast = Forecast(study, study.resolved.space, 0)
    unseen = list(study.resolved.space.grid()) if space == "paper" else None
    drawn = [study.resolved.space.drawn(np.random.default_rng(i)) for i in range(200)]

    def away(params: Params) -> float:
        return float(np.linalg.norm(forecast._places.of(params) - 0.5))

    assert away(forecast.propose(unseen)) <= min(map(away, unseen or drawn)) * (1 if unseen else 1.5)
    forecast.began("start", drawn[0])
    assert len({away(forecast.propose(unseen)) for _ in range(8)}) > 2


def test_workers_at_once_get_different_regions(tmp_path: Path) -> None:
    proposer, _ = searched(paper(tmp_path), 8)
    places = np.array([proposer.forecast._places.of(proposed(proposer).params) for _ in range(6)])
    apart = np.abs(places[:, None] - places[None]).max(-1) + 10 * np.eye(6)
    assert apart.min() > 0.1  # a step of the grid is 0.2


def test_proposals_that_are_chosen_together_lie_in_different_regions_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposer, _ = searched(paper(tmp_path), 8)
    monkeypatch.setattr("search.optimizer.forecast.TOGETHER", 1)
    learn = Mock(side_effect=proposer.forecast._learn)
    monkeypatch.setattr(proposer.forecast, "_learn", learn)
    places = np.array([proposer.forecast._places.of(proposed(proposer).params) for _ in range(6)])
    apart = np.abs(places[:, None] - places[None]).max(-1) + 10 * np.eye(6)
    assert apart.min() > 0.1 and learn.call_count == 1


def test_what_is_forgotten_was_learnt_from_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.optimizer.forecast.KEPT", 6)
    monkeypatch.setattr("search.optimizer.forecast.SHOWN", 4)
    forgetful, found = searched(paper(tmp_path, name="a"), 30)
    monkeypatch.setattr("search.optimizer.forecast.KEPT", 1000)
    whole, same = searched(paper(tmp_path, name="b"), 30)
    assert found == same and forgetful.forecast.rivals() == whole.forecast.rivals()
    assert len(forgetful.forecast._trainings) < 12 < len(whole.forecast._trainings) == 30


def test_a_resumed_search_knows_what_it_knew(tmp_path: Path) -> None:
    study = paper(tmp_path)
    before = searched(study, 10)[0].forecast
    after = Proposer(study).forecast
    for name, training in before._trainings.items():
        again = after._trainings[name]
        assert (again.accuracy, again.images, again.latency) == (training.accuracy, training.images, training.latency)
        assert (again.at == training.at).all() and not again.running


def test_rivals_are_the_feasible_front(tmp_path: Path) -> None:
    proposer = Proposer(paper(tmp_path, min_clean_accuracy=0.9))
    for accuracy, clean, ms in ((0.5, 0.95, 5.0), (0.6, 0.95, 9.0), (0.4, 0.95, 7.0), (0.9, 0.85, 1.0)):
        proposal = proposed(proposer)
        proposer.finish(proposal.name, [scored(proposal.params, accuracy, clean=clean, ms=ms)], {})
    assert proposed(proposer).rivals == (("", 9.0, 0.6), ("", 5.0, 0.5))


def test_a_warm_start_is_learnt_from(tmp_path: Path) -> None:
    old = paper(tmp_path, name="old")
    old.write()
    known = searched(old, 12)[0].forecast._results()
    forecast = Proposer(paper(tmp_path, name="new", warm_start="old")).forecast
    learnt = {training.accuracy for training in forecast._results()}
    assert learnt == {training.accuracy for training in known} and forecast.rivals() == ()


def test_an_infeasible_training_counts_as_bad(tmp_path: Path) -> None:
    proposer = Proposer(paper(tmp_path, min_clean_accuracy=0.9))
    for clean in (0.95, 0.5):
        proposal = proposed(proposer)
        proposer.finish(proposal.name, [scored(proposal.params, 0.6, clean=clean)], {})
    first, second = proposer.forecast._trainings.values()
    assert first.accuracy == pytest.approx(0.6) and second.accuracy == pytest.approx(0.2)


def test_a_training_without_a_feasible_candidate_counts_by_its_nearest_to_one(tmp_path: Path) -> None:
    proposer = Proposer(paper(tmp_path, min_clean_accuracy=0.9))
    proposal = proposed(proposer)
    settings = [Params(proposal.params.train, {"sigma_eps": sigma}) for sigma in (100.0, 0.1)]
    found = [scored(params, 0.6, clean=clean) for params, clean in zip(settings, (0.1, 0.88), strict=True)]
    proposer.finish(proposal.name, found, {})
    (training,) = proposer.forecast._trainings.values()
    assert training.accuracy == pytest.approx(0.58) and training.inference == {"sigma_eps": 0.1}


def test_a_latency_above_its_limit_counts_in_parts_of_the_limit(tmp_path: Path) -> None:
    proposer = Proposer(paper(tmp_path, max_latency_ms=100.0))
    proposal = proposed(proposer)
    proposer.finish(proposal.name, [scored(proposal.params, 0.6, ms=120.0)], {})
    (training,) = proposer.forecast._trainings.values()
    assert training.accuracy == pytest.approx(0.4)


@pytest.mark.parametrize(("defense", "space"), [(d, s) for d in defenses.names() for s in spaces.names(d)])
def test_proposals_lie_in_every_space(tmp_path: Path, defense: str, space: str) -> None:
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
