"""Predicts how a training will end, from all trainings and their curves: proposes the next one, and stops the hopeless.

No Ray or W&B in this module. Shapes: T trainings, D coordinates of a setting in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from optuna.distributions import BaseDistribution

from search.optimizer.coordinates import coordinates, stepped, width
from search.optimizer.surrogate import Array, Surrogate
from search.study.candidate import Candidate
from search.study.ranking import constraints, feasible
from search.study.study import Study
from spaces.domain import Scalar
from spaces.space import Params, SearchSpace

FIRST = 4
"""Trainings that are spread over the space before the model proposes any."""
DRAWN, NEAR = 512, 64
"""In a space that cannot be listed a proposal is one of so many random settings and neighbours of the best."""
HOPE = 0.05
"""A training is stopped where its chance to beat the best one falls below this."""
SHOWN = 100
"""Most trainings that the model learns from: the best ones and the last ones; a prediction takes 20 ms with so many."""
TRIES = 16
LISTED = 1000
"""Most of the remaining trainings among which a proposal is chosen."""
FINAL = -0.5
"""The fidelity of a final score (search/optimizer/surrogate.py)."""


@dataclass
class _Training:
    """What is known of one training: its place, its quick scores, and its best accuracy within the constraints."""

    params: Params
    at: Array
    epochs: int
    curve: dict[int, float] = field(default_factory=dict)
    images: int = 0
    accuracy: float | None = None
    latency: float = 0.0
    inference: Mapping[str, Scalar] = field(default_factory=dict)
    running: bool = True

    def seen(self) -> Iterator[tuple[float, float]]:
        """Yield the fidelity and the quick score of the last epoch and of epochs 1, 2, 4, 8, ...: others add little."""
        last = max(self.curve, default=0)
        for epoch, score in self.curve.items():
            if epoch == last or epoch & (epoch - 1) == 0:
                yield math.log2(max(self.epochs, epoch) / epoch), score


@dataclass
class Forecast:
    """The model of a search; a `Rule` of early stopping, and the source of proposals of method `forecast`.

    Its observations of a training are quick scores and the result, the accuracy of the best candidate, with the noise
    of a count of images. Of two trainings with equal curves the model prefers the one in the better region.
    """

    study: Study
    space: SearchSpace
    seed: int
    _trainings: dict[str, _Training] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._axes = {name: d for name, d in self.space.searched().items() if name in self.space.train}
        self._rng = np.random.default_rng((self.seed, 1))
        self._surrogate = Surrogate(sum(width(domain) for domain in self._axes.values()), self._rng)
        self._by_latency = any(self._latency_knob(name) for name in self._axes)
        self._grace = self.study.grace or 1

    # What happens.

    def began(self, name: str, params: Params) -> None:
        """Record that a training was proposed."""
        at, epochs = self._place(params), int(params.train.get("epochs", self.study.resolved.epochs))
        self._trainings.setdefault(name, _Training(params, at, epochs)).running = True

    def saw(self, name: str, epoch: int, score: float) -> None:
        """Record the quick score of an epoch."""
        if (training := self._trainings.get(name)) is not None:
            training.curve[epoch] = score

    def ended(self, name: str, candidates: Sequence[Candidate] = ()) -> None:
        """Record how a training ended; without candidates if it was stopped or failed."""
        if (training := self._trainings.get(name)) is None:
            return
        training.running = False
        if candidates:
            best = (*feasible(self.study, candidates), *candidates)[0]
            broken = sum(max(0.0, excess) for excess in constraints(self.study, best).values())
            training.accuracy = max(0.0, 1 - best.score.attacked_error - broken)
            training.images, training.latency = best.score.images, best.score.latency_ms_p50
            training.inference = best.params.inference

    # What follows.

    def stops(self, trial: str, epoch: int, score: float) -> bool:
        """Record the quick score of a trial, and return whether its chance to beat the best result is too small."""
        self.saw(trial, epoch, score)
        training = self._trainings.get(trial)
        if training is None or epoch < self._grace or not self._results() or training.accuracy is not None:
            return False
        rivals = self._results()
        if self._by_latency:  # a faster training need not be more accurate
            slow = self._nearest(training.at[None])[0]
            rivals = [rival for rival in rivals if rival.latency <= slow]
        self._learn()
        mean, sd = self._surrogate.predict(training.at[None], FINAL)
        return NormalDist(mean[0], sd[0]).cdf(self._best(0.0, rivals)) > 1 - HOPE

    def propose(self, unseen: Sequence[Params] | None) -> Params:
        """Return the training with the greatest expected improvement, at the best known inference setting.

        The first trainings are spread over the space.

        Args:
            unseen: the trainings that remain; None if they cannot be listed.
        """
        chosen, results = self._chosen(unseen), self._results()
        best = max(results, key=lambda training: training.accuracy or 0.0, default=None)
        usual = self.space.at(chosen.train).usual()
        return Params(chosen.train, {**usual, **(best.inference if best else {})})

    def _chosen(self, unseen: Sequence[Params] | None) -> Params:
        pool = self._pool(unseen)
        places = np.array([self._place(params) for params in pool])
        if len(self._trainings) < FIRST or not self._results():
            return pool[self._farthest(places)]
        self._learn(tries=TRIES)
        weight = self._weight()
        mean, sd = self._surrogate.predict(places, FINAL)
        slowness = self._scaled(self._nearest(places))
        gain = _improvement(mean - weight * slowness, sd, self._best(weight, self._results()))
        return pool[int(np.argmax(gain + 1e-12 * self._rng.random(len(gain))))]

    def _pool(self, unseen: Sequence[Params] | None) -> Sequence[Params]:
        """Return the settings among which to choose: all that remain, or random ones and neighbours of the best."""
        if unseen is not None and len(unseen) <= LISTED:
            return unseen
        if unseen is not None:
            return [unseen[i] for i in self._rng.choice(len(unseen), LISTED, replace=False)]
        drawn = [self.space.drawn(self._rng) for _ in range(DRAWN)]
        best = sorted(self._results(), key=lambda training: -(training.accuracy or 0.0))[:3]
        return drawn + [self._near(training.params) for training in best for _ in range(NEAR // len(best))]

    # The model.

    def _results(self) -> list[_Training]:
        return [training for training in self._trainings.values() if training.accuracy is not None]

    def _learn(self, tries: int = 0) -> None:
        rows: list[tuple[Array, float, float, float]] = []
        known = [training for training in self._trainings.values() if training.curve or training.accuracy is not None]
        if len(known) > SHOWN:
            last = known[-SHOWN // 2 :]
            known = [*sorted(known[: -SHOWN // 2], key=lambda t: -(t.accuracy or 0.0))[: SHOWN // 2], *last]
        quick = self.study.cheap_images
        for training in known:
            rows += [(training.at, fidelity, score, _noise(score, quick)) for fidelity, score in training.seen()]
            if training.accuracy is not None:
                rows.append((training.at, FINAL, training.accuracy, _noise(training.accuracy, training.images)))
        x_MD, *rest = (np.array(column) for column in zip(*rows, strict=True))
        self._surrogate.fit(x_MD, *rest, tries=tries)
        if tries and (running := [t for t in self._trainings.values() if t.running]):  # as if they ended as predicted
            places = np.array([training.at for training in running])
            mean, _ = self._surrogate.predict(places, FINAL)
            more = np.full(len(running), FINAL), mean, np.full(len(running), 1e-4)
            joined = [np.concatenate([old, new]) for old, new in zip(rest, more, strict=True)]
            self._surrogate.fit(np.concatenate([x_MD, places]), *joined)

    def _best(self, weight: float, found: Sequence[_Training]) -> float:
        """Return the best predicted result of trainings that have one, less their weighted latency."""
        mean, _ = self._surrogate.predict(np.array([training.at for training in found]), FINAL)
        return float((mean - weight * self._scaled(np.array([training.latency for training in found]))).max())

    def _weight(self) -> float:
        """Return the weight of latency in this proposal: every other one asks for accuracy alone.

        Source: random scalarisations, Knowles, ParEGO (IEEE Trans. Evol. Comp. 2006).
        """
        return float(self._rng.random()) / 2 if self._by_latency and self._rng.random() < 0.5 else 0.0

    def _nearest(self, places: Array) -> Array:
        """Return for each place the latency of the nearest training that has one, in ms."""
        known = np.array([training.at for training in self._results()])
        nearest = ((places[:, None] - known[None]) ** 2).sum(-1).argmin(1)
        return np.array([training.latency for training in self._results()])[nearest]

    def _scaled(self, latencies: Array) -> Array:
        """Return latencies between 0 and 1, the least and the greatest of all results."""
        every = [training.latency for training in self._results()]
        return (latencies - min(every)) / max(max(every) - min(every), 1e-9)

    def _latency_knob(self, name: str) -> bool:
        return bool(self.study.resolved.defense.Train.__dataclass_fields__[name].metadata["latency"])

    # Places of settings.

    def _place(self, params: Params) -> Array:
        values = params.flat()
        parts = [
            coordinates(domain, values[name]) if self.space.matters(name, values) else [0.5] * width(domain)
            for name, domain in self._axes.items()
        ]
        return np.array([coordinate for part in parts for coordinate in part])

    def _farthest(self, places: Array) -> int:
        """Return the place farthest from all trainings; the first is random."""
        if not self._trainings:
            return int(self._rng.integers(len(places)))
        known = np.array([training.at for training in self._trainings.values()])
        far = np.abs(places[:, None] - known[None]).sum(-1).min(1)
        return int(np.argmax(far + 1e-6 * self._rng.random(len(far))))

    def _near(self, params: Params) -> Params:
        """Return a setting that differs from another in some knobs, by a tenth of a range or a step of a grid."""
        old, moved = params.flat(), self._rng.random(len(self._axes)) < max(0.3, 1 / max(1, len(self._axes)))
        change = dict(zip(self._axes, moved, strict=True))
        drawn = self.space.drawn(self._rng).flat()

        def value(name: str, domain: BaseDistribution) -> Scalar:
            if domain.single() or name not in change:
                return drawn[name]
            return stepped(domain, old[name], self._rng) if change[name] else old[name]

        return self.space.setting(value)


def _improvement(mean: Array, sd: Array, best: float) -> Array:
    """Return the expected improvement over `best`. Source: Jones, Schonlau and Welch (1998), Eq. 15."""
    z = (mean - best) / sd
    cdf = np.array([0.5 * math.erfc(-one / math.sqrt(2)) for one in z])
    found: Array = sd * (z * cdf + np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))
    return found


def _noise(accuracy: float, images: int) -> float:
    """Return the variance of an accuracy that was counted on so many images, kept from 0 by a rule of succession."""
    rate = (min(1.0, max(0.0, accuracy)) * images + 1) / (images + 2)
    return rate * (1 - rate) / images
