"""Predicts how a training will end, from all trainings and their curves, and proposes the next one.

No Ray or W&B in this module. Shapes: T trainings, D coordinates of a setting in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution

from search.optimizer.coordinates import Places, identity
from search.optimizer.surrogate import ASSUMED, Array, Surrogate, noise
from search.study.candidate import Candidate
from search.study.ranking import feasible, violation
from search.study.study import Study
from spaces.domain import Scalar, contains, draw, only
from spaces.space import Params, SearchSpace

FIRST = 4
"""Trainings before the model proposes any: the middle of the space, where no better start is known, and random ones;
far corners were a worse beginning."""
BOLD = 0.5
"""The deviations by which the bound of a training lies above its predicted mean."""
DRAWN, NEAR = 512, 64
"""In a space that cannot be listed a proposal is one of so many random settings and neighbours of the best."""
SHOWN = 100
"""Most trainings that the model learns from, the best ones and the last ones, and most of those that run, the most
promising ones: a prediction takes 20 ms with 100 results."""
TOGETHER, AT_ONCE = 100, 16
"""For every so many trainings that began, one more proposal is chosen at once, up to `AT_ONCE`: on a hundred machines
a result comes every few seconds, and to learn before each proposal takes a core."""
KEPT = 1000
"""Trainings that are remembered of those that ended: so many of the last, and half as many of the best."""
TRIES, OFTEN = 16, 1.1
"""Hyperparameters tried at a time: before each proposal up to `TOGETHER` trainings, then four times as many whenever
there are a tenth more trainings, since one try takes 50 ms."""
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
    device: str = ""
    feasible: bool = False
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
    """The model of a search, from which method `forecast` proposes.

    Its observations of a training are quick scores and the result, the accuracy of the best candidate, with the noise
    of a count of images. Of two trainings with equal curves the model prefers the one in the better region.
    """

    study: Study
    space: SearchSpace
    seed: int
    _trainings: dict[str, _Training] = field(default_factory=dict)
    _front: list[tuple[str, float, float]] = field(default_factory=list)
    _next: list[Params] = field(default_factory=list)
    _drawn: list[tuple[Params, Array]] = field(default_factory=list)
    _tried: set[str] = field(default_factory=set)
    _begun: int = 0
    _sought: int = 0

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng((self.seed, 1))
        self._places = Places(self.space)
        self._surrogate = Surrogate(self._places.count, self._rng)
        self._by_latency = any(self._latency_knob(name) for name in self._places.axes)

    # What happens.

    def began(self, name: str, params: Params) -> None:
        """Record that a training was proposed."""
        self._tried.add(identity(params))
        at, epochs = self._places.of(params), int(params.train.get("epochs", self.study.resolved.epochs))
        self._begun += name not in self._trainings
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
            within = feasible(self.study, candidates)
            best = max(within[:1] or candidates, key=self._worth)
            training.accuracy = max(0.0, self._worth(best))
            training.images, training.latency = best.score.images, best.score.latency_ms_p50
            training.device, training.feasible = best.score.device, bool(within)
            training.inference = best.params.inference
            if within:
                self._compete(training.device, training.latency, training.accuracy)
        self._forget()

    def _worth(self, candidate: Candidate) -> float:
        return 1 - candidate.score.attacked_error - violation(self.study, candidate)

    def knew(self, name: str, params: Params, error: float, latency: float) -> None:
        """Record the result of a training of an earlier search that was judged alike, from which this one begins."""
        self.began(name, params)
        training = self._trainings[name]
        training.running, training.latency, training.images = False, latency, self.study.resolved.eval_images
        training.accuracy = max(training.accuracy or 0.0, 1 - error)

    # What follows.

    def rivals(self) -> tuple[tuple[str, float, float], ...]:
        """Return device, latency in ms and attacked accuracy of the best feasible results: the front of each device."""
        return tuple(self._front)

    def _compete(self, *new: Any) -> None:
        fastest, front = dict[str, float](), list[tuple[str, float, float]]()
        for device, latency, accuracy in sorted([*self._front, new], key=lambda one: -one[2]):
            if latency < fastest.get(device, math.inf):
                fastest[device] = latency
                front.append((device, latency, accuracy))
        self._front = front

    def _forget(self) -> None:
        """Forget, from time to time, what can no longer be among the trainings that the model learns from."""
        if len(ended := [name for name, training in self._trainings.items() if not training.running]) >= 2 * KEPT:
            worst = sorted(ended[:-KEPT], key=lambda name: -(self._trainings[name].accuracy or 0.0))[KEPT // 2 :]
            for name in worst:
                del self._trainings[name]

    def propose(self, unseen: Sequence[Params] | None) -> Params:
        """Return the training with the greatest upper bound, at the best known inference setting.

        The first one is the nearest to the middle of the space, unless one began elsewhere; some random ones follow.

        Args:
            unseen: the trainings that remain; None if they cannot be listed.
        """
        chosen, results = self._chosen(unseen), self._results()
        best = max(results, key=lambda training: training.accuracy or 0.0, default=None)
        usual = self.space.at(chosen.train).usual()
        return Params(chosen.train, {**usual, **(best.inference if best else {})})

    def _chosen(self, unseen: Sequence[Params] | None) -> Params:
        if not self._next:
            self._next = self._several(unseen)
        return self._next.pop(0)

    def _several(self, unseen: Sequence[Params] | None) -> list[Params]:
        """Return the next proposals, of which each takes those before it as ended as predicted."""
        if not self._begun:
            pool, placed = zip(*self._pool(unseen), strict=True)
            away = ((np.array(placed) - 0.5) ** 2).sum(-1)
            return [pool[int(np.argmin(away + 1e-9 * self._rng.random(len(away))))]]
        if self._begun < FIRST or not self._results():
            return [self.space.drawn(self._rng) if unseen is None else unseen[int(self._rng.integers(len(unseen)))]]
        pool, placed = zip(*self._pool(unseen), strict=True)
        places = np.array(placed)
        self._learn()
        prediction, scaled = self._surrogate.predict(places, FINAL), self._scaled(self._nearest(places))
        left = np.zeros(len(pool))
        chosen: list[int] = []
        for _ in range(min(AT_ONCE, max(1, self._begun // TOGETHER), len(pool))):
            if chosen:
                prediction.assume(chosen[-1])
            bound = prediction.mean_Q + BOLD * prediction.sd_Q - self._weight() * scaled + left
            chosen.append(int(np.argmax(bound + 1e-9 * self._rng.random(len(bound)))))
            left[chosen[-1]] = -math.inf
        return [pool[i] for i in chosen]

    def _pool(self, unseen: Sequence[Params] | None) -> list[tuple[Params, Array]]:
        """Return the settings among which to choose: all that remain, or new random ones and neighbours of the best."""
        if unseen is not None:
            if len(unseen) > LISTED:
                unseen = [unseen[i] for i in self._rng.permutation(len(unseen))[:LISTED]]
            return [(params, self._places.of(params)) for params in unseen]
        # Of a long search, most were in the last pool too: to draw and to place one takes a quarter of a millisecond.
        kept = self._drawn[DRAWN // 8 :] if self._begun >= TOGETHER else []
        new = [self.space.drawn(self._rng) for _ in range(DRAWN - len(kept))]
        self._drawn = kept + [(params, self._places.of(params)) for params in new]
        best = sorted(self._results(), key=lambda training: -(training.accuracy or 0.0))[:3]
        near = [self._near(training.params) for training in best for _ in range(NEAR // len(best))]
        every = self._drawn + [(params, self._places.of(params)) for params in near]
        fresh = {key: one for one in every if (key := identity(one[0])) not in self._tried}
        return list(fresh.values()) or every

    # The model.

    def _results(self) -> list[_Training]:
        return [training for training in self._trainings.values() if training.accuracy is not None]

    def _learn(self) -> None:
        rows: list[tuple[Array, float, float, float]] = []
        known = [training for training in self._trainings.values() if training.curve or training.accuracy is not None]
        if len(known) > SHOWN:
            last = known[-SHOWN // 2 :]
            known = [*sorted(known[: -SHOWN // 2], key=lambda t: -(t.accuracy or 0.0))[: SHOWN // 2], *last]
        quick = self.study.cheap_images
        for training in known:
            rows += [(training.at, fidelity, score, noise(score, quick)) for fidelity, score in training.seen()]
            if training.accuracy is not None:
                rows.append((training.at, FINAL, training.accuracy, noise(training.accuracy, training.images)))
        x_MD, *rest = (np.array(column) for column in zip(*rows, strict=True))
        self._surrogate.fit(x_MD, *rest, tries=self._tries())
        if running := [t for t in self._trainings.values() if t.running]:  # as if they ended as predicted
            places = np.array([training.at for training in running])
            mean = self._surrogate.predict(places, FINAL).mean_Q
            if len(running) > SHOWN:
                promising = np.argsort(-mean)[:SHOWN]
                places, mean = places[promising], mean[promising]
            more = np.full(len(mean), FINAL), mean, np.full(len(mean), ASSUMED)
            joined = [np.concatenate([old, new]) for old, new in zip(rest, more, strict=True)]
            self._surrogate.fit(np.concatenate([x_MD, places]), *joined)

    def _tries(self) -> int:
        if TOGETHER <= self._begun < OFTEN * self._sought:
            return 0
        self._sought = self._begun
        return TRIES if self._begun < TOGETHER else 4 * TRIES

    def _weight(self) -> float:
        """Return the weight of latency in this proposal: every other one asks for accuracy alone.

        Source: random scalarisations, Knowles, ParEGO (IEEE Trans. Evol. Comp. 2006).
        """
        return float(self._rng.random()) / 2 if self._by_latency and self._rng.random() < 0.5 else 0.0

    def _nearest(self, places: Array) -> Array:
        """Return for each place the latency of the nearest training that has one, in ms."""
        known = np.array([training.at for training in self._results()])
        nearest = ((known**2).sum(-1) - 2 * places @ known.T).argmin(1)  # without the square of the place itself
        return np.array([training.latency for training in self._results()])[nearest]

    def _scaled(self, latencies: Array) -> Array:
        """Return latencies between 0 and 1, the least and the greatest of all results."""
        every = [training.latency for training in self._results()]
        return (latencies - min(every)) / max(max(every) - min(every), 1e-9)

    def _latency_knob(self, name: str) -> bool:
        return bool(self.study.resolved.defense.Train.__dataclass_fields__[name].metadata["latency"])

    def _near(self, params: Params) -> Params:
        """Return a setting that differs from another in some knobs, by a tenth of a range or a step of a grid."""
        axes = self._places.axes
        old, moved = params.flat(), self._rng.random(len(axes)) < max(0.3, 1 / max(1, len(axes)))
        change = dict(zip(axes, moved, strict=True))

        def value(name: str, domain: BaseDistribution) -> Scalar:
            if domain.single():
                return only(name, domain)
            if name not in change or not contains(domain, old[name]):  # it did not matter there
                return draw(domain, self._rng)
            return axes[name].neighbour(old[name], self._rng) if change[name] else old[name]

        return self.space.setting(value)
