"""A Gaussian process over settings and fidelities: the final accuracy of a training, predicted also from early scores.

Shapes: M observations, Q queries, D coordinates of a setting in [0, 1].
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

Array = NDArray[np.float64]
OFFSET, OWN = 0.3, 0.05
"""Prior deviation of the mean and of a fidelity's distance from it; the share of a setting's variance that its
neighbours do not explain."""
PRIORS = {"length": (math.log(0.35), 0.6), "deviation": (math.log(0.2), 0.6), "decay": (math.log(0.15), 0.8)}
"""Mean and deviation of the log of each hyperparameter, for accuracies in [0, 1]."""
CENTRE, STEADY = 0.3, 2.0
"""The prior mean; the distance in u over which the fidelities' means change."""
ASSUMED = 1e-4
"""The noise variance of an accuracy that is taken as seen though its training still runs."""


class Surrogate:
    """Accuracy f(x, u) of a setting x at a fidelity u, with known noise.

    The covariance is Matern 5/2 in x, with a length for each coordinate, times exp(-decay |u - u'|); each fidelity
    has a mean, which changes smoothly. A fidelity is the number of halvings from a whole training, so that the quick
    score of a quarter of the epochs has u = 2; the final score has u = -1/2. The hyperparameters are the most probable
    of some that are drawn near the last ones: a few of them, known roughly, suffice.

    Source: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), chapters 2 and 4.2; the product of
    kernels over settings and fidelities is Swersky, Snoek and Adams, Multi-Task Bayesian Optimization (NeurIPS 2013).
    """

    def __init__(self, coordinates: int, rng: np.random.Generator) -> None:
        names = ["length"] * coordinates + ["deviation", "decay"]
        self._mean, self._sd = (np.array([PRIORS[name][i] for name in names]) for i in range(2))
        self._log = self._mean.copy()
        self._rng = rng

    def fit(self, x_MD: Array, u_M: Array, y_M: Array, noise_M: Array, *, tries: int = 0) -> None:
        """Condition on observations with the given noise variances, after `tries` of other hyperparameters."""
        self._x, self._u, self._y, self._noise = x_MD, u_M, y_M - CENTRE, noise_M
        self._between = _between(u_M, u_M)
        least = self._loss(self._log) if tries else math.inf
        for i in range(tries):
            moved = self._rng.random(len(self._log)) < 0.6
            log = self._log + moved * self._rng.normal(size=len(self._log)) * (0.5 if i % 2 else 0.2)
            if (loss := self._loss(log)) < least:
                least, self._log = loss, log
        self._root: Any = np.linalg.cholesky(self._covariance(self._log))
        self._weights = _solved(self._root, _solved(self._root, self._y), transposed=True)

    def predict(self, x_QD: Array, u: float) -> Prediction:
        """Return the prediction of the accuracies at a fidelity."""
        return Prediction(self, x_QD, u)

    def _kernel(self, log: Array, x_MD: Array, x_QD: Array, between: tuple[Array, Array]) -> Array:
        a, b = x_MD / np.exp(log[:-2]), x_QD / np.exp(log[:-2])
        square = np.maximum(0.0, (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T)
        far, (apart, offsets) = np.sqrt(5 * square), between
        found: Array = np.exp(2 * log[-2] - far - np.exp(log[-1]) * apart)
        found *= 1 + far + 5 / 3 * square
        found[square < 1e-10] *= 1 + OWN
        found += offsets
        return found

    def _covariance(self, log: Array) -> Array:
        found = self._kernel(log, self._x, self._x, self._between)
        found.flat[:: len(found) + 1] += self._noise
        return found

    def _loss(self, log: Array) -> float:
        """Return the negative log posterior of hyperparameters, up to a constant."""
        root = np.linalg.cholesky(self._covariance(log))
        white = _solved(root, self._y)
        prior = float((((log - self._mean) / self._sd) ** 2).sum())
        return 0.5 * float(white @ white) + float(np.log(np.diag(root)).sum()) + 0.5 * prior


class Prediction:
    """The accuracies of Q settings at one fidelity.

    Args:
        surrogate: after a fit, which may be followed by another one.

    Attributes:
        mean_Q: the expected accuracies.
    """

    def __init__(self, surrogate: Surrogate, x_QD: Array, u: float) -> None:
        self._kernel, self._log, self._root = surrogate._kernel, surrogate._log, surrogate._root
        self._x, self._u = x_QD, np.full(len(x_QD), u)
        self._k_QM = self._kernel(self._log, x_QD, surrogate._x, _between(self._u, surrogate._u))
        self._assumed: list[Array] = []
        self.mean_Q: Array = self._k_QM @ surrogate._weights + CENTRE

    @cached_property
    def _seen_MQ(self) -> Array:
        return _solved(self._root, self._k_QM.T)

    @cached_property
    def _variance_Q(self) -> Array:
        prior = np.exp(2 * self._log[-2]) * (1 + OWN) + 2 * OFFSET**2
        return np.maximum(prior - (self._seen_MQ**2).sum(0), 1e-9)

    @property
    def sd_Q(self) -> Array:
        """The standard deviations of the accuracies."""
        return np.sqrt(self._variance_Q)

    def assume(self, q: int) -> None:
        """Take setting q as seen, with its expected accuracy: no mean changes, its neighbours are less uncertain."""
        one = slice(q, q + 1)
        k_Q = self._kernel(self._log, self._x, self._x[one], _between(self._u, self._u[one]))[:, 0]
        left_Q = k_Q - self._seen_MQ.T @ self._seen_MQ[:, q] - sum(row * row[q] for row in self._assumed)
        self._assumed.append(left_Q / math.sqrt(self._variance_Q[q] + ASSUMED))
        self._variance_Q = np.maximum(self._variance_Q - self._assumed[-1] ** 2, 1e-9)


def _between(u_M: Array, u_Q: Array) -> tuple[Array, Array]:
    """Return the distances of fidelities and the covariances of their means, MQ, which no hyperparameter changes."""
    apart = np.abs(u_M[:, None] - u_Q[None])
    return apart, OFFSET**2 * (1 + np.exp(-0.5 * (apart / STEADY) ** 2))


def _solved(root: Any, y: Array, *, transposed: bool = False) -> Array:
    """Return root^-1 y, or root^-T y, of a lower triangular matrix."""
    found: Array = solve_triangular(root, y, lower=True, trans=int(transposed), check_finite=False)
    return found


def noise(accuracy: float, images: int) -> float:
    """Return the variance of an accuracy that was counted on so many images, kept from 0 by a rule of succession."""
    rate = (min(1.0, max(0.0, accuracy)) * images + 1) / (images + 2)
    return rate * (1 - rate) / images
