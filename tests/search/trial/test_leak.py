"""A defense that asks for the data that it is judged by fails its trial and says why; an honest one notices nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import defenses
from defenses.base import Batches, Defense, Metrics
from defenses.identity import Identity
from search.data import splits
from search.data.cache import ensure
from search.engine.run import run
from search.exceptions import TrialError
from search.optimizer.history import SearchHistory, state_of
from search.storage.store import Store
from search.study.loading import make_study
from search.study.study import Study
from search.trial.runner import run_trial
from spaces.space import Params
from tests.conftest import digits_study


class Loads(Identity):
    """Asks the loader in `fit`."""

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        splits.load("digits", "validation")
        yield from super().fit(batches, classifier)


class Reads(Identity):
    """Reads the file in `fit`, after an epoch, and hides the refusal."""

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        yield from super().fit(batches, classifier)
        with suppress(Exception):
            np.load(Path("~/.cache/crucible/decoded/digits/x_train.npy").expanduser(), mmap_mode="r")


class Builds(Identity):
    """Asks the loader in `build`."""

    def build(self) -> None:
        splits.load("digits", "validation")


class Adopts(Identity):
    """Asks the loader in `adopt`."""

    def adopt(self, classifier: nn.Module) -> None:
        splits.load("digits", "validation")


class Purifies(Identity):
    """Asks the loader when it is attacked, but not while it is trained."""

    def purify(self, x_NCHW: Tensor) -> Tensor:
        if not self.training:
            splits.load("digits", "validation")
        return x_NCHW


LEAKY = {kind.__name__.lower(): kind for kind in (Loads, Reads, Builds, Adopts, Purifies)}


@pytest.fixture
def found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the defenses of this module as if they were files among the others."""
    find = defenses.find

    def found(name: str) -> type[Defense]:
        return LEAKY[name] if name in LEAKY else find(name)

    monkeypatch.setattr(defenses, "find", found)


def small(storage: Path, **more: object) -> Study:
    return digits_study(storage, suite="quick", space="default", eval_images=20, classifier_epochs=1, trials=1, **more)


def tried(study: Study, store: Store) -> None:
    run_trial(study, Params({"batch_size": 128, "epochs": 1}, {}), store, lambda epoch, metrics: None)


@pytest.mark.parametrize(
    ("name", "while_it_is"),
    [("loads", "trained"), ("reads", "trained"), ("builds", "built"), ("adopts", "built"), ("purifies", "judged")],
)
def test_a_defense_that_asks_for_the_data_fails_its_trial(
    name: str, while_it_is: str, tmp_path: Path, found_by_name: None
) -> None:
    ensure("digits", None)
    study = small(tmp_path, defense=name)
    with pytest.raises(TrialError, match=f"must not get at the data .* while it is .*{while_it_is}"):
        tried(study, study.store)
    if name != "purifies":
        assert study.store.keys("fits") == []


def test_a_search_says_why_such_a_trial_failed_and_goes_on(tmp_path: Path, found_by_name: None) -> None:
    study = small(tmp_path, defense="loads", refine=0)
    assert run(study, [], debug=True) == "finished"
    (trial,) = SearchHistory(study).trials()
    assert state_of(trial) == "failed"
    reason = "must not get at the data that it is judged by, but it loads digits while it is trained"
    assert reason in trial.user_attrs["reason"]


def test_a_module_that_loads_them_when_it_is_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from search.data import splits\nfrom defenses.identity import Identity\n"
    (tmp_path / "grasping.py").write_text(
        f"{source}STORED = splits.load('digits', 'validation')\nclass Grasping(Identity): pass\n"
    )
    monkeypatch.setattr(defenses, "__path__", [*defenses.__path__, str(tmp_path)])
    fields = small(tmp_path).model_dump()
    with pytest.raises(TrialError, match="it loads digits while it is imported"):
        make_study(fields | {"defense": "grasping", "knobs": {}})


@pytest.mark.parametrize("defense", ["puvae", "adversarial_training"])
def test_an_honest_defense_trains_to_the_same_weights_as_without_the_guard(
    defense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`made`, progress and scores go through the store meanwhile."""

    def weights(storage: Path) -> dict[str, bytes]:
        study = digits_study(storage, defense=defense, suite="quick", train_images=256, eval_images=20)
        space = study.resolved.space
        run_trial(study, space.setting(space.usual_of), study.store, lambda epoch, metrics: None, alone=True)
        (key,) = study.store.keys("fits")
        return {key: (study.store.root / "fits" / key / "weights.safetensors").read_bytes()}

    torch.manual_seed(0)
    guarded = weights(tmp_path / "guarded")
    monkeypatch.setattr("search.data.guard._listen", lambda: None)
    monkeypatch.setattr("search.data.guard._heard", lambda event, given: None)
    assert weights(tmp_path / "open") == guarded
