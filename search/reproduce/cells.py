"""Runs the cells of a paper's table: trains, attacks and times through the store, so that nothing is done twice.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import defenses
from attacks.catalog import ATTACKS
from defenses.base import Defended, Defense, Metrics
from search.classifiers.task import TASKS
from search.data import splits
from search.exceptions import TrialError
from search.reproduce.attack_cell import NotRun, attacked, fooled, reclassified, threat
from search.reproduce.cell_setting import Setting
from search.reproduce.fraction import Fraction, counted
from search.storage.fingerprint import code_digests, fingerprint
from search.storage.store import Content
from search.study.loading import make_study
from search.study.study import Study
from search.trial.runner import TrialRunner
from spaces.exceptions import InputError
from spaces.space import Params, SearchSpace

Report = Callable[[str, int, int, Metrics], None]
"""Called after each epoch with the name of what is trained, the epoch, the number of epochs, and the metrics."""

ROUNDS = 6
"""Rounds of a black-box attacker."""
BATCH = 128
"""Batch size for timing purification, in images."""
TIMED = (1, 3)
"""Numbers of steps that are timed; other numbers are extrapolated from them, because all steps cost the same."""
CHEAP = 64
"""Images for the quick score of an epoch."""
UNTAUGHT = ("class_mean", "defense_gan", "magnet")
"""Defenses whose training does not use a classifier: one fit serves all classifiers."""


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Our result for one cell.

    Args:
        value: a fraction of `images`, or seconds.
        images: number of validation images; 0 if none were needed.
        seconds: the time of the first computation, including training.
        ran: the size of this run: training images, epochs, knobs that the fraction reduced.
        extrapolated: whether the value is seconds of so many steps, extrapolated from those of few (`TIMED`).
    """

    value: float
    images: int
    seconds: float
    ran: Mapping[str, Any]
    extrapolated: bool = False


