"""Refinement: further inference settings for the best fits, at the end of a search, without training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import optuna
from optuna.samplers import GPSampler

from search.optimizer.samplers import asked, lesson
from search.study.candidate import Candidate
from search.study.ranking import OBJECTIVES, feasible, ranked
from search.study.study import Study
from spaces.domain import Scalar
from spaces.space import GRID_LIMIT, Params, SearchSpace

FITS = 3
"""How many fits are refined."""
TRIES = 20
"""How many random settings may already be scored before a fit counts as exhausted."""


def refinable(study: Study) -> bool:
    """Return whether a fit is scored at only part of its inference settings; thresholds are exact in any case."""
    resolved = study.resolved
    size = resolved.space.at(resolved.space.setting(resolved.space.usual_of).train).size()
    moved = set(resolved.space.searched()) & set(resolved.space.inference) - set(resolved.defense.thresholds())
    return bool(moved) and (size is None or size > GRID_LIMIT)


class Refiner:
    """Chooses inference settings for the best fits in turn, with a Gaussian process on each fit's candidates.

    Args:
        candidates: all candidates of the search, from which the best fits and their scored settings are taken.
    """

    def __init__(self, study: Study, candidates: Sequence[Candidate], seed: int) -> None:
        self.study = study
        self.resolved = study.resolved
        best = dict.fromkeys(c.fit for c in (*feasible(study, candidates), *ranked(candidates)))
        self._fits = {fit: [c for c in candidates if c.fit == fit] for fit in list(best)[:FITS]}
        self._pending: dict[str, Params] = {}
        self._rng = np.random.default_rng(seed)
        self._turn = 0

    def choose(self, name: str) -> Params | None:
        """Return a setting that was not scored yet, or None if no fit has one."""
        for _ in range(len(self._fits)):
            scored = list(self._fits.values())[self._turn % len(self._fits)]
            self._turn += 1
            params = self._new(scored)
            if params is not None:
                self._pending[name] = params
                return params
        return None

    def take(self, name: str, candidates: Iterable[Candidate]) -> None:
        """Record the candidates of a setting that has ended."""
        self._pending.pop(name)
        for candidate in candidates:
            if candidate.fit in self._fits:  # false if the fit was lost and its defense has changed
                self._fits[candidate.fit].append(candidate)

    def _new(self, scored: Sequence[Candidate]) -> Params | None:
        space = self._space(scored[0].params.train)
        seen = {self._key(params) for params in (*(c.params for c in scored), *self._pending.values())}
        params = self._promising(space, scored)
        if self._key(params) not in seen:
            return params
        drawn = (space.drawn(self._rng) for _ in range(TRIES))
        return next((params for params in drawn if self._key(params) not in seen), None)

    def _space(self, train: Mapping[str, Scalar]) -> SearchSpace:
        """Return the space of a fit's settings with thresholds at their usual values, since the curve picks them."""
        usual = self.resolved.space.usual()
        return self.resolved.space.at({**train, **{name: usual[name] for name in self.resolved.defense.thresholds()}})

    def _promising(self, space: SearchSpace, scored: Sequence[Candidate]) -> Params:
        sampler = GPSampler(seed=int(self._rng.integers(2**32)), n_startup_trials=0)
        study = optuna.create_study(directions=["minimize"] * len(OBJECTIVES), sampler=sampler)
        ordered = (*feasible(self.study, scored), *ranked(scored))
        # Of candidates that differ only in thresholds, keep the best.
        for candidate in {self._key(c.params): c for c in reversed(ordered)}.values():
            study.add_trial(lesson(self.study, space, candidate, whole=True))
        return asked(study.ask(), space, whole=True)

    def _key(self, params: Params) -> str:
        thresholds = self.resolved.defense.thresholds()
        kept = {name: value for name, value in params.inference.items() if name not in thresholds}
        return json.dumps([dict(params.train), kept], sort_keys=True)
