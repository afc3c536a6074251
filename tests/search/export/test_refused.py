"""What export refuses before an audit of minutes, what it skips, and where it stops; the workers pretend."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from search.engine.run import run
from search.exceptions import AlarmError
from search.export import evidence, exporter
from search.export.loader import load
from search.optimizer.history import SearchHistory
from search.study import ranking
from search.study.candidate import Candidate
from search.study.study import Study
from search.trial.runner import TrialRunner
from search.trial.training import silent
from spaces.space import Params
from tests.conftest import digits_study
from tests.search.cli.test_cli import said
from tests.search.export.conftest import trained
from tests.support.engine import Pretence


def searched(storage: Path, attacked: Callable[[Params], float]) -> Study:
    """A search of six trainings with six inference settings each; the bare classifier keeps 10 of 100 images."""
    study = digits_study(storage, trials=6)
    run(study, [], debug=True, work=Pretence(attacked).work())
    return study


def by_training(params: Params) -> float:
    return 0.6 if params.train["conv_maps"] == 8 else 0.5


@pytest.fixture
def audits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the candidates that are audited; every audit refuses."""
    tried: list[str] = []

    def refuses(study: Study, candidate: Candidate, *given: Any, **more: Any) -> Path:
        tried.append(candidate.candidate)
        raise AlarmError(f"{candidate.candidate} failed 1 audit check: gradient")

    monkeypatch.setattr(exporter, "export", refuses)
    return tried


@pytest.mark.parametrize("which", ["--top 1", "--top 9", "--pareto", "--candidate BEST"])
def test_what_is_no_better_than_no_defense_is_refused_before_any_audit(
    tmp_path: Path, audits: list[str], which: str
) -> None:
    study = searched(tmp_path, lambda params: 0.14)
    best = SearchHistory(study).feasible()[0].candidate
    words = ("export", "smoke", *which.replace("BEST", best).split(), "--storage", str(tmp_path))
    heard = said(*words)
    assert (heard.code, heard.out, audits) == (2, "", [])
    assert heard.err == (
        f"error: an export must err on 5 points fewer attacked images than no defense, but the search found {best} no "
        "better than no defense, as far as 100 images can tell: 14.0 % against 10.0 % undefended (white-box, Linf eps "
        "0.3). Search again with another --threat, --eps or --defense, or with more training (--epochs, --trials); "
        "--despite-alarms exports it all the same\n"
    )
    assert said(*words, "--despite-alarms").code == 1 and best in audits


def test_a_faster_candidate_of_the_front_that_is_no_better_than_no_defense_is_not_audited(
    tmp_path: Path, audits: list[str]
) -> None:
    study = searched(tmp_path, lambda params: 0.6 if params.inference["sigma_eps"] else 0.1)
    ranked = ranking.ranked(SearchHistory(study).candidates())
    worst = ranked[-1]
    told = exporter.export_all(
        study, [ranked[0], worst], 2, tmp_path / "out", Console(quiet=True), despite_alarms=False
    )
    assert audits == [ranked[0].candidate] and [one["folder"] for one in told] == [None, None]
    assert told[1]["refused"].startswith(f"the search found {worst.candidate} no better than no defense")
    assert told[1]["refused"].endswith("; not audited")


def test_candidates_that_answer_alike_are_audited_once_and_after_three_refusals_it_says_how_to_go_on(
    tmp_path: Path, audits: list[str]
) -> None:
    study = searched(tmp_path, by_training)
    every = SearchHistory(study).feasible()
    fits = list(dict.fromkeys(c.fit for c in every))
    assert len(every) == 36 and len(fits) == 6
    heard = said("export", "smoke", "--top", "1", "--storage", str(tmp_path))
    assert heard.code == 1 and [next(c.fit for c in every if c.candidate == name) for name in audits] == fits[:3]
    lines = [line for line in heard.out.splitlines() if not line.startswith("report")]
    assert [line.split(":")[0] for line in lines[::2]] == ["refused"] * 3
    assert lines[1] == lines[3] == "skipped    5 candidates with the training and every figure of one above"
    following = next(c.candidate for c in every if c.fit == fits[3])
    assert lines[5] == (
        "stopped    after 3 refused candidates, though 3 more rank below, which did no better in the search. Search "
        "again with another --threat, --eps or --defense, or with more training (--epochs, --trials); or try the next: "
        f"python launch.py export smoke --candidate {following} --storage {tmp_path}"
    )
    assert len(lines) == 6


