"""Optuna proposes, and learns from every candidate."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

import spaces
from search.ranking import OBJECTIVES, constraints
from search.record import INTERRUPTED, Record, state_of, storage
from search.score import Candidate
from search.study import Study
from search.trial import store_of
from search.work import Proposal
from spaces.space import GRID_LIMIT, Params, SearchSpace, contains, draw

RETRIES = 20
"""How often a sampler may propose a training that is done before one is drawn for it."""


class Proposer(Record):
    """A search that goes on: proposes settings, and is told what became of them.

    The study is opened where it exists; what ran when it was left is proposed again, under its name.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(study)
        self._running: dict[str, optuna.Trial] = {}
        self._recover()
        if not self.optuna.user_attrs.get("enqueued"):
            self._enqueue_starts(skip_if_exists=bool(self._all()))
            self.note("enqueued", True)

    def _open(self) -> optuna.Study:
        store_of(self.study).make()
        self.study.folder.mkdir(exist_ok=True)
        self._storage = storage(self.study, drives=True)
        study = optuna.create_study(
            study_name=self.study.name,
            storage=self._storage,
            directions=["minimize"] * len(OBJECTIVES),
            load_if_exists=True,
        )
        if not study.metric_names:
            study.set_metric_names(list(OBJECTIVES))
        # A resumed search must not draw again what it drew before.
        drawn = len(study.get_trials(deepcopy=False))
        study.sampler = _sampler(self.study, self.space, (self.study.seed + drawn) % 2**32)
        self._rng = np.random.default_rng((self.study.seed, drawn))
        return study

    def propose(self) -> Proposal | None:
        """Return the next training, or None where every one of the space is done."""
        seen = {_key(params) for params in self._proposed().values()}
        for attempt in itertools.count():
            if attempt >= RETRIES and not self._enqueue_unseen(seen):
                return None
            trial = self.optuna.ask(self.searched)
            params = self.space.complete(trial.params)
            name = trial.user_attrs.get("trial")
            if name is not None or _key(params) not in seen:
                break
            trial.set_user_attr("duplicate", True)
            self.optuna.tell(trial, state=TrialState.FAIL)
        if name is None:
            name = f"t{len(self._proposed()) + 1:03d}"
            trial.set_user_attr("trial", name)
        self._running[name] = trial
        return Proposal(name, params)

    def refine(self) -> Proposal | None:
        """Return an inference setting to try on one of the best fits, or None where enough were tried."""
        return None

    def refinements_left(self) -> int:
        """Return how many are still to be tried."""
        return 0

    def finish(self, name: str, candidates: Sequence[Candidate], about: Mapping[str, Any]) -> None:
        """Tell the study every candidate of a trial, the proposed one first."""
        trial = self._running.pop(name)
        for key, value in about.items():
            trial.set_user_attr(key, value)
        trial.set_user_attr("candidate", json.dumps(candidates[0].to_json()))
        for constraint, excess in constraints(self.study, candidates[0]).items():
            trial.set_constraint(constraint, excess)
        known = {c.candidate for c in self.candidates()}
        for other in candidates[1:]:
            if other.candidate not in known:
                self.optuna.add_trial(self._frozen(name, other))
        # Last: a driver killed before this line leaves a running trial, which is proposed again and ends the same.
        self.optuna.tell(trial, _values(candidates[0]))

    def stop(self, name: str, state: TrialState, about: Mapping[str, Any]) -> None:
        """Tell the study that a trial was pruned or failed."""
        trial = self._running.pop(name)
        for key, value in about.items():
            trial.set_user_attr(key, value)
        self.optuna.tell(trial, state=state)

    def note(self, key: str, value: Any) -> None:
        """Keep a fact of the whole search with the study."""
        self.optuna.set_user_attr(key, value)

    def _frozen(self, name: str, candidate: Candidate) -> FrozenTrial:
        # Thresholds that a risk-coverage curve picked may lie outside the space: the sampler cannot learn of them.
        known = {
            k: v for k, v in candidate.params.flat().items() if k in self.searched and contains(self.searched[k], v)
        }
        return create_trial(
            values=_values(candidate),
            params=known,
            distributions={knob: self.searched[knob] for knob in known},
            user_attrs={"of": name, "candidate": json.dumps(candidate.to_json())},
            constraints=constraints(self.study, candidate),
        )

    def _proposed(self) -> dict[str, Params]:
        return {t.user_attrs["trial"]: self.space.complete(t.params) for t in self.trials()}

    def _recover(self) -> None:
        """Propose again what was running when a driver died; that this may die half way changes nothing."""
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "trial" not in trial.user_attrs and "fixed_params" in trial.system_attrs:
                self.optuna.enqueue_trial(trial.system_attrs["fixed_params"])  # it waited, and its turn had just come
            self._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)
            self.optuna.tell(trial.number, state=TrialState.FAIL)
        waiting = self.optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        enqueued = {trial.user_attrs.get("trial") for trial in waiting}
        for trial in self.trials():
            name = trial.user_attrs["trial"]
            if state_of(trial) == "interrupted" and name not in enqueued:
                self.optuna.enqueue_trial(trial.params, user_attrs={"trial": name})

    def _enqueue_starts(self, *, skip_if_exists: bool) -> None:
        """Enqueue the known good settings; for a grid, the whole of it."""
        if self.study.method == "grid":
            for params in _trainings(self.space):
                setting = {**params.train, **self.space.usual()}
                known = {name: value for name, value in setting.items() if name in self.searched}
                self.optuna.enqueue_trial(known, skip_if_exists=skip_if_exists)
            return
        for start in spaces.starts(self.study.defense):
            known = {name: value for name, value in start.items() if name in self.searched}
            if all(contains(self.space.flat()[name], value) for name, value in start.items()):
                self.optuna.enqueue_trial(known, skip_if_exists=skip_if_exists)

    def _enqueue_unseen(self, seen: set[str]) -> bool:
        """Enqueue a training that was not proposed yet, at random; False where there is none."""
        if self.space.trainings() is None:
            chosen = {name: draw(domain, self._rng) for name, domain in self.space.train.items()}
        else:
            unseen = [params.train for params in _trainings(self.space) if _key(params) not in seen]
            if not unseen:
                return False
            chosen = dict(unseen[int(self._rng.integers(len(unseen)))])
        self.optuna.enqueue_trial({name: value for name, value in chosen.items() if name in self.searched})
        return True


def _trainings(space: SearchSpace) -> list[Params]:
    return list(SearchSpace(space.train, {}, space.defaults).grid())


def _key(params: Params) -> str:
    """Return the identity of a training."""
    return json.dumps(dict(params.train), sort_keys=True)


def _values(candidate: Candidate) -> list[float]:
    return [float(getattr(candidate.score, name)) for name in OBJECTIVES]


def _sampler(study: Study, space: SearchSpace, seed: int) -> BaseSampler:
    """Return the sampler of the study's method; it starts at random for the first quarter of the trainings."""
    settings = SearchSpace({}, space.inference, space.defaults).size() or 1
    startup = max(1, min(10, study.trials // 4)) * (settings if settings <= GRID_LIMIT else 1)
    match study.method:
        case "tpe":
            return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=startup)
        case "nsga2":
            return NSGAIISampler(seed=seed)
        case "gp":
            return GPSampler(seed=seed, n_startup_trials=startup)
        case "qmc":
            return QMCSampler(seed=seed, warn_independent_sampling=False)
        case _:
            return RandomSampler(seed=seed)
