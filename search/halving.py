"""Asynchronous successive halving: of those who reach a rung, only the best part goes on.

Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020, Algorithm 2, in the stopping
variant: a trial is judged when it reaches the rung, against those who came before it.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np


class Halving:
    """Decides at each rung which trials are stopped.

    Args:
        epochs: of a whole training; the last epoch is never a rung.
        grace: the first rung, in epochs.
        factor: the rungs lie at grace, grace * factor, grace * factor ** 2, ...; 1 / factor of each goes on.
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

    def stops(self, trial: str, epoch: int, score: float) -> bool:
        """Record the score of a trial at an epoch, and say whether it stops there.

        Args:
            score: higher is better, and means the same at every rung.
        """
        if epoch not in self.rungs:
            return False
        scores = self._scores[epoch]
        scores[trial] = score
        if len(scores) <= self.patience:
            return False
        return score < float(np.quantile(list(scores.values()), 1 - 1 / self.factor))
