"""Propose settings with Optuna, which learns from every candidate."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

import spaces
from search.optimizer import history
from search.optimizer.coordinates import identity
from search.optimizer.forecast import Forecast
from search.optimizer.history import ENDED, INTERRUPTED, SearchHistory, journal_storage, state_of
from search.optimizer.refinement import Refiner, refinable
from search.optimizer.samplers import NEEDS_ALL, asked, generation, lesson, nearest, objectives, sampler
from search.optimizer.warm_start import warm_start_of
from search.study.candidate import Candidate, Latency, Proposal
from search.study.ranking import OBJECTIVES, constraints
from search.study.study import Study
from spaces.domain import Scalar, contains
from spaces.space import Params, SearchSpace

RETRIES = 20
"""How often a sampler may repeat a training before a random one is drawn, in a space that is too large to list."""
COUNTABLE = 10_000
"""A space of at most so many trainings is listed, to find the remaining one nearest to a sampler's proposal."""
WAITING = (TrialState.WAITING,)


class Proposer(SearchHistory):
    """The history of a running search, which also proposes settings and records their results.

    An existing study is opened; trials that ran when it was interrupted are proposed again, under the same name.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(study)
        self._whole = study.method in NEEDS_ALL
        self._countable = 0 < (self.space.trainings() or 0) <= COUNTABLE
        self._running: dict[str, optuna.Trial] = {}
        self._recover()
        if not self.all():
            self._enqueue_starts()
        # Updated incrementally from here on, so that a proposal of a long search costs no more than one of a short one.
        trials = self.trials()
        self._names = {trial.user_attrs["trial"] for trial in trials}
        self._ended = sum(state_of(trial) in ENDED for trial in trials)
        self._seen = {identity(self.setting(trial)) for trial in trials}
        self.forecast = self._forecast(trials)
        self._known = {candidate.candidate for candidate in self.candidates()}
        self._refined = {t.user_attrs["refines"] for t in self.all() if "refines" in t.user_attrs}
        self._refining: set[str] = set()
        self._refiner: Refiner | None = None
        self._refinable = refinable(study)

    def _open(self) -> optuna.Study:
        self.study.store.make()
        self.study.folder.mkdir(exist_ok=True)
        self._storage = journal_storage(self.study, drives=True)
        study = optuna.create_study(
            study_name=self.study.name,
            storage=self._storage,
            directions=["minimize"] * len(OBJECTIVES),
            load_if_exists=True,
        )
        if not study.metric_names:
            study.set_metric_names(list(OBJECTIVES))
        usual = {"inference": self.space.usual(), "epochs": self.study.resolved.epochs}
        if study.user_attrs.get(history.USUAL) != usual:
            study.set_user_attr(history.USUAL, usual)
        if history.BEGUN not in study.user_attrs:  # since 2026-11-29
            study.set_user_attr(history.BEGUN, history.lasting(self.study))
        # A resumed search must not repeat the random numbers of its earlier run.
        drawn = len(study.get_trials(deepcopy=False))
        study.sampler = sampler(self.study, self.space, (self.study.seed + drawn) % 2**32)
        self._rng = np.random.default_rng((self.study.seed, drawn))
        return study

    def ended(self) -> int:
        return self._ended

    def propose(self) -> Proposal | None:
        """Return the next training, or None if every training of the space was proposed."""
        if self.study.method == "forecast" and not self.optuna.get_trials(deepcopy=False, states=WAITING):
            unseen = self._unseen() if self._countable else None
            if unseen != []:
                self._enqueue(self.forecast.propose(unseen).flat())
        for attempt in itertools.count(1):
            trial = self.optuna.ask()
            params = asked(trial, self.space, whole=self._whole)
            name = trial.user_attrs.get("trial")
            if name is not None or identity(params) not in self._seen:
                break
            trial.set_user_attr("duplicate", True)
            self.optuna.tell(trial, state=TrialState.FAIL)
            if attempt >= (1 if self._countable else RETRIES) and not self._enqueue_unseen(params):
                return None
            if attempt >= 10 * RETRIES and not self._countable:
                return None  # an unlisted space can be exhausted too: 1..4 on a log scale has four values
        if name is None:
            name = f"t{len(self._names) + 1:03d}"
            trial.set_user_attr("trial", name)
        self._names.add(name)
        self.forecast.began(name, params)
        self._seen.add(identity(params))
        self._running[name] = trial
        return Proposal(name, params, rivals=self.forecast.rivals())

    def refine(self) -> Proposal | None:
        """Return an inference setting to try on one of the best fits, or None if enough were tried.

        The study records it only when it has ended: one that ran when a driver died is chosen again.
        """
        if self.refinements_left() <= 0:
            return None
        if self._refiner is None:
            seed = (self.study.seed + len(self._refined)) % 2**32
            self._refiner = Refiner(self.study, self.candidates(), seed)
        taken = self._refined | self._refining  # with gaps if a driver died
        name = next(name for name in (f"r{number:03d}" for number in itertools.count(1)) if name not in taken)
        params = self._refiner.choose(name)
        if params is None:
            return None
        self._refining.add(name)
        return Proposal(name, params, refines=True)

    def refinements_left(self) -> int:
        """Return how many refinements are still to be tried."""
        return self.study.refine - len(self._refined | self._refining) if self._refinable else 0

    def finish(self, name: str, candidates: Sequence[Candidate], about: Mapping[str, Any]) -> None:
        """Record in the study all candidates of a trial, given with the proposed one first."""
        self.forecast.ended(name, candidates)
        trial = self._running.get(name)
        for other in candidates[1:]:
            self._tell(other, {"of": name}, trial)
        # The proposed one comes last: a driver killed before leaves a running trial, which is repeated identically.
        if trial is None:
            self._tell(candidates[0], {**about, "refines": name}, None)
            self._close(name, candidates)
            return
        generation(self.optuna, trial)
        for key, value in {**about, "candidate": json.dumps(candidates[0].to_json())}.items():
            trial.set_user_attr(key, value)
        for constraint, excess in constraints(self.study, candidates[0]).items():
            trial.set_constraint(constraint, excess)
        self.optuna.tell(trial, objectives(candidates[0]))
        self._known.add(candidates[0].candidate)
        self._close(name, candidates)

    def stop(self, name: str, state: TrialState, about: Mapping[str, Any]) -> None:
        """Record in the study that a trial was pruned or failed."""
        self.forecast.ended(name)
        trial = self._running.get(name)
        if trial is None:
            self.optuna.add_trial(create_trial(state=TrialState.FAIL, user_attrs={**about, "refines": name}))
        else:
            for key, value in about.items():
                trial.set_user_attr(key, value)
            self.optuna.tell(trial, state=state)
        self._close(name, ())

    def _close(self, name: str, candidates: Sequence[Candidate]) -> None:
        if self._running.pop(name, None) is not None:
            self._ended += 1
            return
        self._refining.remove(name)
        self._refined.add(name)
        if self._refiner is not None:
            self._refiner.take(name, candidates)

    def _tell(self, candidate: Candidate, about: Mapping[str, Any], trial: optuna.Trial | None) -> None:
        if candidate.candidate in self._known and "refines" not in about:
            return
        attributes = {**about, "candidate": json.dumps(candidate.to_json())}
        self.optuna.add_trial(self._lesson(candidate, attributes, trial))
        self._known.add(candidate.candidate)

    def _lesson(self, candidate: Candidate, attributes: Mapping[str, Any], trial: optuna.Trial | None) -> FrozenTrial:
        return lesson(
            self.study,
            self.space,
            candidate,
            whole=self._whole,
            attributes=attributes,
            generation=generation(self.optuna, trial),
        )

    def keep_undefended(self, undefended: Candidate) -> None:
        """Record the bare classifier's figures in the study."""
        self.optuna.set_user_attr(history.UNDEFENDED, undefended.to_json())

    def keep_remeasured(self, candidate: Candidate, again: Latency) -> None:
        """Record a re-measured latency in the study."""
        known = {name: latency.to_json() for name, latency in self.remeasured().items()}
        self.optuna.set_user_attr(history.REMEASURED, {**known, candidate.candidate: again.to_json()})

    def keep_finished(self) -> None:
        """Record in the study that nothing is left to do."""
        self.optuna.set_user_attr(history.FINISHED, {"trials": self.study.trials, "refine": self.study.refine})

    def _recover(self) -> None:
        """Enqueue the trials that ran when a driver died; an interruption of this method does no harm."""
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "trial" not in trial.user_attrs and "fixed_params" in trial.system_attrs:
                self.optuna.enqueue_trial(trial.system_attrs["fixed_params"])  # it was enqueued, and was just taken
            self._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)
            self.optuna.tell(trial.number, state=TrialState.FAIL)
        waiting = self.optuna.get_trials(deepcopy=False, states=WAITING)
        enqueued = {trial.user_attrs.get("trial") for trial in waiting}
        for trial in self.trials():
            name = trial.user_attrs["trial"]
            if state_of(trial) == "interrupted" and name not in enqueued:
                setting = trial.system_attrs.get("fixed_params", {}) | trial.params  # may be incomplete
                self.optuna.enqueue_trial(setting, user_attrs={"trial": name})

    def _enqueue_starts(self) -> None:
        """Enqueue the settings of a warm start, then the known good ones or, for a grid search, the whole grid."""
        source = self.study.warm_start
        warm = None if source is None else warm_start_of(self.study, source)
        for params in warm.settings if warm else ():
            self._enqueue(params.flat())
        if self.study.method == "grid":
            before = {identity(params) for params in warm.settings} if warm else set()
            for params in _trainings(self.space):
                if identity(params) not in before:
                    self._enqueue({**params.train, **self.space.usual()})
        else:
            for start in spaces.starts(self.study.defense):
                if all(contains(self.space.flat()[name], value) for name, value in start.items()):
                    self._enqueue(start)
        for candidate in warm.candidates if warm else ():  # no candidates of this search
            self.optuna.add_trial(self._lesson(candidate, {"from": source, "was": candidate.candidate}, None))

    def _enqueue_unseen(self, aim: Params) -> bool:
        """Enqueue the training nearest to `aim` that was not proposed yet; return False if there is none.

        A sampler that has converged on a grid's best setting repeats it: its nearest remaining neighbour comes next. In
        a space that is too large to list, a random one is drawn.
        """
        if not self._countable:
            chosen = self.space.drawn(self._rng)
        else:
            unseen = self._unseen()
            if not unseen:
                return False
            chosen = nearest(self.space, aim, unseen, self._rng)
        self._enqueue(chosen.train)
        return True

    def _unseen(self) -> list[Params]:
        """Return the trainings of a space that can be listed that were not proposed yet."""
        return [params for key, params in self._listed.items() if key not in self._seen]

    @cached_property
    def _listed(self) -> dict[str, Params]:
        """Every training of a space that can be listed."""
        return {identity(params): params for params in _trainings(self.space)}

    def _forecast(self, trials: Sequence[FrozenTrial]) -> Forecast:
        """Return the model of this search, with what is known of its trials."""
        forecast, found = Forecast(self.study, self.space, self.study.seed + len(trials)), defaultdict(list)
        for candidate in self.candidates():
            found[identity(candidate.params)].append(candidate)
        for trial in trials:
            name, params = trial.user_attrs["trial"], self.setting(trial)
            forecast.began(name, params)
            forecast.ended(name, found[identity(params)] if trial.state == TrialState.COMPLETE else ())
        for trial in self.all():
            if "from" in trial.user_attrs and self.searched.keys() <= trial.params.keys():
                params = self.space.complete(trial.params)
                excess = sum(max(0.0, value) for value in trial.constraints.values())
                forecast.knew(f"from {identity(params)}", params, trial.values[0] + excess, trial.values[1])
        return forecast

    def _enqueue(self, values: Mapping[str, Scalar]) -> None:
        """Enqueue the searched knobs of a setting; values outside the space are omitted, and Optuna samples them."""
        searched = self.searched
        known = {name: value for name, value in values.items() if name in searched and contains(searched[name], value)}
        self.optuna.enqueue_trial(known)


def _trainings(space: SearchSpace) -> list[Params]:
    trains = SearchSpace(space.train, {}, space.defaults, {n: c for n, c in space.given.items() if n in space.train})
    return list(trains.grid())
