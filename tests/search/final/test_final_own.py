"""A final run of a user's own classifier: the defense alone is trained anew, and another classifier is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from search.classifiers import adding
from search.data import splits
from search.final.final_run import _case, _settings
from search.final.retraining import ExportedWinner
from search.final.table import announced
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
