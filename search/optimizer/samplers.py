"""The Optuna sampler of a study's method, and how many trials of a long search it sees."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.study.candidate import Candidate
from search.study.ranking import OBJECTIVES, constraints
from search.study.study import Study
from spaces.domain import Scalar, contains, finite, only
from spaces.space import GRID_LIMIT, Params, SearchSpace

SHOWN_TPE, SHOWN_GP = 2000, 100
"""Most finished candidates that a sampler learns from; above this number they are thinned out to half of it. Asking
costs TPE 0.08 s at 2,000 and 0.4 s at 10,000, GP 4 s at 100 and 14 s at 600 (one busy core, nine knobs)."""
NEEDS_ALL = ("nsga2", "gp", "qmc")
"""Methods that learn only from knobs that every candidate has: they are asked for irrelevant knobs too."""


def sampler(study: Study, space: SearchSpace, seed: int) -> BaseSampler:
    """Return the sampler of the study's method; the first quarter of the trainings, at most 10, is random.

    For the methods that are not Optuna's, it draws what they leave open.
    """
    settings = space.at(space.setting(space.usual_of).train).size() or 1
    startup = max(1, min(10, study.trials // 4)) * (settings if settings <= GRID_LIMIT else 1)
    match study.method:
        case "tpe":
            tpe = TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=startup)
            return Bounded(tpe, SHOWN_TPE, seed)
        case "nsga2":
            return NSGAIISampler(seed=seed, population_size=max(4, min(50, startup)))
        case "gp":
            return Bounded(GPSampler(seed=seed, n_startup_trials=min(startup, SHOWN_GP // 2)), SHOWN_GP, seed)
        case "qmc":
            return QMCSampler(seed=seed, warn_independent_sampling=False)
        case _:
            return RandomSampler(seed=seed)


def asked(trial: optuna.Trial, space: SearchSpace, *, whole: bool) -> Params:
    """Return the setting that a sampler proposes; each knob is asked for after the knobs that it depends on.

    Args:
        whole: also ask for knobs that do not matter (`NEEDS_ALL`).
    """
    for name, domain in space.searched().items() if whole else ():
        trial._suggest(name, domain)  # as study.ask does with distributions
    return space.setting(lambda name, domain: only(name, domain) if domain.single() else trial._suggest(name, domain))


def nearest(space: SearchSpace, aim: Params, others: Sequence[Params], rng: np.random.Generator) -> Params:
    """Return the training nearest to `aim`; ties are broken at random.

    One step along a numeric grid counts as 1, and so does any other difference.
    """
    ranks: dict[str, dict[Scalar, int]] = {}
    for name, domain in space.train.items():
        numbers = sorted(value for value in finite(domain) or () if isinstance(value, int | float))
        ranks[name] = {value: rank for rank, value in enumerate(numbers)}

    def steps(name: str, value: Scalar) -> int:
        own, grid = aim.train[name], ranks[name]
        return abs(grid[value] - grid[own]) if value in grid and own in grid else int(value != own)

    far = np.array([sum(steps(name, value) for name, value in other.train.items()) for other in others])
    return others[int(rng.choice(np.flatnonzero(far == far.min())))]


def lesson(
    study: Study,
    space: SearchSpace,
    candidate: Candidate,
    *,
    whole: bool,
    attributes: Mapping[str, Any] | None = None,
    generation: Mapping[str, int] | None = None,
) -> FrozenTrial:
    """Return a candidate as a finished Optuna trial, with the searched knobs that matter.

    A value outside the space, such as a threshold picked from a risk-coverage curve, is omitted.

    Args:
        attributes: user attributes of the trial.
        generation: the result of `generation`.
    """
    values, told, searched = candidate.params.flat(), dict[str, Scalar](), space.searched()
    for name, domain in searched.items():
        if space.matters(name, values):
            told |= {name: values[name]} if contains(domain, values[name]) else {}
        elif whole:
            told[name] = space.usual_of(name, domain)
    return create_trial(
        values=objectives(candidate),
        params=told,
        distributions={name: searched[name] for name in told},
        user_attrs=dict(attributes or {}),
        system_attrs=dict(generation or {}),
        constraints=constraints(study, candidate),
    )


def generation(study: optuna.Study, trial: optuna.Trial | None) -> dict[str, int]:
    """Return the attribute that puts a candidate into its trial's generation, or the first; empty for other samplers.

    Without it, NSGA-II accepts only its own proposals into its population.
    """
    if not isinstance(study.sampler, NSGAIISampler):
        return {}
    frozen = None if trial is None else study._storage.get_trial(trial._trial_id)
    number = 0 if frozen is None else study.sampler.get_trial_generation(study, frozen)
    return {NSGAIISampler._get_generation_key(): number}


def objectives(candidate: Candidate) -> list[float]:
    return [float(getattr(candidate.score, name)) for name in OBJECTIVES]


class Bounded(BaseSampler):
    """Shows a sampler a part of a long search, so that the ten thousandth proposal costs no more than the thousandth.

    Args:
        most: above this many finished trials, half of it is kept: the best ones, and as many drawn from the rest.
    """

    def __init__(self, inner: BaseSampler, most: int, seed: int) -> None:
        self.inner = inner
        self.most = most
        self._rng = np.random.default_rng(seed)
        self._hidden: set[int] = set()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.inner.infer_relative_search_space(self._part(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.inner.sample_relative(self._part(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.inner.sample_independent(self._part(study), trial, param_name, param_distribution)

    def _part(self, study: optuna.Study) -> optuna.Study:
        return _PartOfStudy(study, self.shown(study.get_trials(deepcopy=False)))

    def shown(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the trials that the sampler sees."""
        seen = [trial for trial in trials if trial.number not in self._hidden]
        done = [trial for trial in seen if trial.state == TrialState.COMPLETE]
        if len(done) <= self.most:
            return seen
        kept = {trial.number for trial in best(done, self.most // 4)}
        rest = [trial.number for trial in done if trial.number not in kept]
        drawn = self._rng.permutation(len(rest))[self.most // 4 :]
        self._hidden |= {rest[i] for i in drawn}
        return [trial for trial in seen if trial.number not in self._hidden]


class _PartOfStudy(optuna.Study):
    """A study that shows a sampler a part of its trials.

    Optuna has no such view, and a second study would copy every trial at each proposal.
    """

    def __init__(self, study: optuna.Study, trials: list[FrozenTrial]) -> None:
        vars(self).update(vars(study))
        self._trials = trials

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [trial for trial in self._trials if states is None or trial.state in states]


def best(trials: Sequence[FrozenTrial], count: int) -> list[FrozenTrial]:
    """Return the best finished trials of two objectives: front by front, those that satisfy the constraints first."""
    excess = {trial.number: sum(max(0.0, value) for value in trial.constraints.values()) for trial in trials}
    left = sorted(trials, key=lambda trial: (excess[trial.number], *trial.values))
    found: list[FrozenTrial] = []
    while left and len(found) < count and not excess[left[0].number]:
        least, others = math.inf, list[FrozenTrial]()
        for trial in left:
            if not excess[trial.number] and trial.values[1] < least:
                least = trial.values[1]
                found.append(trial)
            else:
                others.append(trial)
        left = others
    return (found + left)[:count]
