"""What a search says at its end, when it is interrupted, and when it is resumed."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from search import session
from search.engine import run
from search.engine.worker import Work
from search.optimizer.history import SearchHistory, pick
from search.report.summary import summarise
from search.study.catalog import open_search
from search.study.study import Study
from spaces.exceptions import InputError
from spaces.space import Params
from tests.conftest import digits_study
from tests.search.conftest import Working
from tests.support.engine import LATENCY, Pretence, scored

Do = Callable[..., int]


def robust(params: Params) -> float:
    return 0.5 + 0.01 * float(params.flat()["lambda_rc"])


def told(do: Do, study: Study, **more: object) -> tuple[int, list[str]]:
    """Return the exit code of a function of `session`, and the lines that it printed."""
    screen = io.StringIO()
    code = do(study, Console(file=screen, width=300), **{"debug": True, **more})
    return code, screen.getvalue().splitlines()


def never(*given: object, **more: object) -> None:
    raise AssertionError("it must not be begun")


def test_a_search_ends_with_the_command_that_exports_its_best(study: Study, working: Working) -> None:
    working(Pretence(robust))
    code, lines = told(session.begin, study)
    best = SearchHistory(study).feasible()[0].candidate
    command = f"python launch.py export {study.name} --candidate {best} --storage {study.storage}"
    assert code == 0 and lines[-1] == f"export     {command}"


def test_a_finished_search_says_so_at_once_and_begins_neither_ray_nor_wandb(
    study: Study, working: Working, monkeypatch: pytest.MonkeyPatch
) -> None:
    working(Pretence(robust))
    assert told(session.begin, study)[0] == 0
    for name in ("run.run", "WandbTracker", "LiveTable"):
        monkeypatch.setattr(f"search.session.{name}", never)
    again = study.model_copy(update={"wandb": "offline"})
    more = f"; more trainings: python launch.py resume smoke --storage {study.storage} --trials 4"
    line = f"smoke is finished: 2 of 2 trainings ended, 12 candidates{more}"
    assert told(session.proceed, again, debug=False) == (0, [line])
    assert not (study.folder / "wandb").exists()


def test_more_trainings_are_added_to_a_finished_search_and_kept_in_its_study(study: Study, working: Working) -> None:
    working(Pretence(robust))
    told(session.begin, study)
    with pytest.raises(InputError, match="trials must be at least the 2 that have ended, which count too, but is 1"):
        told(session.proceed, study, trials=1)
    assert told(session.proceed, study, trials=2)[1][0].startswith("smoke is finished")
    working(second := Pretence(robust))
    code, lines = told(session.proceed, study, trials=3)
    assert code == 0 and len(second.asked) == 1 and "2 of 3 trainings have ended, 12 candidates are kept" in lines
    assert "trials: 3\n" in (study.folder / "study.yaml").read_text()


@pytest.mark.parametrize(
    "edited", [{"eval_images": 8}, {"suite": "quick"}, {"knobs": {"lambda_rc": [0.1, 1.0, 3.0]}}], ids=str
)
def test_a_study_that_was_edited_under_its_name_is_refused_by_every_command(
    edited: dict[str, object], study: Study, working: Working
) -> None:
    working(Pretence(robust))
    told(session.begin, study)
    (study.folder / "study.yaml").write_text(study.model_copy(update=edited).to_yaml())
    again = open_search(study.name, study.storage)
    asked: list[Callable[[], object]] = [
        partial(told, session.proceed, again),
        partial(session.write_report, again),
        partial(pick, again, pareto=True, top=None, candidate=None),
    ]
    for ask in asked:
        with pytest.raises(InputError, match=f"has another {next(iter(edited))}: set it back, or choose another name"):
            ask()
    (study.folder / "study.yaml").write_text(study.model_copy(update={"trials": 3, "concurrent": 1}).to_yaml())
    assert told(session.proceed, open_search(study.name, study.storage))[0] == 0


def test_a_space_without_further_trainings_is_finished_too(tmp_path: Path, working: Working) -> None:
    study = digits_study(tmp_path, trials=9, knobs={"lambda_rc": 1.0, "lambda_kl": 1.0})
    working(Pretence(robust))
    told(session.begin, study)
    line = "smoke is finished: all 2 trainings of its space ended, 12 candidates"
    assert told(session.proceed, study) == (0, [line])


@pytest.mark.parametrize(("dies_at", "when"), [(0, "interrupted before the first candidate"), (1, "interrupted")])
def test_the_last_line_of_an_interrupted_search_says_whether_there_is_a_candidate(
    dies_at: int, when: str, study: Study, working: Working
) -> None:
    working(Pretence(robust, dies_at=dies_at))
    code, lines = told(session.begin, study)
    assert (code, lines[-1]) == (130, f"{when}; go on with: python launch.py resume smoke --storage {study.storage}")
    working(Pretence(robust))
    assert told(session.proceed, study)[0] == 0


def test_a_search_that_is_interrupted_before_it_is_kept_says_so(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", dies)
    code, lines = told(session.begin, study)
    words = "interrupted before the first candidate; nothing is kept, so the same command begins anew"
    assert (code, lines[-1]) == (130, words) and not study.folder.exists()


class Disturbed(Pretence):
    """Work on one device whose first latency was not quiet, and is `again_ms` when it is measured again."""

    again_ms = 2.0

    def work(self) -> Work:
        again = dataclasses.replace(LATENCY, device="", ms_p50=self.again_ms, ms_p95=3.0)
        return dataclasses.replace(super().work(), remeasure=lambda study, candidate: again)


@pytest.mark.parametrize(
    ("again_ms", "counts", "remark"),
    [
        (2.0, 2.0, "5\u00a0ms the first time, which was not quiet"),
        (4.8, 5.0, ""),
        (9.0, 5.0, "80 % slower when re-measured, which was not quiet"),
    ],
)
def test_everything_takes_the_quieter_of_two_measurements_of_a_latency(
    again_ms: float, counts: float, remark: str, study: Study, working: Working
) -> None:
    work = Disturbed(robust)
    work.again_ms = again_ms
    working(work)
    _, lines = told(session.begin, study)
    board = [line.split() for line in lines[lines.index(next(x for x in lines if x.startswith("candidate "))) :]]
    assert {row[-2] for row in board[1:11]} == {f"{counts:.1f}"}
    with (study.folder / "candidates.csv").open() as file:
        assert {float(row["latency_ms_p50"]) for row in csv.DictReader(file)} == {counts}
    summary, history = summarise(study), SearchHistory(study)
    assert {c.score.latency_ms_p50 for c in (*summary.candidates, *summary.front)} == {counts}
    assert {c.score.latency_ms_p50 for c in history.as_measured()} == {scored(Params({}, {}), 0.5).score.latency_ms_p50}
    assert [summary.remark(c) for c in summary.front] == [remark]
