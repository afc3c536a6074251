"""Rules that stop trainings early, based on the quick score of each epoch. No Ray, Optuna or W&B in this module."""

from __future__ import annotations

from collections import defaultdict
from math import isclose
from statistics import fmean, median
from typing import Protocol

import numpy as np

from search.study.study import Study


class Rule(Protocol):
    """Decides at each epoch whether a training stops; a training that reaches its last epoch has finished."""

    def saw(self, trial: str, epoch: int, score: float) -> None:
        """Record the quick score of a trial at an epoch; higher is better, with the same meaning at every epoch."""

    def stops(self, trial: str, epoch: int, score: float) -> bool:
        """Record the quick score of a trial at an epoch, and return whether the trial stops there."""


class Halving:
    """Asynchronous successive halving: of the trials that reach a rung, only the best fraction continues.

    Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020, Algorithm 2, in the stopping
    variant: a trial is compared, when it reaches the rung, with the trials that reached it before.

    Args:
        epochs: epochs of a full training; the last epoch is never a rung.
        grace: the first rung, in epochs.
        factor: the rungs are at grace, grace * factor, grace * factor ** 2, ...; 1 / factor of each continues.
        patience: how many trials reach a rung before any is stopped there.
    """

    def __init__(self, *, epochs: int, grace: int, factor: float, patience: int) -> None:
        self.rungs = {grace}
        while max(self.rungs) * factor < epochs:
            self.rungs.add(max(max(self.rungs) + 1, round(max(self.rungs) * factor)))
        self.rungs = {rung for rung in self.rungs if rung < epochs}
        self.factor = factor
        self.patience = patience
        self._scores: dict[int, dict[str, float]] = defaultdict(dict)

    def saw(self, trial: str, epoch: int, score: float) -> None:
        self._scores[epoch][trial] = score

    def stops(self, trial: str, epoch: int, score: float) -> bool:
        """Return whether the trial is not in the best fraction of those that reached the rung."""
        self.saw(trial, epoch, score)
        scores = self._scores[epoch]
        if epoch not in self.rungs or len(scores) <= self.patience:
            return False
        last = float(np.quantile(list(scores.values()), 1 - 1 / self.factor))
        return score < last and not isclose(score, last)  # as floats, 1 - 1 / 3 is a little more than 2 / 3


class Median:
    """The median rule: a trial stops if its best score so far is below the median of the others' running averages.

    Source: Golovin et al., Google Vizier: A Service for Black-Box Optimization, KDD 2017, section 3.2.2. There the
    others are the completed trials; here they are all that have reached the epoch, since trials run in parallel.

    Args:
        epochs: epochs of a full training; no trial is stopped at the last epoch.
        grace: the first epoch at which a trial may be stopped.
        patience: how many other trials reach an epoch before any is stopped there.
    """

    def __init__(self, *, epochs: int, grace: int, patience: int) -> None:
        self.judged = range(grace, epochs)
        self.patience = max(1, patience)
        self._curves: dict[str, dict[int, float]] = defaultdict(dict)
        self._averages: dict[int, dict[str, float]] = defaultdict(dict)

    def saw(self, trial: str, epoch: int, score: float) -> None:
        curve = self._curves[trial]
        curve[epoch] = score
        self._averages[epoch][trial] = fmean(curve[e] for e in curve if e <= epoch)

    def stops(self, trial: str, epoch: int, score: float) -> bool:
        """Return whether the best score up to this epoch is below the median of the others' averages up to it."""
        self.saw(trial, epoch, score)
        so_far = [score for e, score in self._curves[trial].items() if e <= epoch]
        others = [average for other, average in self._averages[epoch].items() if other != trial]
        if epoch not in self.judged or len(others) < self.patience:
            return False
        return max(so_far) < median(others)


class Never:
    """Stops no trial."""

    def saw(self, trial: str, epoch: int, score: float) -> None:
        """Do nothing."""

    def stops(self, trial: str, epoch: int, score: float) -> bool:
        """Return False."""
        return False


def grace(study: Study, epochs: int) -> int:
    """Return the number of epochs before a training may be stopped; the longest has `epochs`."""
    return study.grace or max(1, epochs // 2)


def rungs(study: Study, epochs: int) -> list[int]:
    """Return the epochs at which halving stops trials, or would if it were the study's rule."""
    return sorted(_halving(study, epochs).rungs)


def rule_of(study: Study) -> Rule:
    """Return the study's rule, without any recorded score."""
    epochs = study.resolved.epochs
    match study.stopping:
        case "halving":
            return _halving(study, epochs)
        case "median":
            return Median(epochs=epochs, grace=grace(study, epochs), patience=study.patience)
        case "none":
            return Never()


def _halving(study: Study, epochs: int) -> Halving:
    return Halving(epochs=epochs, grace=grace(study, epochs), factor=study.halving, patience=study.patience)
