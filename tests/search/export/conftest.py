"""What several files of tests need: one small export, and a copy of our code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from search.export.exporter import export
from search.study.candidate import Candidate
from search.study.study import Study
from search.trial.runner import run_trial
from search.trial.training import silent
from spaces.space import Params
from tests.conftest import digits_study
from tests.support.paths import ROOT


def exported(storage: Path, **fields: object) -> Path:
    """Export the usual setting of a defense, trained for seconds on digits, whatever the audit says."""
    console = fields.pop("console", None)
    assert console is None or isinstance(console, Console)
    study, candidate = trained(storage, **fields)
    return export(study, candidate, study.store, study.folder / "export", despite_alarms=True, console=console)


def unaudited(patch: pytest.MonkeyPatch) -> None:
    """Leave out what takes long in the audit of an export, where the audit is not what is tested."""
    patch.setattr("attacks.audit.audit._attack_gates", lambda *_: ())
    patch.setattr("attacks.audit.audit._heavier", lambda target, x, y, threat, found, seed: (found, 0.0))
    patch.setattr("search.export.exporter.confirm", lambda *_, **__: ())


def trained(storage: Path, **fields: object) -> tuple[Study, Candidate]:
    """Train the usual setting of a defense for seconds on digits, and return it as a candidate."""
    small: dict[str, object] = {"train_images": 300, "eval_images": 20, "cheap_images": 10, "suite": "quick"}
    study: Study = digits_study(storage, **{**small, "eps": 0.1, **fields})
    store, space = study.store.make(), study.resolved.space
    usual = {name: space.usual_of(name, domain) for name, domain in space.train.items()}
    candidate, *_ = run_trial(study, Params(usual, space.usual()), store, silent, alone=True)
    return study, candidate


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a MagNet, which rejects."""
    return exported(tmp_path_factory.mktemp("runs"), defense="magnet")


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of our code, to be edited."""
    for part in ("spaces", "attacks", "defenses", "search"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", tmp_path)
    return tmp_path