class Cells:
    """Runs cells in one process, with one store.

    Args:
        storage: as in a study.
        report: called after each epoch; it may raise to stop, and finished epochs are kept.
    """

    def __init__(self, storage: str, data_dir: str | Path | None, portion: Fraction, seed: int, report: Report) -> None:
        self.storage, self.data_dir = storage, None if data_dir is None else str(data_dir)
        self.portion, self.seed, self.report = portion, seed, report
        self._runner: TrialRunner | None = None
        self._failed: dict[str, str] = {}

    def run(self, setting: Setting) -> Ours:
        """Return our result for a setting.

        Raises:
            NotRun: the setting cannot be run here.
        """
        if reason := setting.obstacle(self.data_dir):
            raise NotRun(reason)
        if setting.measure in ("seconds", "ratio"):
            begin, params = time.monotonic(), wanted(setting)
            batch_s, more = self.batch_s(setting, params), self.extrapolates(setting, params)
            spent, value = round(time.monotonic() - begin, 1), batch_s * (setting.images or BATCH) / BATCH
            return Ours(value=value, images=0, seconds=spent, ran={}, extrapolated=more)
        runner, params = self.runner(setting), self.params(setting)
        if setting.limit_s is not None:
            params = self._within(runner, params, setting, setting.limit_s)
        about = self._about(runner, params, setting)
        name = "accuracy" if setting.measure in ("attacked", "clean", "reclassified", "fooled") else setting.measure
        return Ours(value=about[name], images=about["images"], seconds=about["seconds"], ran=about["ran"])

    def missing(self, setting: Setting) -> str:
        """Return the fingerprint of the fit that a setting needs and the store lacks; empty if there is none."""
        if setting.obstacle(self.data_dir) or setting.measure in ("seconds", "ratio") or setting.defense == "none":
            return ""
        runner = self.runner(setting)
        key = runner.trainer.key(self.params(setting))
        return "" if key in runner.assets.store.held("fits") else key

    # The study of a setting.

    def runner(self, setting: Setting) -> TrialRunner:
        """Return the trial runner of a setting; the last one is cached."""
        study = self.study(setting)
        if self._runner is None or self._runner.study != study:
            self._runner = None  # free its images before loading the next ones
            self._runner = TrialRunner(study, study.store)
        return self._runner

    def study(self, setting: Setting) -> Study:
        """Return the study of one training: all its knobs are fixed."""
        task, protect, kind = setting.task, setting.protect, _family(setting)
        dataset = task.partition("/")[0]
        if setting.defense in UNTAUGHT:
            task, protect = next(name for name in TASKS if name.startswith(f"{dataset}/")), protect or task
        params, sizes = self.params(setting), splits.sizes(dataset, self.data_dir)
        free = sizes.attackable(setting.knowledge)
        images = self.portion.training_images(sizes.train)
        # Rungs need only one step of repeated operations: they stop nothing here, and fits do not depend on them.
        rungs = {name: 1 for name in counted(kind)}
        return make_study(
            {
                "name": "reproduce",
                "defense": "identity" if setting.defense == "none" else setting.defense,
                "task": task,
                "protect": None if protect == task else protect,
                "knobs": {**params.flat(), **rungs},
                "threat": "oblivious",
                "suite": "quick",
                "train_images": None if images == sizes.train else images,
                "eval_images": self.portion.attacked(min(setting.images or free, free)),
                "cheap_images": CHEAP,
                "classifier_epochs": self.portion.epochs(setting.classifier_epochs),
                "classifier_recipe": setting.classifier_recipe,
                "storage": self.storage,
                "data_dir": self.data_dir,
                "seed": self.seed,
                "wandb": "disabled",
            }
        )

    def params(self, setting: Setting) -> Params:
        """Return the values of all knobs, reduced to the fraction."""
        return self.portion.params(_family(setting), wanted(setting))

    # Accuracies.

    def _about(self, runner: TrialRunner, params: Params, setting: Setting) -> dict[str, Any]:
        """Return the figures of a cell, from the store or computed now."""
        rounds = self.portion.root(ROUNDS) if setting.knowledge == "black-box" else 0
        verdicts = {"reclassified": reclassified, "fooled": fooled}
        key = fingerprint(
            source=code_digests(attacked.__module__),
            fit="" if setting.defense == "none" else runner.trainer.key(params),
            setting=dict(params.inference),
            classifier=runner.assets.classifier_key(runner.assets.resolved.protected),
            attack=str(setting.attack and ATTACKS[setting.attack]),
            threat=str(threat(setting)),
            attacker=[setting.substitute, setting.oracle, rounds] if rounds else [],
            verdict=setting.measure if setting.measure in verdicts else "attacked",
            gradient=setting.gradient,
            every_target=setting.every_target,
            images=runner.assets.resolved.eval_images,
            seed=self.seed,
        )

        def found() -> Content:
            begin = time.monotonic()
            target = self.target(runner, params, setting)
            verdict = verdicts.get(setting.measure, partial(attacked, rounds=rounds))(runner, target, setting)
            figures = {name: getattr(verdict, name) for name in ("accuracy", "error", "rejection")}
            asked = {"black_box_rounds": rounds} if rounds else {}
            ran = {**self._ran(runner, params, setting), **asked}
            spent = {"seconds": round(time.monotonic() - begin, 1), "ran": ran}
            runs = runner.assets.resolved.task.shape.classes - 1 if setting.every_target else 1  # of each image, alike
            return {}, {**figures, "images": verdict.right.shape[1] // runs, **spent}

        store = runner.assets.store
        store.cached("cells", key, found)
        return store.about("cells", key)

    def target(self, runner: TrialRunner, params: Params, setting: Setting) -> nn.Module:
        """Return the classifier to attack with its defense, which is trained if needed.

        Raises:
            NotRun: the training already failed for another cell of this run.
        """
        if setting.defense == "none":
            return runner.assets.target
        key, epochs = runner.trainer.key(params), int(params.train.get("epochs", 1))
        if key in self._failed:
            raise NotRun(self._failed[key])
        try:
            _, defense = runner.trainer.fit(
                params, lambda epoch, metrics: self.report(setting.defense, epoch, epochs, metrics)
            )
        except (TrialError, InputError, RuntimeError) as error:
            self._failed[key] = f"its training failed: {error}"
            raise
        return Defended(defense, runner.assets.target)

    def _ran(self, runner: TrialRunner, params: Params, setting: Setting) -> dict[str, Any]:
        """Return the size of this run: training images, epochs, batch size and reduced knobs."""
        whole = splits.sizes(runner.assets.resolved.task.dataset, self.data_dir).train
        cut = {n: v for n, v in params.inference.items() if v != wanted(setting).inference[n]}
        trained = {n: params.train[n] for n in ("epochs", "batch_size") if n in params.train}
        images = {"training_images": runner.study.train_images or whole}
        return {**images, "classifier_epochs": runner.study.classifier_epochs, **trained, **cut}

    # Seconds.

    def batch_s(self, setting: Setting, params: Params) -> float:
        """Return the time to purify a batch, in seconds, measured alone on the device."""
        runner = self.runner(setting)
        name = runner.trainer.build(params).descends
        if name is None or not self.extrapolates(setting, params):
            return self._batch_seconds(runner, params)
        return self._slope(runner, params, name)(int(params.inference[name]))

    def extrapolates(self, setting: Setting, params: Params) -> bool:
        """Return whether the time to purify a batch is extrapolated from that of fewer steps."""
        name = self.runner(setting).trainer.build(params).descends
        return name is not None and not self.portion.whole and int(params.inference[name]) > max(TIMED)

    def _batch_seconds(self, runner: TrialRunner, params: Params) -> float:
        defense = runner.trainer.build(params).eval().requires_grad_(False)  # its weights do not matter
        return runner.scorer.latency(defense).ms_p50 / 1000

    def _slope(self, runner: TrialRunner, params: Params, name: str) -> Callable[[int], float]:
        """Return the seconds as a function of the number of steps, from two measurements: all steps cost the same."""
        few, more = (
            self._batch_seconds(runner, Params(params.train, {**params.inference, name: steps})) for steps in TIMED
        )
        each = max(0.0, more - few) / (TIMED[1] - TIMED[0])  # noise on a busy machine may make this negative
        return lambda steps: few + (steps - TIMED[0]) * each

    def _within(self, runner: TrialRunner, params: Params, setting: Setting, limit_s: float) -> Params:
        """Return the params with as many steps as fit into the limit, at most the paper's.

        Raises:
            NotRun: not even one step fits.
        """
        name = runner.trainer.build(params).descends
        if name is None:
            steps, least = 0, self._batch_seconds(runner, params)
        else:
            seconds = self._slope(runner, params, name)
            fitting = [n for n in range(1, int(wanted(setting).inference[name]) + 1) if seconds(n) <= limit_s]
            steps, least = max(fitting, default=0), seconds(1)
        if least > limit_s:
            raise NotRun(f"a batch of {BATCH} takes {least:.2g} s on this device, more than {limit_s:g} s")
        return params if name is None else Params(params.train, {**params.inference, name: steps})


def _family(setting: Setting) -> type[Defense]:
    return defenses.find("identity" if setting.defense == "none" else setting.defense)


def wanted(setting: Setting) -> Params:
    """Return the values of all knobs in the paper."""
    space = SearchSpace.of(_family(setting))
    return space.narrow({**space.defaults, **setting.knobs}).complete({})
