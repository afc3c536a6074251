"""The race of a fit's inference settings drops losers alone, and changes no figure of those that are scored."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import attacks.evaluation
from attacks.verdicts import Observation
from search.engine.worker import Report, execute
from search.study.candidate import Candidate, Proposal
from search.study.ranking import feasible
from search.study.study import Study
from search.trial import evaluator, scoring
from search.trial.latency import device_name
from search.trial.race import LEAST, Dropped, Entrant, Rivals, contenders, first_images
from search.trial.runner import raced_trial, run_trial
from search.trial.scoring import Scored, unheard
from spaces.domain import Scalar
from tests.conftest import digits_study
from tests.search.trial.test_runner import setting, silent

FIELDS = {"suite": "quick", "eval_images": 120, "threat": "white-box", "eps": 0.1, "epochs": 2, "train_images": 600}


def entrants(*counts: int, ms: Sequence[float] = (1.0, 1.0, 1.0)) -> list[Entrant]:
    """Return settings that withstand on the first `counts` of a hundred images."""
    return [
        Entrant((np.arange(100) < count).astype(float), latency) for count, latency in zip(counts, ms, strict=False)
    ]


@pytest.mark.parametrize(
    ("counts", "kept"),
    [
        ((50, 49, 20), [0, 1]),
        ((10, 60, 59), [1, 2]),
        ((50, 50, 50), [0]),  # the same verdicts: to attack one of them suffices
        ((0, 0), [0]),
        ((1, 0), [0, 1]),  # one image of a hundred decides nothing
    ],
)
def test_who_is_worse_beyond_chance_or_the_same_is_dropped(counts: tuple[int, ...], kept: list[int]) -> None:
    assert contenders(entrants(*counts)) == kept


def test_a_faster_setting_is_not_dropped_for_a_slower_one() -> None:
    assert contenders(entrants(20, 60, ms=(1.0, 5.0))) == [0, 1]
    assert contenders(entrants(20, 60, ms=(5.0, 1.0))) == [1]


def test_of_settings_that_are_equal_the_fastest_drops_the_others_whatever_their_order() -> None:
    assert contenders(entrants(0, 0, 0, ms=(9.0, 5.0, 1.0))) == [2]
    slow, fast, _ = entrants(0, 0, 0, ms=(9.0, 1.0, 1.0))
    assert contenders([slow, replace(fast, feasible=False)]) == [0, 1]


def test_who_violates_a_constraint_drops_none_that_satisfies_all() -> None:
    weak, strong = entrants(20, 60)
    assert contenders([weak, replace(strong, feasible=False)]) == [0, 1]
    assert contenders([replace(weak, feasible=False), replace(strong, feasible=False)]) == [1]
    assert contenders([replace(weak, feasible=False), strong]) == [1]


def test_who_cannot_be_as_good_as_a_rival_is_dropped() -> None:
    """Of 100 images 20 withstand: at most 29 %, by Wilson's interval."""
    assert contenders(entrants(20), [(1.0, 0.3)]) == []
    assert contenders(entrants(20), [(1.0, 0.28)]) == [0]
    assert contenders(entrants(20), [(2.0, 0.3)]) == [0]  # the rival is slower


def test_settings_that_differ_by_chance_alone_are_seldom_dropped() -> None:
    dice = np.random.default_rng(0)
    drawn = (dice.random((400, 2, 60)) < 0.4).astype(float)
    trials = [contenders([Entrant(verdicts_N, 1.0) for verdicts_N in pair]) for pair in drawn]
    assert sum(len(kept) == 1 for kept in trials) < 0.13 * 400  # 5 % each way


@pytest.mark.parametrize(("images", "first"), [(1000, 250), (200, 50), (101, 50), (100, 0), (20, 0)])
def test_there_is_no_race_on_few_images(images: int, first: int) -> None:
    assert first_images(images) == first and LEAST == 50