def test_an_export_that_was_written_despite_its_alarms_is_no_winner_afterwards(
    tmp_path: Path, audits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = searched(tmp_path, by_training)
    best = SearchHistory(study).feasible()[0].candidate
    (study.folder / "export" / best).mkdir(parents=True)
    known = {"candidate": best, "alarms": ["gradient: it does not hold that it has one"]}
    monkeypatch.setattr(exporter, "opened", lambda folder: {"evidence.json": json.dumps(known)})
    monkeypatch.setattr(exporter, "verdict_of_audit", lambda known: "better than no defense")
    monkeypatch.setattr(exporter, "audited", lambda known: "")
    monkeypatch.setattr(exporter, "FIGURES", ())
    words = ("export", "smoke", "--top", "1", "--storage", str(tmp_path))
    heard = said(*words)
    assert heard.code == 1 and f"refused: {best} failed 1 audit check: gradient: it does not" in heard.out
    assert best not in audits and len(audits) == 2, "the next ones are tried"
    assert said(*words, "--despite-alarms").code == 0


def test_an_export_that_another_process_wrote_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = searched(tmp_path, by_training)

    def late(study: Study, candidate: Candidate, store: object, out: Path, **more: Any) -> Path:
        with exporter._new(out / candidate.candidate):
            (out / candidate.candidate).mkdir()
            (out / candidate.candidate / "card.md").write_text("of the other")
        raise AssertionError("it must not be replaced")

    monkeypatch.setattr(exporter, "export", late)
    monkeypatch.setattr(exporter, "_said", lambda folder, *_: {"candidate": folder.name, "folder": str(folder)})
    best = SearchHistory(study).feasible()[:1]
    (told,) = exporter.export_all(study, best, 1, tmp_path / "out", Console(quiet=True), despite_alarms=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [best[0].candidate]
    assert (Path(told["folder"]) / "card.md").read_text() == "of the other"


def test_where_fewer_candidates_differ_than_were_asked_for_all_of_them_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched(tmp_path, by_training)

    def written(study: Study, candidate: Candidate, *given: Any, **more: Any) -> Path:
        (folder := study.folder / "export" / candidate.candidate).mkdir(parents=True)
        return folder

    monkeypatch.setattr(exporter, "export", written)
    monkeypatch.setattr(exporter, "_said", lambda folder, *_: {"candidate": folder.name, "folder": str(folder)})
    monkeypatch.setattr(exporter, "log_exports", lambda *_: None)
    heard = said("export", "smoke", "--top", "9", "--storage", str(tmp_path))
    assert heard.code == 0 and len(list((tmp_path / "smoke" / "export").iterdir())) == 6
    skipped = "skipped    5 candidates with the training and every figure of one above"
    stopped = (
        "stopped    after all candidates that differ; 5 more below have the training and every figure of one above"
    )
    assert heard.out.splitlines()[:-1] == [*5 * [skipped], stopped]


def test_a_candidate_that_differs_in_a_figure_or_in_its_training_is_another(tmp_path: Path) -> None:
    study = searched(tmp_path, lambda params: 0.5 + 0.01 * (float(params.inference["sigma_eps"]) > 1))
    every = SearchHistory(study).feasible()
    assert len(ranking.distinct(every)) == 12 and ranking.distinct(every)[0] == every[0]


@pytest.mark.slow
def test_settings_whose_figures_agree_by_chance_are_audited_each(
    tmp_path: Path, audits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the search's verdicts on each image are the same are two settings one."""
    study, one = trained(tmp_path, defense="magnet", knobs={"detector_1": [0.5, 9e5, 1e6], "detector_2": 1e6})
    runner = TrialRunner.of(study, study.store)
    defense = runner.trainer.fit(one.params, silent)[1]
    settings = [Params(one.params.train, {**one.params.inference, "detector_1": each}) for each in (0.5, 9e5, 1e6)]
    found = runner.scorer.candidates(one.fit, defense, settings)[:3]
    verdicts = [runner.verdicts(each.fit, each.params) for each in found]
    assert verdicts[0] != verdicts[1] == verdicts[2] is not None
    chance = [replace(each, score=found[0].score) for each in found]
    monkeypatch.setattr(exporter, "log_exports", lambda *_: None)  # there is no search whose run would take them
    exporter.export_all(study, chance, 3, tmp_path / "out", Console(quiet=True), despite_alarms=True)
    assert audits == [found[0].candidate, found[1].candidate]


@pytest.mark.slow
def test_an_audit_that_refused_is_not_repeated_by_the_same_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, candidate = trained(tmp_path, defense="magnet")
    monkeypatch.setattr(evidence, "REPRODUCED", -1.0)  # a gate that cannot pass
    with pytest.raises(AlarmError, match="reproduced") as first:
        exporter.export(study, candidate, study.store, study.folder / "export")

    def repeated(*given: object) -> None:
        raise AssertionError("it must not be audited again")

    monkeypatch.setattr(exporter, "_examined", repeated)
    console = Console(record=True, width=200)
    with pytest.raises(AlarmError) as again:
        exporter.export(study, candidate, study.store, study.folder / "export", console=console)
    assert str(again.value) == str(first.value) and "was audited 20" in console.export_text()
    forced = exporter.export(study, candidate, study.store, study.folder / "export", despite_alarms=True, refused=2)
    known = json.loads((study.folder / "audits" / f"{candidate.candidate}.json").read_text())
    assert json.loads((forced / "evidence.json").read_text()) == known | {"refused_before_it": 2} and known["alarms"]
    assert load(forced)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    monkeypatch.setattr("search.export.provenance.libraries", lambda: {"torch": "another"})
    with pytest.raises(AssertionError, match="audited again"):
        exporter.export(study, candidate, study.store, tmp_path / "elsewhere", despite_alarms=True)
