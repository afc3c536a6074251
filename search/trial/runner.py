"""One trial: train or load a defense, then score it at every inference setting. No Ray, Optuna or W&B in this module.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from attacks.catalog import IFGSM_TARGETED
from attacks.seeding import reproducible
from attacks.suites import SUITES
from defenses.base import Defended, Defense
from search.storage.atomic import write_atomic
from search.storage.store import Store
from search.study.candidate import Candidate, Latency
from search.study.study import Study
from search.trial.assets import Assets
from search.trial.pictures import drawn
from search.trial.race import Dropped, Rivals
from search.trial.scoring import Scored, Scorer, unheard
from search.trial.training import Report, Trainer, silent
from spaces.space import Params


def run_trial(study: Study, params: Params, store: Store, report: Report, *, alone: bool = False) -> list[Candidate]:
    """Train or load the fit of `params`, and score it at every inference setting: the candidates of `raced_trial`."""
    return raced_trial(study, params, store, report, alone=alone)[0]


def raced_trial(
    study: Study,
    params: Params,
    store: Store,
    report: Report,
    *,
    alone: bool = False,
    rivals: Rivals = (),
    heard: Scored = unheard,
) -> tuple[list[Candidate], list[Dropped]]:
    """Train or load the fit of `params`, and score it at every inference setting that does not lose the race.

    Args:
        alone: score it only at the proposed setting.
        heard: called after each setting that was attacked.

    Returns:
        The candidates, the proposed setting first, and the settings that were dropped.

    Raises:
        TrialError: the training diverged, or an attack would not fit into the memory.
    """
    runner = TrialRunner.of(study, store)
    settings = [params] if alone else runner.scorer.settings(params)
    if study.resolved.defense.memory is not Defense.memory:
        runner.scorer.check_memory(runner.trainer.build(params), settings)
    key, defense = runner.trainer.fit(params, report)
    return runner.scorer.raced(key, defense, settings, rivals, heard)


def baseline(study: Study, store: Store) -> Candidate:
    """Return the bare classifier as a candidate, scored by the same suite on the same images."""
    runner = TrialRunner.of(study, store)
    evaluation = runner.scorer.evaluation("undefended", None)
    return Candidate(
        candidate="undefended",
        fit=runner.assets.classifier_key(study.resolved.protected),
        defense="none",
        task=study.label,
        params=Params({}, {}),
        score=runner.assets.evaluator.score(evaluation, evaluation.found.limits_S, None),
    )


class TrialRunner:
    """Runs the trials of a study.

    Attributes:
        assets: data, classifiers and images that all trials share.
        trainer: trains or loads fits.
        scorer: scores their candidates.
    """

    def __init__(self, study: Study, store: Store, *, with_validation: bool = False) -> None:
        self.study = study
        self.assets = Assets(study, store, with_validation=with_validation)
        self.trainer = Trainer(self.assets)
        self.scorer = Scorer(self.assets)

    @staticmethod
    def of(study: Study, store: Store) -> TrialRunner:
        """Return this process's runner of the study; it is reused, since its images are already on the device."""
        global _LAST
        asked = study, store.root, store.mirror
        if _LAST is None or (_LAST.study, _LAST.assets.store.root, _LAST.assets.store.mirror) != asked:
            _LAST = None  # free its images before the next runner loads its own
            _LAST = TrialRunner(study, store)
        return _LAST

    def quick(self) -> float:
        """Return the quick score of the bare classifier, for which only the quick score's own attacks are made."""
        evaluator, target = self.assets.evaluator_of(SUITES["quick"]), self.assets.target
        with self.assets.device_lock.working():
            return evaluator.cheap(target, self.study.cheap_images)

    def verdicts(self, fit: str, params: Params) -> bytes | None:
        """Return the search's verdicts on each image at a setting, as `Scorer.verdicts`; None if it is not stored."""
        if self.trainer.key(params) != fit or self.assets.store.get("fits", fit) is None:
            return None
        return self.scorer.verdicts(fit, self.trainer.fit(params, silent)[1], params)

    def remeasured(self, params: Params) -> Latency:
        """Re-measure the latency of a stored fit at one setting; the stored latency stays."""
        _, defense = self.trainer.fit(params, silent)
        return self.scorer.measured(defense)

    def remarks(self, params: Params) -> tuple[str, ...]:
        """Return what a stored fit says of itself on the evaluation's clean images."""
        _, defense = self.trainer.fit(params, silent)
        evaluator = self.assets.evaluator
        with torch.no_grad(), self.assets.device_lock.working():
            return defense.remarks(evaluator.x_NCHW, evaluator.y_N)

    def picture(self, params: Params, path: Path, images: int = 10) -> Path:
        """Write a PNG with rows of clean, attacked (oblivious targeted iFGSM) and purified images.

        The last row shows the difference of the purified and the clean images; the caption has the predictions.
        """
        _, defense = self.trainer.fit(params, silent)
        attack, assets, evaluator = IFGSM_TARGETED.name, self.assets, self.assets.evaluator
        sample = evaluator.x_NCHW[:images], evaluator.oblivious[attack][:images], evaluator.y_N[:images]
        under = f"{attack}, {replace(self.study.resolved.threat, knowledge='oblivious')}"
        target = Defended(defense, assets.target)
        with torch.no_grad(), reproducible(defense, self.study.seed), assets.device_lock.working():
            return write_atomic(path, drawn(target, *sample, under))


_LAST: TrialRunner | None = None
"""The runner of the study that this process used last."""
