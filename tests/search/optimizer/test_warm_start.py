"""Warm starts: what a new search takes from an earlier one, and from an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.samplers import NSGAIISampler
from optuna.trial import TrialState
from rich.console import Console

from search import session
from search.engine.run import open_controller, run
from search.optimizer.history import SearchHistory
from search.optimizer.proposer import Proposer
from search.optimizer.warm_start import warm_start_of
from search.study.study import Study
from spaces.exceptions import InputError
from spaces.space import Params
from tests.conftest import digits_study
from tests.support.engine import Pretence


def attacked(params: Params) -> float:
    return 0.5 + 0.1 * (params.train["lambda_rc"] == 1.0) + 0.01 * float(params.train["conv_maps"])


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A search of four trainings with six candidates each."""
    monkeypatch.setattr("os.fsync", lambda file: None)
    study = digits_study(tmp_path, name="earlier", method="grid", trials=4, knobs={"lambda_kl": 0.1})
    assert run(study, [], debug=True, work=Pretence(attacked).work()) == "finished"
    return study


def test_the_best_of_an_earlier_search_come_first_and_the_same_exam_teaches_the_sampler(
    tmp_path: Path, earlier: Study
) -> None:
    study = digits_study(tmp_path, warm_start="earlier", trials=5)
    work = Pretence(attacked)
    assert "24 of its 24 candidates lie in this space" in warm_start_of(study, "earlier").said
    assert run(study, [], debug=True, work=work.work()) == "finished"
    first = [(p.params.train["lambda_rc"], p.params.train["conv_maps"]) for p in work.asked[:4]]
    assert first == [(1.0, 8), (1.0, 4), (0.1, 8), (0.1, 4)]
    history = SearchHistory(study)
    told = [t for t in history.optuna.trials if t.user_attrs.get("from") == "earlier"]
    assert len(told) == 24 and all(t.state == TrialState.COMPLETE and t.constraints for t in told)
    assert len(history.candidates()) == 5 * 6 and history.ended() == 5  # they are nobody's candidates here
    assert Proposer(study).propose() is not None  # and it opens again


def test_a_fit_comes_by_its_best_candidate_whatever_its_others_are_worth(tmp_path: Path) -> None:
    def uneven(params: Params) -> float:
        if params.train["lambda_rc"] == 1.0 and params.train["conv_maps"] == 8:
            return 0.9 if params.inference["sigma_eps"] == 0.1 else 0.1
        return 0.5 + 0.01 * float(params.train["conv_maps"])

    earlier = digits_study(tmp_path, name="earlier", method="grid", trials=4, knobs={"lambda_kl": 0.1})
    assert run(earlier, [], debug=True, work=Pretence(uneven).work()) == "finished"
    first, second, *_ = warm_start_of(digits_study(tmp_path), "earlier").settings
    assert (first.train["lambda_rc"], first.train["conv_maps"], first.inference["sigma_eps"]) == (1.0, 8, 0.1)
    assert uneven(second) == 0.58


@pytest.mark.parametrize("other", [{"eps": 0.1}, {"partner": "C"}])
def test_another_exam_gives_its_settings_and_teaches_nothing(
    tmp_path: Path, earlier: Study, other: dict[str, Any]
) -> None:
    found = warm_start_of(digits_study(tmp_path, **other), "earlier")
    assert len(found.settings) == 4 and not found.candidates and "evaluated in another way" in found.said


def test_settings_outside_the_space_or_of_another_defense_are_left(tmp_path: Path, earlier: Study) -> None:
    half = warm_start_of(digits_study(tmp_path, knobs={"conv_maps": 8}), "earlier")
    assert len(half.settings) == 2 and len(half.candidates) == 12 and "12 of its 24" in half.said
    none = warm_start_of(digits_study(tmp_path, knobs={"learning_rate": 0.5e-3}), "earlier")
    assert not none.settings and none.said.endswith(
        "0 of its 24 candidates lie in this space, so nothing of it is used: "
        "learning_rate must be 0.0005, not 0.001 (24 of 24)"
    )
    other = warm_start_of(digits_study(tmp_path, defense="magnet"), "earlier").said
    assert other.endswith("so nothing of it is used: the defense must be magnet, not puvae (24 of 24)")


def test_a_warm_start_that_finds_nothing_usable_says_why(tmp_path: Path, earlier: Study) -> None:
    wide = warm_start_of(digits_study(tmp_path, knobs={"conv_maps": [16, 32], "lambda_rc": 1.0}), "earlier")
    assert wide.said.endswith(
        "conv_maps must be one of 16, 32, not 4, 8 (24 of 24); lambda_rc must be 1, not 0.1 (12 of 24)"
    )
    clean = warm_start_of(digits_study(tmp_path, min_clean_accuracy=0.99), "earlier")
    assert (
        not clean.settings and "none is tried first, since none keeps to the constraints: 24 of 24 have" in clean.said
    )
    begun = digits_study(tmp_path, name="begun")
    open_controller(begun, [])
    empty = warm_start_of(digits_study(tmp_path), "begun")
    assert empty.said.endswith("0 of its 0 candidates lie in this space, so nothing of it is used: it has none yet")


def test_an_export_gives_its_setting(tmp_path: Path) -> None:
    params = next(digits_study(tmp_path).resolved.space.grid())
    best = {"defense": "puvae", "train": dict(params.train) | {"conv_maps": 8}, "inference": dict(params.inference)}
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(best))
    study = digits_study(tmp_path, warm_start=str(folder))
    assert "1 of 1 settings lies in this space" in warm_start_of(study, str(folder)).said
    proposal = Proposer(study).propose()
    assert proposal is not None and dict(proposal.params.train) == best["train"]
    other = warm_start_of(digits_study(tmp_path, defense="hgd"), str(folder)).said
    assert "0 of 1" in other and other.endswith("the defense must be hgd, not puvae (1 of 1)")
    (folder / "config.yaml").write_text("defense: puvae")
    with pytest.raises(InputError, match="an export with a whole config.yaml"):
        warm_start_of(study, str(folder))


def test_a_warm_start_from_nowhere_is_refused_before_anything_is_written(tmp_path: Path, earlier: Study) -> None:
    study = digits_study(tmp_path, warm_start="earler")
    with pytest.raises(InputError, match="one of earlier, but is 'earler'; did you mean 'earlier'"):
        session.begin(study, Console(quiet=True), debug=True)
    assert not study.folder.exists()
    alone = digits_study(tmp_path / "empty", warm_start="earlier")
    with pytest.raises(InputError, match="the folder of an export or a search of"):
        session.begin(alone, Console(quiet=True), debug=True)


def test_nsga2_takes_another_searchs_candidates_for_its_first_generation(tmp_path: Path, earlier: Study) -> None:
    study = digits_study(tmp_path, warm_start="earlier", method="nsga2")
    proposer = open_controller(study, []).proposer
    key = NSGAIISampler._get_generation_key()
    assert [t.system_attrs.get(key) for t in proposer.optuna.trials if "from" in t.user_attrs] == [0] * 24
