"""The Python API: what the command line does, called from a notebook."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

import search
from search import session
from search.optimizer.history import SearchHistory
from search.study.study import Study
from spaces.exceptions import InputError
from spaces.space import Params
from tests.attacks.test_ambient import State, hostile, state
from tests.conftest import digits_study
from tests.search.conftest import Working
from tests.support.engine import Pretence
from tests.support.paths import ROOT

QUIET = Console(quiet=True)


def robust(params: Params) -> float:
    return 0.5 + 0.01 * float(params.flat()["lambda_rc"])


def test_the_package_offers_its_names_and_imports_none_before_it_is_asked() -> None:
    script = "import search, sys; print({'torch', 'ray', 'optuna', 'pandas'} & set(sys.modules), search.load)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("set() <function load")
    assert search.Study is Study and callable(search.search)
    with pytest.raises(AttributeError, match="module 'search' has no attribute 'serach'"):
        search.serach  # noqa: B018
    with pytest.raises(ImportError):
        from search import serach  # noqa: F401


def test_a_search_returns_the_table_that_candidates_csv_holds(study: Study, working: Working) -> None:
    working(Pretence(robust))
    table = search.search(study, debug=True, console=QUIET)
    with (study.folder / "candidates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(table.columns) == list(rows[0]) and len(table) == len(rows) == len(SearchHistory(study).candidates())
    for column, kind in table.dtypes.items():
        written = [row[str(column)] for row in rows]
        if kind in ("float64", "int64"):
            assert [str(v) for v in table[column]] == [w or "nan" for w in written], column
        else:
            assert list(table[column]) == written
    kinds = {"attacked_accuracy": "float64", "black_box_accuracy": "float64", "queries": "int64", "alarms": "str"}
    kinds |= {"conv_maps": "int64", "lambda_rc": "float64", "sigma_eps": "float64", "candidate": "str"}
    assert {name: str(table.dtypes[name]) for name in kinds} == kinds


def test_a_search_computes_as_in_a_new_process(study: Study, working: Working, monkeypatch: pytest.MonkeyPatch) -> None:
    working(Pretence(robust))
    usual, met, begin = state(), list[State](), session.begin

    def seen(study: Study, console: Console, *, debug: bool) -> int:
        met.append(state())
        return begin(study, console, debug=debug)

    monkeypatch.setattr(session, "begin", seen)
    with hostile(inference=True):
        search.search(study, debug=True, console=QUIET)
    assert met == [usual] and state() == usual


def test_a_search_is_read_by_its_name_too_and_its_front_is_a_part_of_it(study: Study, working: Working) -> None:
    working(Pretence(robust))
    table = search.search(study, debug=True, console=QUIET)
    pd.testing.assert_frame_equal(search.candidates(study.name, study.storage), table)
    front = search.front(study.name, study.storage)
    pd.testing.assert_frame_equal(front, search.front(study))
    assert front["attacked_accuracy"].iloc[0] == table["attacked_accuracy"].max()
    assert set(front["candidate"]) <= set(table["candidate"]) and list(front.dtypes) == list(table.dtypes)
    narrow = study.model_copy(update={"min_clean_accuracy": 0.99})
    nobody = search.front(narrow)
    assert nobody.empty and list(nobody.dtypes) == list(table.dtypes)


def test_the_eps_that_a_defense_trains_with_does_not_pass_for_the_attackers(tmp_path: Path, working: Working) -> None:
    working(Pretence(lambda params: 0.5))
    study = digits_study(tmp_path, defense="advae", knobs={"eps": 0.125}, trials=1)
    table = search.search(study, debug=True, console=QUIET)
    assert set(table["eps"]) == {0.3} and set(table["knob_eps"]) == {0.125}
    assert str(table.dtypes["knob_eps"]) == "float64"


def test_no_knob_is_hidden_by_a_column_of_its_name(tmp_path: Path, working: Working) -> None:
    working(Pretence(lambda params: 0.5))
    study = digits_study(tmp_path, defense="adversarial_training", knobs={"norm": "L2", "attack": "pgd"}, trials=1)
    table = search.search(study, debug=True, console=QUIET)
    assert set(table["norm"]) == {"Linf"} and set(table["knob_norm"]) == {"L2"}


def test_a_cell_that_is_run_again_goes_on_where_it_was_interrupted(study: Study, working: Working) -> None:
    first, second = Pretence(robust, dies_at=1), Pretence(robust)
    working(first)
    with pytest.raises(KeyboardInterrupt):
        search.search(study, debug=True, console=QUIET)
    begun = search.candidates(study)
    working(second)
    table = search.search(study, debug=True, console=QUIET)
    assert 0 < len(begun) < len(table) and [p.params for p in first.asked] != [p.params for p in second.asked]
    assert len(first.asked) + len(second.asked) == study.trials
    third = Pretence(robust)
    working(third)
    more = search.search(study.model_copy(update={"trials": 3}), debug=True, console=QUIET)
    assert len(third.asked) == 1 and len(more) > len(table)
    with pytest.raises(InputError, match="has another eps, seed: set it back, or choose another name"):
        search.search(study.model_copy(update={"eps": 0.2, "seed": 7}), debug=True, console=QUIET)


def test_a_search_that_leaves_nothing_says_where_to_look(study: Study, working: Working) -> None:
    def fails(params: Params) -> float:
        raise ValueError("no")

    pretence = Pretence(fails)
    pretence.execute = lambda study, proposal, report: {"failed": "it diverged"}  # type: ignore[method-assign]
    working(pretence)
    with pytest.raises(RuntimeError, match="launch.py status smoke says why"):
        search.search(study, debug=True, console=QUIET)
    empty = search.candidates(study)
    assert empty.empty and {"candidate", "lambda_rc", "attacked_accuracy"} <= set(empty.columns)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"trials": 0}, "trials must be greater than or equal to 1, but is 0"),
        ({"defens": "puvae"}, "but is 'defens'; did you mean 'defense'?"),
        (
            {"method": "tpee"},
            "must be one of forecast, tpe, nsga2, gp, random, qmc, grid, but is 'tpee'; did you mean 'tpe'?",
        ),
        ({"eps": "much"}, "eps must be a valid number"),
        ({"name": "a/b"}, "name must be letters, digits"),
    ],
)
def test_a_study_outside_its_law_says_so_in_one_line(fields: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as refused:
        search.Study(**fields)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_word_that_stands_for_nothing_ends_before_anything_is_written(tmp_path: Path) -> None:
    study = digits_study(tmp_path / "runs").model_copy(update={"defense": "puvea"})
    with pytest.raises(InputError, match="did you mean 'puvae'"):
        search.search(study, debug=True, console=QUIET)
    with pytest.raises(InputError, match="a search must exist, but there is none in"):
        search.candidates("smoke", study.storage)
    assert not (tmp_path / "runs").exists()