@pytest.fixture(autouse=True, scope="module")
def _ungated() -> Iterator[None]:
    """Without quick gates, which take longer than these attacks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "quick_gates", lambda *args, **options: ())
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, dict[str, Candidate]]:
    """A training scored at every setting without a race."""
    study = digits_study(tmp_path_factory.mktemp("race"), **FIELDS, scoring="all")
    return study, {c.candidate: c for c in run_trial(study, setting(study), study.store, silent)}


def raced(
    study: Study, *, proposed: Scalar = 0.1, rivals: Rivals = (), heard: Scored = unheard
) -> tuple[list[Candidate], list[Dropped]]:
    """Race on a stored fit whose scores were thrown away."""
    again = study.model_copy(update={"scoring": "race"})
    shutil.rmtree(study.store.root / "scores")
    shutil.rmtree(study.store.root / "races", ignore_errors=True)
    return raced_trial(again, setting(again, sigma_eps=proposed), again.store, silent, rivals=rivals, heard=heard)


def test_a_race_changes_no_figure_and_finds_the_same_winner(whole: tuple[Study, dict[str, Candidate]]) -> None:
    study, every = whole
    found, dropped = raced(study)
    assert len(found) + len(dropped) == 6 == len(every) and len(dropped) >= 2
    assert all(every[c.candidate].score == c.score for c in found)
    best = max(every.values(), key=lambda c: c.score.attacked_accuracy)
    assert max(c.score.attacked_accuracy for c in found) == best.score.attacked_accuracy
    assert {d.images for d in dropped} == {LEAST} and all(0 <= d.accuracy <= 1 for d in dropped)
    assert not {str(dict(d.inference)) for d in dropped} & {str(dict(c.params.inference)) for c in found}


def test_a_training_that_cannot_reach_a_rival_is_scored_at_the_proposed_setting_alone(
    whole: tuple[Study, dict[str, Candidate]],
) -> None:
    found, dropped = raced(whole[0], rivals=((device_name(torch.device("cpu")), 0.0, 0.99),))
    assert len(found) == 1 and found[0].params.inference["sigma_eps"] == 0.1 and len(dropped) == 5
    assert len(raced(whole[0], rivals=(("another device", 0.0, 0.99),))[0]) > 1


def test_a_constraint_on_clean_images_counts_in_the_race(
    whole: tuple[Study, dict[str, Candidate]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of the settings that satisfy it is scored, though others withstand more."""
    study, every = whole
    entered: list[Entrant] = []

    def noted(entrants: Sequence[Entrant], rivals: Sequence[tuple[float, float]]) -> list[int]:
        entered.extend(entrants)
        return contenders(entrants, rivals)

    monkeypatch.setattr(scoring, "contenders", noted)
    clean = {str(dict(c.params.inference)): c.score.clean_accuracy for c in every.values()}
    strict = study.model_copy(update={"min_clean_accuracy": max(clean.values())})
    strongest = max(every.values(), key=lambda c: c.score.attacked_accuracy)
    found, _ = raced(strict, proposed=strongest.params.inference["sigma_eps"])
    met = sum(one == max(clean.values()) for one in clean.values())
    assert [one.feasible for one in entered].count(True) == met < len(clean) == len(entered)
    best = max(feasible(strict, every.values()), key=lambda c: c.score.attacked_accuracy)
    assert best.score.attacked_accuracy == max(c.score.attacked_accuracy for c in feasible(strict, found))


def test_the_proposed_setting_is_scored_though_it_loses(whole: tuple[Study, dict[str, Candidate]]) -> None:
    found, dropped = raced(whole[0], proposed=100.0)
    assert found[0].params.inference["sigma_eps"] == 100.0 and dropped


def test_losers_are_attacked_on_the_first_images_alone(
    whole: tuple[Study, dict[str, Candidate]], monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked: list[int] = []
    observe = attacks.evaluation.observe

    def counted(*args: object, **options: object) -> object:
        attacked.append(int(options["standing_N"].sum()))  # type: ignore[attr-defined]
        return observe(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluator, "observe", counted)
    found, _ = raced(whole[0])
    assert sorted(attacked) == [LEAST] * 6 + [120 - LEAST] * len(found)


def test_a_race_says_how_far_it_is_and_goes_on_where_it_was_ended(
    whole: tuple[Study, dict[str, Candidate]], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, every = whole
    begun, told = list[int](), list[tuple[int, int, int]]()
    begin = evaluator.Evaluator.begin

    def counted(self: evaluator.Evaluator, target: nn.Module) -> Observation:
        begun.append(1)
        return begin(self, target)

    def ends(*progress: int) -> None:
        if progress[0] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluator.Evaluator, "begin", counted)
    with pytest.raises(KeyboardInterrupt):
        raced(study, heard=ends)
    assert len(begun) == 4
    again = study.model_copy(update={"scoring": "race"})
    found, _ = raced_trial(
        again, setting(again, sigma_eps=0.1), again.store, silent, heard=lambda *progress: told.append(progress)
    )
    assert len(begun) == 6  # the contenders go on from what the race found
    assert told == [(i, 6, LEAST) for i in range(1, 7)] + [(i, len(found), 120) for i in range(1, len(found) + 1)]
    assert all(every[c.candidate].score == c.score for c in found)


def test_where_no_contender_is_feasible_the_dropped_are_scored_too(
    whole: tuple[Study, dict[str, Candidate]], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, every = whole
    monkeypatch.setattr("search.trial.scoring.feasible", lambda study, found: [])
    found, dropped = raced(study)
    assert {c.candidate for c in found} == set(every) and dropped == []


def test_where_nothing_can_be_feasible_the_dropped_stay_dropped(whole: tuple[Study, dict[str, Candidate]]) -> None:
    """A latency limit that every setting violates is known before any attack."""
    strict = whole[0].model_copy(update={"max_latency_ms": 1e-9})
    found, dropped = raced(strict)
    assert dropped and not feasible(strict, found)


def test_under_the_oblivious_threat_losers_get_no_white_box_attack(
    whole: tuple[Study, dict[str, Candidate]], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, _ = whole
    oblivious = study.model_copy(update={"threat": "oblivious", "scoring": "race"})
    found, dropped = raced_trial(oblivious, setting(oblivious, sigma_eps=0.1), oblivious.store, silent)
    assert len(found) + len(dropped) == 6 and dropped and {d.images for d in dropped} == {120}


def test_the_record_of_a_trial_has_what_was_dropped(whole: tuple[Study, dict[str, Candidate]]) -> None:
    study = whole[0].model_copy(update={"scoring": "race"})
    shutil.rmtree(study.store.root / "scores")
    study.folder.mkdir(exist_ok=True)
    last = execute(study, Proposal("t001", setting(study, sigma_eps=0.1)), Report(lambda fit, epoch, metrics: None))
    assert len(last["candidates"]) + len(last["dropped"]) == 6
    assert set(last["dropped"][0]) == {"inference", "images", "accuracy"}
