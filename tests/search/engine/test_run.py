"""Whole searches on real digits, in this process. What breaks under Ray is in tests/end_to_end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from rich.console import Console
from torch import Tensor, nn

import defenses.puvae
from benchmarks.fault_injection import rows
from defenses.base import Batches, Defense, Metrics
from search import session
from search.engine import local_backend, ray_backend
from search.engine.cluster import WorkerResources
from search.engine.controller import Controller
from search.engine.run import run
from search.engine.worker import Report, seldom
from search.optimizer.history import SearchHistory, pick, state_of
from search.report.status import details
from search.report.summary import summarise
from search.study import ranking
from search.study.callbacks import Callback
from search.study.candidate import Proposal
from search.study.study import Study
from spaces.exceptions import InputError
from tests.conftest import brief_study, digits_study
from tests.search.optimizer.test_early_stopping import PRETENDED
from tests.support.page import Page

TWO_SETTINGS = {"sigma_eps": [0, 1]}
"""Inference settings of each training, of which the second draws noise."""


class Diary(Callback):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def trial_started(self, trial: Proposal) -> None:
        self.heard.append(f"{trial.name} started")

    def epoch_ended(self, trial: Proposal, epoch: int, metrics: Metrics) -> None:
        self.heard.append(f"{trial.name} {epoch}")

    def trial_ended(self, trial: Proposal, state: str, *rest: object) -> None:
        self.heard.append(f"{trial.name} {state}")


def test_the_in_process_twin_tells_the_same_story(tmp_path: Path) -> None:
    diary = Diary()
    assert run(brief_study(tmp_path, trials=2, epochs=2, knobs={"sigma_eps": 0}), [diary], debug=True) == "finished"
    assert diary.heard == [f"{t} {what}" for t in ("t001", "t002") for what in ("started", "1", "2", "finished")]


def test_the_quick_score_without_a_defense_is_told_first_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, diary, study = list[object](), Diary(), digits_study(tmp_path, trials=1, refine=0)
    monkeypatch.setattr(diary, "classifier_trained", lambda study, cheap: told.append(cheap))
    monkeypatch.setattr(diary, "search_started", lambda study, undefended: told.append(undefended.candidate))
    for work in (replace(PRETENDED, quick=lambda study: 0.25), PRETENDED):
        run(study, [diary], debug=True, work=work)
    bare = PRETENDED.undefended(study).candidate
    assert told == [0.25, bare, bare]


@pytest.mark.parametrize("known", [None, "the undefended classifier"])
def test_under_ray_the_quick_score_is_told_first_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str | None
) -> None:
    told = list[object]()
    controller = SimpleNamespace(
        study=digits_study(tmp_path),
        proposer=SimpleNamespace(undefended=lambda: known),
        classifier_trained=told.append,
        begin=lambda undefended: told.append(undefended.candidate),
    )
    monkeypatch.setattr("ray.get", lambda result: result)
    remote = SimpleNamespace(remote=lambda study, resources, what, *more: what(study, *more))
    work = replace(PRETENDED, quick=lambda study: 0.25)
    ray_backend._prepare(cast(Controller, controller), WorkerResources(1, 0), remote, work)
    bare = PRETENDED.undefended(controller.study).candidate
    assert told == ([bare] if known else [0.25, bare])


def test_how_far_a_scoring_is_is_told_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(study: Study, proposal: Proposal, report: Report) -> dict[str, Any]:
        for done in (1, 2):
            report.scored(done, 6, 50)
        return PRETENDED.execute(study, proposal, report)

    told = list[tuple[object, ...]]()
    diary, study = Diary(), digits_study(tmp_path, trials=1, refine=0)
    monkeypatch.setattr(diary, "setting_scored", lambda trial, *progress: told.append((trial.name, *progress)))
    monkeypatch.setattr(local_backend, "seldom", partial(seldom, seconds=0.0))
    assert run(study, [diary], debug=True, work=replace(PRETENDED, execute=scores)) == "finished"
    assert told == [("t001", 1, 6, 50), ("t001", 2, 6, 50)]
    seldom(lambda *progress: told.append(progress), seconds=60.0)(1, 6, 50)
    assert len(told) == 2

    controller = SimpleNamespace(scored=lambda *progress: told.append(progress))
    callbacks = ray_backend.RayCallbacks(cast(Controller, controller))
    callbacks.names["of Ray"] = "t001"
    trial = SimpleNamespace(trial_id="of Ray")
    scheduler = ray_backend.RayScheduler(callbacks)
    assert scheduler.on_trial_result(None, cast(Trial, trial), {"scored": [1, 6, 50]}) == scheduler.CONTINUE
    assert told[2:] == [("t001", 1, 6, 50)]


def test_ray_tune_hands_no_credentials_to_workers_since_ray_would_log_them() -> None:
    assert not [name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]


def test_a_posterior_that_collapsed_is_named_in_the_report(tmp_path: Path) -> None:
    fixed = {"lambda_rc": 0.1, "conv_maps": 4, "sigma_eps": 0.1}
    study = digits_study(
        tmp_path, trials=2, refine=0, suite="quick", method="grid", knobs=fixed | {"lambda_kl": (1e-4, 1e4)}
    )
    assert session.begin(study, Console(quiet=True), debug=True) == 0
    said = {trial.params.train["lambda_kl"]: trial.reason for trial in summarise(study).trials}
    assert said[1e-4] == "" and "the posterior collapsed (0." in said[1e4]
    assert said[1e4] in Page((study.folder / "report.html").read_text()).words


def test_a_defense_that_raises_fails_its_trial_and_not_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = defenses.puvae.PuVAE.fit

    def raises_once(self: defenses.puvae.PuVAE, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        if self.train_knobs.conv_maps == 8:
            raise RuntimeError("conv_maps 8 on purpose")
        yield from honest(self, batches, classifier)

    monkeypatch.setattr(defenses.puvae.PuVAE, "fit", raises_once)
    study = brief_study(tmp_path, trials=8, knobs=TWO_SETTINGS)
    assert run(study, [], debug=True) == "finished"
    history = SearchHistory(study)
    states = [(state_of(t), t.user_attrs.get("reason", "")) for t in history.trials()]
    assert states.count(("failed", "RuntimeError: conv_maps 8 on purpose")) == 4
    assert states.count(("finished", "")) == 4 and len(history.candidates()) == 8


def test_pruned_trials_are_told_as_pruned_and_bring_no_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.0, 0.9, 0.9, 0.1, 0.9, 0.9])  # the first one is without a defense
    monkeypatch.setattr("search.trial.evaluator.Evaluator.cheap", lambda *args: next(scores))
    study = brief_study(tmp_path, trials=3, epochs=2, patience=1, halving=2.0, knobs=TWO_SETTINGS)
    diary = Diary()
    assert run(study, [diary], debug=True) == "finished"
    assert diary.heard[-3:] == ["t003 1", "t003 2", "t003 finished"] and "t002 pruned" in diary.heard
    history = SearchHistory(study)
    assert [state_of(t) for t in history.trials()] == ["finished", "pruned", "finished"]
    assert [t.user_attrs["curve"] for t in history.trials()] == [[[1, 0.9], [2, 0.9]], [[1, 0.1]], [[1, 0.9], [2, 0.9]]]
    assert len(history.candidates()) == 4
    assert not list((tmp_path / ".store" / "progress").glob("*"))  # a pruned fit is not gone on with


def _detached(honest: Callable[[Defense, Tensor], Tensor]) -> Callable[[Defense, Tensor], Tensor]:
    return lambda self, x_NCHW: honest(self, x_NCHW).detach()


def test_a_search_without_a_feasible_candidate_says_everywhere_what_refused_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    for name in ("purify", "surrogate"):
        honest = getattr(defenses.puvae.PuVAE, name)
        monkeypatch.setattr(defenses.puvae.PuVAE, name, _detached(honest))
    study: Study = brief_study(tmp_path, trials=1, min_clean_accuracy=1.0, knobs=TWO_SETTINGS)
    assert session.begin(study, Console(width=160), debug=True) == 0
    shown = capsys.readouterr().out
    candidates = SearchHistory(study).candidates()
    alarmed = Counter(alarm for c in candidates for alarm in c.score.alarms)
    assert len(candidates) == 2 and all(c.score.clean_accuracy < 1 for c in candidates) and alarmed
    why = ranking.refusals_in_words(study, candidates)
    assert "2 of 2 have clean accuracy below 100.0 %" in why and "2 fail the audit check gradient" in why
    assert all(f"the audit check {gate}" in why for gate in alarmed) and why.endswith("; reasons overlap")
    told = session.status(study)
    assert {one["gate"]: one["refused"] for one in told["constraints"] if one["gate"]} == alarmed
    assert "undefended" in shown
    for said in (shown, "\n".join(details(told)), Page((study.folder / "report.html").read_text()).words):
        assert why in said
    with pytest.raises(InputError, match=re.escape(f"{study.name} has none: {why}")):
        pick(study, pareto=False, top=1, candidate=None)
    assert len(rows(study.folder)) == 2
    assert session.proceed(study, Console(width=160, quiet=True), debug=True) == 0  # nothing is left to do
    assert len(rows(study.folder)) == 2
