"""A defense's weights that a user has, in place of a training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from search import api, session
from search.export import exporter, loader
from search.final.final_run import final
from search.optimizer.history import SearchHistory
from search.study.catalog import open_search
from search.study.study import Study
from spaces.exceptions import InputError
from tests.conftest import digits_study

QUIET = Console(quiet=True)
FIXED = {"lambda_rc": 0.1, "lambda_kl": 0.1, "conv_maps": 4, "sigma_eps": (0.0, 0.1)}


def weights_of(study: Study) -> dict[str, Tensor]:
    """Return the weights of the only fit of a search."""
    (key,) = study.store.keys("fits")
    return load_file(study.root / ".store" / "fits" / key / "weights.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights of a PuVAE that somebody trained elsewhere."""
    study = digits_study(tmp_path_factory.mktemp("elsewhere"), trials=1, refine=0, knobs=FIXED)
    assert session.begin(study, QUIET, debug=True) == 0
    return weights_of(study)


@pytest.fixture
def file(trained: dict[str, Tensor], tmp_path: Path) -> Path:
    save_file(trained, tmp_path / "puvae.safetensors")
    return tmp_path / "puvae.safetensors"


def given(tmp_path: Path, file: Path, **more: Any) -> Study:
    fields: dict[str, Any] = {"trials": 1, "refine": 0, "knobs": FIXED, "weights": str(file), **more}
    return digits_study(tmp_path / "runs", **fields)


def test_nothing_is_trained_and_every_setting_is_scored(
    file: Path, trained: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("defenses.puvae.PuVAE.fit", lambda *_: pytest.fail("it must not be trained"))
    study = given(tmp_path, file)
    table = api.search(study, debug=True, console=QUIET)
    assert set(table["sigma_eps"]) == {0.0, 0.1}
    begun = open_search(study.name, study.storage)
    assert begun.weights is not None and len(begun.weights) == 64
    found = weights_of(begun)
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    file.unlink()  # the store has it
    assert session.proceed(begun, QUIET, debug=True) == 0 and len(SearchHistory(begun).candidates()) == 2


def test_an_export_says_that_its_weights_were_given(tmp_path: Path) -> None:
    file = tmp_path / "means.safetensors"
    save_file({"mean_KCHW": torch.rand(10, 1, 8, 8)}, file)
    means: dict[str, Any] = {"defense": "class_mean", "knobs": {}, "eval_images": 20, "cheap_images": 10}
    study = given(tmp_path, file, **means)
    assert session.begin(study, QUIET, debug=True) == 0
    begun = open_search(study.name, study.storage)
    best = SearchHistory(begun).candidates()[0]
    folder = exporter.export(begun, best, begun.store, tmp_path / "out", despite_alarms=True)
    evidence = json.loads((folder / "evidence.json").read_bytes())
    assert evidence["training"]["weights"] == begun.weights and evidence["training"]["last_epoch"] == {}
    assert f"--weights {begun.weights}" in evidence["reproduce"]
    assert f"given weights with the SHA-256 `{begun.weights}`" in (folder / "card.md").read_text("utf-8")
    assert len({alarm.partition(":")[0] for alarm in evidence["alarms"]}) == len(evidence["alarms"]) >= 2
    card, page = (folder / "card.md").read_text("utf-8"), session.write_report(begun).read_text("utf-8")
    assert "launch.py final" not in card + page, "it would refuse them"
    assert f"{evidence['reproduce']} --weights FILE\n" in card and "study.yaml --weights FILE --storage again" in page
    assert loader.load(folder)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(InputError, match="a final run trains anew"):
        final([folder], seeds=1, console=QUIET)


def test_other_weights_are_another_fit(file: Path, trained: dict[str, Tensor], tmp_path: Path) -> None:
    for name, shift in (("one", 0.0), ("two", 0.01), ("three", 0.01)):
        save_file({key: tensor + shift for key, tensor in trained.items()}, file)
        assert (
            session.begin(given(tmp_path, file, name=name, knobs={**FIXED, "sigma_eps": 0.0}), QUIET, debug=True) == 0
        )
    assert len(given(tmp_path, file).store.keys("fits")) == len(given(tmp_path, file).store.keys("weights")) == 2


def test_a_file_that_does_not_fit_is_refused_before_anything_is_done(
    file: Path, trained: dict[str, Tensor], tmp_path: Path
) -> None:
    def refused(study: Study) -> str:
        for do in (session.rehearse, lambda study, console: session.begin(study, console, debug=True)):
            with pytest.raises(InputError) as error:
                do(study, Console(file=io.StringIO()))
        assert not study.folder.exists()
        return str(error.value)

    name = "dense_3.weight"
    changes: dict[str, dict[str, Tensor]] = {
        f"{name} is [3], and [16, 64] in the network": {name: torch.zeros(3)},
        "it has extra, which the network has not": {"extra": torch.zeros(1)},
        f"must be finite, but {name} of {file} is not": {name: trained[name] * torch.nan},
    }
    for words, change in changes.items():
        save_file({**trained, **change}, file)
        assert words in refused(given(tmp_path, file))
    assert "does not exist" in refused(given(tmp_path, tmp_path / "none.safetensors"))
    with pytest.raises(InputError, match="must be a file, or a digest in"):
        session.begin(given(tmp_path, Path("0" * 64)), QUIET, debug=True)


def test_knobs_of_the_training_must_be_fixed(file: Path, tmp_path: Path) -> None:
    law = "weights of puvae need every knob of its training fixed, but the space searches lambda_kl: --knob NAME=VALUE"
    with pytest.raises(InputError, match=law):
        given(tmp_path, file, knobs={**FIXED, "lambda_kl": (0.1, 1.0)})
