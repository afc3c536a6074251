"""A study's latencies: on its own images, shared where nothing that matters differs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from defenses.identity import Identity
from search.exceptions import TrialError
from search.trial import scoring
from search.trial.runner import TrialRunner, run_trial
from tests.conftest import digits_study

SLEEP_S = 0.02


def opened(storage: Path, **fields: object) -> TrialRunner:
    brief = {"defense": "identity", "suite": "quick", "train_images": 256, "eval_images": 30, "classifier_epochs": 1}
    study = digits_study(storage, space="default", **brief | fields)
    return TrialRunner(study, study.store)


def built(runner: TrialRunner) -> Identity:
    return Identity({}, {}, runner.assets.resolved.task.shape)


class WorksWhileItClassifies(Identity):
    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        time.sleep(SLEEP_S)
        return classifier(x_NCHW)


def test_a_latency_is_stored_for_all_that_shapes_it(tmp_path: Path) -> None:
    runner = opened(tmp_path)
    first = runner.scorer.latency(built(runner))
    assert opened(tmp_path, name="other", trials=9, threat="white-box").scorer.latency(built(runner)) == first
    assert len(runner.assets.store.keys("latency")) == 1 and first.images in ("clean", "attacked")
    others: list[dict[str, object]] = [{"eps": 0.2}, {"eval_images": 31}, {"suite": "search"}]
    for number, changed in enumerate(others, start=2):
        opened(tmp_path, **changed).scorer.latency(built(runner))
        assert len(runner.assets.store.keys("latency")) == number, changed


def test_a_training_that_slowed_the_classifier_it_was_given_hides_no_work(tmp_path: Path) -> None:
    runner = opened(tmp_path)
    runner.assets.target.register_forward_pre_hook(lambda *_: time.sleep(SLEEP_S))
    defense = WorksWhileItClassifies({}, {}, runner.assets.resolved.task.shape)
    assert runner.scorer.measured(defense).ms_p50 / 1e3 > 0.5 * SLEEP_S


def test_an_attack_that_does_not_fit_into_memory_ends_the_trial_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = digits_study(tmp_path, defense="diffusion", knobs={"steps": [2, 20]}, epochs=1, eval_images=40)
    params = study.resolved.space.setting(study.resolved.space.usual_of)
    monkeypatch.setattr(scoring, "free_bytes", lambda device: 3 * 2**20)
    law = r"must fit into the memory of .*, of which 0.0029 GiB are free, but the gradient of 80 images takes 0.\d+ GiB"
    with pytest.raises(TrialError, match=law + r": lower steps \(now \d+: 0.\d+ GiB\) or maps \(now 8: 0.\d+ GiB\)"):
        run_trial(study, params, study.store, lambda epoch, metrics: None)
    assert not study.store.keys("fits")


def test_the_free_memory_is_some_of_what_the_machine_has() -> None:
    free = scoring.free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
