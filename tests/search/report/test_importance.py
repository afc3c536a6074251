"""Importances: they find the shares that are known, under the names that they belong to, and say what chance gives."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from search.optimizer.proposer import Proposer
from search.optimizer.samplers import lesson
from search.report.importance import CHANCE, importances
from search.study.candidate import Candidate
from search.study.loading import make_study
from spaces.space import Params
from tests.support.engine import scored

SIGMAS = (0.0, 0.1, 1.0, 10.0)


def told(storage: Path, fits: int) -> Proposer:
    """A search of whose attacked error sigma_eps explains two thirds, lambda_kl a third, and lambda_rc nothing."""
    knobs = {"lambda_rc": "0.1..10:log", "lambda_kl": "0.1..10:log", "sigma_eps": list(SIGMAS)}
    made = {"name": "known", "task": "digits/A", "space": "smoke", "knobs": {**knobs, "conv_maps": 4}}
    study = make_study({**made, "method": "random", "trials": fits, "refine": 0, "storage": str(storage)})
    proposer = Proposer(study)
    for _ in range(fits):
        proposal = proposer.propose()
        assert proposal is not None
        first = proposal.params.inference["sigma_eps"]
        settings = (first, *(sigma for sigma in SIGMAS if sigma != first))
        proposer.finish(proposal.name, [candidate(proposal.params, sigma) for sigma in settings], {})
    return proposer


def candidate(params: Params, sigma: object) -> Candidate:
    kl = math.log10(float(params.train["lambda_kl"]))  # of variance 1 / 3 over its range
    weight = math.sqrt((2 / 3) / (3 / 16))  # a step of height one at one of four values has variance 3 / 16
    attacked = 0.5 + 0.05 * (kl - weight * (sigma == 10.0))
    return scored(Params(params.train, {**params.inference, "sigma_eps": sigma}), attacked)  # type: ignore[dict-item]


def test_the_shares_are_the_known_ones_each_under_its_own_name(tmp_path: Path) -> None:
    found = importances(told(tmp_path, 60))
    assert found.candidates == 240 and sum(found.overall.values()) == pytest.approx(1.0)
    assert found.overall["sigma_eps"] == pytest.approx(2 / 3, abs=0.1)
    assert found.overall["lambda_kl"] == pytest.approx(1 / 3, abs=0.1)
    assert found.overall["lambda_rc"] < 0.05 and found.overall[CHANCE] < 0.05


def test_what_reaches_the_best_tenth_is_not_what_ruins_a_candidate(tmp_path: Path) -> None:
    found = importances(told(tmp_path, 60))
    assert max(found.best, key=lambda knob: found.best[knob]) == "lambda_kl"
    assert importances(told(tmp_path / "few", 4)).best == {}  # all of them come of one training or two


def test_a_warm_start_and_what_is_not_finished_tell_nothing(tmp_path: Path) -> None:
    proposer = told(tmp_path, 4)
    before, known = importances(proposer), proposer.candidates()[0]
    proposer.optuna.add_trial(lesson(proposer.study, proposer.space, known, whole=False, attributes={"from": "other"}))
    proposer.optuna.enqueue_trial({"lambda_rc": 1.0})
    assert importances(proposer) == before and before.candidates == 16
