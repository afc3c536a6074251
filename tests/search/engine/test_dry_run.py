"""The dry run: what a search would run, said before anything runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launch import main
from search.engine.dry_run import forecast, slots_here
from search.trial import timing
from search.trial.runner import run_trial
from search.trial.timing import Step
from search.trial.training import silent
from spaces.exceptions import InputError
from tests.conftest import brief_study, digits_study
from tests.search.trial.test_runner import setting

FLAGS = ["--task", "digits/A", "--space", "smoke", "--suite", "quick", "--eval-images", "20", "--epochs", "1"]


def dry(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["launch.py", "search", "--dry-run", *FLAGS, *flags])
    return main()


def test_a_dry_run_says_what_would_run_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "not" / "there"
    assert dry(monkeypatch, "--storage", str(storage), "--trials", "40", "--concurrent", "1", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trainings"], found["of"], found["known"], found["candidates"]) == (8, 8, 0, 6)
    assert found["classifiers"] == ["A", "B"] and found["slots"] == 1 and "sigma_eps" in found["knobs"]
    assert found["wall_s"] > 8 * found["train_s"] > 0 and found["fit_bytes"] > 1000
    assert not storage.parent.exists()


def test_a_dry_run_knows_what_the_store_holds(tmp_path: Path) -> None:
    study = brief_study(tmp_path, knobs={"sigma_eps": 0})
    before = forecast(study, 4)
    run_trial(study, setting(study), study.store, silent)
    after = forecast(study, 4)
    assert (before.known, before.classifiers) == (0, ["A", "B"])
    assert (after.known, after.classifiers) == (1, []) and after.first_s < before.first_s
    assert before.fit_bytes == pytest.approx(
        len(next(iter((tmp_path / ".store" / "fits").glob("*/weights.safetensors"))).read_bytes()), rel=0.5
    )


def test_a_dry_run_refuses_what_the_search_would_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = digits_study(tmp_path)
    study.folder.mkdir()
    study.write()
    cases = {
        ("--name", "smoke", "--storage", str(tmp_path)): "name must be new",
        ("--cpus-per-trial", "1000"): "cpus_per_trial must be at most what this machine has",
        ("--space", "nowhere"): "the space of puvae must be one of",
    }
    for flags, law in cases.items():
        assert dry(monkeypatch, *flags) == 2 and law in capsys.readouterr().err
    with pytest.raises(InputError, match="gpus_per_trial"):
        slots_here(study.model_copy(update={"gpus_per_trial": 100.0}))


def test_a_training_is_scaled_from_its_batches_to_all_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from search.trial.runner import TrialRunner

    ticks = iter(range(10_000))
    monkeypatch.setattr(Step, "_now", lambda self: float(next(ticks)))
    study = brief_study(tmp_path, train_images=1200)
    found = Step(TrialRunner(study, study.store))
    size = found.defense.train_knobs.batch_size
    training = found.training()
    # A tick a batch: of an epoch's batches one after the other, each takes one.
    assert training.epoch == pytest.approx(1200 / size, rel=0.2) and timing.STEPS * size < 1200
