"""The study: what its words stand for is looked up once, and refused in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import defenses
from defenses.base import Defense
from search.exceptions import RefusedField
from search.study.loading import make_study, read_study
from search.study.study import Study
from spaces.exceptions import InputError
from tests.conftest import digits_study


def test_a_study_is_resolved_once_and_anew_when_a_field_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, find = list[str](), defenses.find

    def counted(name: str) -> type[Defense]:
        asked.append(name)
        return find(name)

    monkeypatch.setattr(defenses, "find", counted)
    study = digits_study(tmp_path)
    assert study.resolved is study.resolved and asked == ["puvae"]
    other = study.model_copy(update={"eps": 0.2})
    assert other.resolved.threat.eps == 0.2 and study.resolved.threat.eps != 0.2
    assert asked == ["puvae"] * 2


def test_a_study_that_was_resolved_is_equal_to_one_that_was_not_and_travels_without_what_was_found(
    tmp_path: Path,
) -> None:
    study = digits_study(tmp_path)
    fresh = Study(**study.model_dump())
    assert study.resolved and fresh == study
    travelled = pickle.loads(pickle.dumps(study))
    assert "resolved" in vars(study) and "resolved" not in vars(travelled)
    assert travelled == study and travelled.resolved.threat == study.resolved.threat


def test_a_refused_field_is_named_with_its_law_and_the_place_where_it_was_given(tmp_path: Path) -> None:
    with pytest.raises(RefusedField, match="trials must be greater than or equal to 1, but is 0") as refused:
        Study(trials=0)
    assert refused.value.field == "trials"
    with pytest.raises(RefusedField, match="^system_metrics must be true or false, but is 'maybe'$"):
        Study(system_metrics="maybe")
    forms = r"^knobs: lambda_rc must be one value, a grid .*HIGH:log, but is \{'min': 1, 'max': 2\}$"
    with pytest.raises(RefusedField, match=forms):
        Study(knobs={"lambda_rc": {"min": 1, "max": 2}})
    with pytest.raises(InputError, match=r"^here, trials must be"):
        make_study({"trials": 0}, where=lambda field: "here, ")
    (tmp_path / "study.yaml").write_text("name: x\ntrials: 0\n")
    with pytest.raises(InputError, match=r"study\.yaml, line 2: trials must be"):
        read_study(tmp_path / "study.yaml")


@pytest.mark.parametrize(("given", "has_gpus", "share"), [(None, True, 0.25), (None, False, 0.0), (0.5, False, 0.5)])
def test_a_trial_takes_a_quarter_of_a_gpu_where_there_is_one(given: float | None, has_gpus: bool, share: float) -> None:
    assert Study(gpus_per_trial=given).gpu_share(has_gpus) == share
