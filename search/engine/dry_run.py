"""Forecast what a search would run and cost, from one timed step on this machine, without training or writing."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from search.formatting import counted, spoken_threat
from search.optimizer.refinement import refinable
from search.storage.store import to_bytes
from search.study.study import Study
from search.trial.runner import TrialRunner
from search.trial.timing import Step
from spaces.domain import spoken
from spaces.exceptions import InputError
from spaces.space import Params

MOST = 1000
"""Largest number of trainings of a space that are looked up in the store."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a search would run; seconds are those of one worker, with the device to itself.

    Args:
        trainings: the maximum; `of` in the whole space, of which `known` are in the store. None: not finite or unknown.
        candidates: candidates of each training.
        refinements: further settings tried at the end, on stored fits.
        classifiers: classifiers to train first; the others that are needed are in the store.
        slots: trials at once.
        train_s: seconds of one training to its last epoch, at the usual setting.
        score_s: seconds to score one fit's candidates.
        first_s: seconds for the classifiers, and for what all trainings share.
        wall_s: seconds of the whole search, less if trainings are stopped early.
        fit_bytes: size of one fit in the store.
    """

    task: str
    defense: str
    threat: str
    suite: str
    images: int
    knobs: dict[str, str]
    trainings: int
    of: int | None
    known: int | None
    candidates: int
    refinements: int
    classifiers: list[str]
    slots: int
    device: str
    epochs: int
    train_s: float
    score_s: float
    first_s: float
    wall_s: float
    gpu_hours: float | None
    fit_bytes: int


def forecast(study: Study, slots: int) -> Forecast:
    """Time a step of training, scoring and measuring latency, and return what the whole search would take.

    Args:
        slots: how many trials the machine or the cluster can run at once.
    """
    step = Step(TrialRunner(study, study.store))
    runner, space = step.runner, study.resolved.space
    whole = space.trainings()
    trainings = study.trials if whole is None else min(study.trials, whole)
    known, settings = _known(runner, whole), runner.scorer.settings(step.usual)
    evaluations = len({str(runner.scorer.aimed(setting).inference) for setting in settings})
    latencies = _latencies(study, settings)
    thresholds = [space.inference[name] for name in study.resolved.defense.thresholds()]
    picked = evaluations if thresholds and not any(domain.single() for domain in thresholds) else 0
    missing = sorted(runner.assets.needed() - _trained(runner))
    refinements = study.refine if refinable(study) else 0

    classifier_s = step.classifier()  # first, as the first optimiser of a process imports half of torch
    training, (evaluation_s, rung_s) = step.training(), step.scoring()
    train_s = 0.0 if study.weights else training.fit + step.epochs * (training.epoch + rung_s)
    score_s = evaluations * evaluation_s + latencies * step.latency()
    first_s = len(missing) * classifier_s + training.shared
    at_once = max(1, min(slots, study.concurrent or slots))
    new = trainings - (known or 0) if trainings == whole else trainings
    trial_s = math.ceil(new / at_once) * train_s + math.ceil(trainings / at_once) * score_s
    wall_s = first_s + trial_s + math.ceil(refinements / at_once) * evaluation_s
    return Forecast(
        task=study.label,
        defense=study.defense,
        threat=spoken_threat(study.resolved.threat),
        suite=study.suite,
        images=study.resolved.eval_images,
        knobs={name: spoken(domain) for name, domain in space.searched().items()},
        trainings=trainings,
        of=whole,
        known=known,
        candidates=len(settings) + picked,
        refinements=refinements,
        classifiers=missing,
        slots=at_once,
        device=step.device,
        epochs=step.epochs,
        train_s=train_s,
        score_s=score_s,
        first_s=first_s,
        wall_s=wall_s,
        gpu_hours=study.gpu_share(True) * at_once * wall_s / 3600 if runner.assets.device.type == "cuda" else None,
        fit_bytes=len(to_bytes(step.defense)),
    )


def slots_here(study: Study) -> int:
    """Return how many trials this machine can run at once.

    Raises:
        InputError: it cannot run even one.
    """
    gpus = torch.cuda.device_count()
    held = {"cpu": float(os.cpu_count() or 1), "gpu": float(gpus)}
    asked = {"cpu": study.cpus_per_trial, "gpu": study.gpu_share(gpus > 0)}
    for kind, amount in asked.items():
        if amount > held[kind]:
            raise InputError(
                f"{kind}s_per_trial must be at most what this machine has, {held[kind]:g}, but is {amount:g}"
            )
    return int(min(held[kind] / amount + 1e-6 for kind, amount in asked.items() if amount))


def said(found: Forecast) -> str:
    """Return the forecast as text for people."""
    knobs = "; ".join(f"{name}: {domain}" for name, domain in found.knobs.items()) or "none"
    of = "" if found.of is None else f" of the {found.of} in the space"
    known = "" if found.known is None else f", {found.known} of the space's in the store"
    first = f"train the classifiers {', '.join(found.classifiers)}" if found.classifiers else "classifiers in the store"
    gpu = "" if found.gpu_hours is None else f", {found.gpu_hours:.1f} GPU-hours"
    refined = f", then {counted(found.refinements, 'refinement')} that train nothing" if found.refinements else ""
    rows = {
        "task": f"{found.defense} on {found.task} ({found.threat}), suite {found.suite}, {found.images} images",
        "knobs": knobs,
        "trainings": f"at most {found.trainings}{of}{known}",
        "candidates": f"{found.candidates} a training{refined}",
        "first": f"{first} and what all share: {_spoken(found.first_s)}",
        "a training": f"{_spoken(found.train_s)} for {found.epochs} epochs, {_spoken(found.score_s)} to score it",
        "stored": f"{found.fit_bytes / 2**20:.1f} MiB a training, in the store",
        "in all": f"about {_spoken(found.wall_s)}, {found.slots} at once{gpu}; less where trainings are stopped early, "
        "and more by the start of Ray and its workers",
        "timed on": found.device,
    }
    return "\n".join(f"{name:<11} {row}" for name, row in rows.items())


def _latencies(study: Study, settings: Sequence[Params]) -> int:
    """Return how many latencies the settings have."""
    knobs = [field.name for field in fields(study.resolved.defense.Inference) if field.metadata["latency"]]
    return len({tuple(setting.inference[name] for name in knobs) for setting in settings})


def _known(runner: TrialRunner, trainings: int | None) -> int | None:
    """Return how many trainings of the space the store has; None where there are too many to look up."""
    held, space = runner.assets.store.held("fits"), runner.study.resolved.space
    if not held:
        return 0
    if trainings is None or trainings > MOST:
        return None
    return sum(runner.trainer.key(params) in held for params in space.at(space.usual()).grid())


def _trained(runner: TrialRunner) -> set[str]:
    """Return the classifiers that need no training: they are in the store, or came with their weights."""
    assets, held = runner.assets, runner.assets.store.held("classifiers")
    needed = assets.needed()
    return {name for name in needed if assets.resolved.task.is_given(name) or assets.classifier_key(name) in held}


def _spoken(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
