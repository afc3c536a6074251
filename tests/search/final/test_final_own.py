"""A final run of a user's own classifier: the defense alone is trained anew, and another classifier is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.threat import ThreatModel
from attacks.verdicts import Verdict
from search.classifiers import adding
from search.data import splits
from search.final.evaluation import BLOCK, FinalEvaluator, FinalVerdicts
from search.final.final_run import _case, _settings
from search.final.retraining import EvaluatedModel, ExportedWinner
from search.final.table import announced
from search.storage.store import Store
from search.trial.device_lock import DeviceLock
from search.trial.training import silent
from spaces.exceptions import InputError
from tests.search.export.conftest import exported
from tests.support import own


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An export of a MagNet before a user's classifier, whose data folder is that of these tests."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRUCIBLE_DATA", str(folder / "data"))
        own.data_with_classifier(folder)
        adding.add("mine", f"{folder}/net.py:net", "leaves", weights=folder / "net.pt", mean="0", std="1")
        yield exported(folder / "runs", task="leaves/mine", defense="magnet", train_images=None, eval_images=10)


def case_of(export: Path) -> ExportedWinner:
    return _case(export, {"storage": str(export.parents[2]), "data_dir": None, "address": None})


@pytest.mark.slow
def test_a_given_classifier_is_never_retrained_and_the_final_run_says_so(export: Path) -> None:
    case = case_of(export)
    line = announced(case, _settings([case], 1, 4), 1)
    assert "(the defense alone: leaves/mine keeps the weights that it came with), judged on 4 of 18" in line
    runner = case.runner(case.study, 1000)
    before = runner.assets.store.held("classifiers")
    key, _ = runner.trainer.fit(case.params, silent)
    assert runner.assets.store.held("classifiers") == before and len(before) == 1
    assert key != case.evidence["fit"], "the defense is trained anew"
    given, state = own.trained().state_dict(), runner.assets.target.state_dict()
    assert all(torch.equal(tensor, given[name.removeprefix("network.")]) for name, tensor in state.items())
    assert len(runner.assets.training_set[1]) == sum(splits.sizes("leaves")[:2])


@pytest.mark.slow
def test_a_final_run_refuses_another_classifier_of_the_name(export: Path) -> None:
    folder = export.parents[3]
    adding.remove("leaves/mine")
    adding.add("mine", f"{folder}/net.py:net", "leaves", weights=folder / "net.pt", mean="0.1", std="1")
    with pytest.raises(InputError, match="a final run needs the classifier of the export, leaves/mine of digest"):
        case_of(export)
    adding.remove("leaves/mine")
    adding.add("mine", f"{folder}/net.py:net", "leaves", weights=folder / "net.pt", mean="0", std="1")
    assert case_of(export).name == export.name


def test_other_test_images_of_the_same_name_are_judged_anew(tmp_path: Path) -> None:
    """The key of a training knows the images that it was made of, and these are still the same."""
    x_NCHW, y_N = torch.rand(BLOCK + 4, 1, 8, 8), torch.zeros(BLOCK + 4, dtype=torch.long)
    what: Any = {"target": nn.Identity(), "attacker": None, "threat": ThreatModel("Linf", 0.1, "white-box")}
    model = EvaluatedModel(export="", name="bare", identity="fit", classifier="key", substitute="A", **what)

    def keys(y_N: Tensor) -> list[str]:
        found = list[str]()

        class Keys(FinalEvaluator):
            def once(self, key: str, make: object, name: str) -> FinalVerdicts:
                found.append(key)
                all_N = torch.ones(1, 2, dtype=torch.bool)
                return FinalVerdicts({"clean": Verdict(all_N, ~all_N)}, {}, {})

        store, lock = Store(tmp_path), DeviceLock(torch.device("cpu"))
        Keys(x_NCHW, y_N, 1, store, lock, lambda doing, share: None, steps=1).evaluate([model])
        return found

    before, after = keys(y_N), keys(y_N.index_fill(0, torch.tensor(BLOCK + 1), 3))
    assert keys(y_N) == before and len(before) == 2
    assert before[0] == after[0] and before[1] != after[1], "the block without a change is kept"
