"""Final runs: what is trained and judged is what the page says, once, whatever dies on the way."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from attacks.robustness import Outsider
from attacks.substitute import train_substitute
from attacks.suite import APGD_CE, FGSM, PGD_5, SELECTIVE_10, SUITES, Suite
from defenses.base import Defended
from search import final as finals
from search import hearing, tasks
from search.crew import Piece, crew
from search.export import SEAL, load, seal
from search.final import final, page
from search.final_page import forms
from search.hearing import Hearing
from search.retrained import Case, contenders
from search.study import Study
from search.trial import Bench, run_trial, silent, store_of
from search.winners import export
from spaces.space import InputError, Params
from tests.conftest import digits_study

pytestmark = pytest.mark.slow

IMAGES, SEEDS = 24, [1000, 1001]
QUIET = Console(file=io.StringIO())
APGD_5 = replace(APGD_CE, steps=5)
SMALL = {
    "full": Suite(
        name="full", oblivious=(FGSM, PGD_5, APGD_5), white_box=(FGSM, SELECTIVE_10, APGD_5), draws=2, looks=20
    ),
    "standard": Suite(name="standard", oblivious=(APGD_5,), white_box=(APGD_5,), draws=2, looks=20),
}


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Take small suites of the same names, and a black-box attacker that asks less: the real ones take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, suite in SMALL.items():
            patch.setitem(cast(dict[str, Suite], SUITES), name, suite)
        patch.setattr(hearing, "BLOCK", 16)  # two blocks
        patch.setattr(hearing, "train_substitute", partial(train_substitute, rounds=1))
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a MagNet, which rejects, chosen on 20 validation images."""
    study = digits_study(tmp_path_factory.mktemp("runs"), defense="magnet", eval_images=20, eps=0.1, suite="quick")
    store, space = store_of(study).make(), study.plan().space
    usual = {name: space.usual_of(name, domain) for name, domain in space.train.items()}
    candidate, *_ = run_trial(study, Params(usual, space.usual()), store, silent, alone=True)
    return export(study, candidate, store, study.folder / "export", despite_alarms=True)


class Counted:
    """Counts what is trained and attacked, and interrupts the third epoch and the fifth attacked block, once each."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.epochs, self.struck, self.interrupts = 0, 0, 0
        save, strike = type(store_of(Study())).save_progress, Hearing._struck

        def saving(store: Any, key: str, state: Any) -> None:
            save(store, key, state)
            self.epochs += 1
            self._dies(self.epochs == 3)

        def striking(*args: Any) -> Any:
            found = strike(*args)
            self.struck += 1
            self._dies(self.struck == 5)
            return found

        patch.setattr(type(store_of(Study())), "save_progress", saving)
        patch.setattr(Hearing, "_struck", striking)

    def _dies(self, now: bool) -> None:
        if now:
            self.interrupts += 1
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def judged(exported: Path) -> tuple[dict[str, Any], Counted]:
    """A final run of two seeds that died twice and was called again each time."""
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                final([exported], seeds=2, images=IMAGES, debug=True, console=QUIET)
        return final([exported], seeds=2, images=IMAGES, debug=True, console=QUIET), counted


def test_x(judged: Any) -> None:
    print(page(judged[0]))
    print(judged[1].__dict__)
