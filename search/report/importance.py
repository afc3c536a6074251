"""Which knobs matter, told of a search's finished candidates by Optuna's estimators."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import optuna
from optuna.distributions import FloatDistribution
from optuna.importance import (
    BaseImportanceEvaluator,
    MeanDecreaseImpurityImportanceEvaluator,
    PedAnovaImportanceEvaluator,
    get_param_importances,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.optimizer.history import SearchHistory
from spaces.domain import Scalar

LEAST = 8
"""Candidates below which nothing is said."""
BEST = 0.1
"""The part of the candidates that counts as the best."""
FITS = 5
"""Trainings of which the best must be before anything is said of them: candidates of one fit have the same train-time
knobs, and tell of these but once."""
CHANCE = "(chance)"
"""A knob of random values, one a training, that is put beside the others: what it gets, chance gives."""


@dataclass(frozen=True)
class Importances:
    """Each knob's share, in [0, 1]; the shares of all knobs, `CHANCE` among them, make one.

    Args:
        overall: in what a forest of trees explains of the attacked error's variance over all candidates.
        best: in what tells the best tenth of the candidates from the others; empty where too few trainings are in it.
        candidates: how many were looked at.
    """

    overall: Mapping[str, float] = field(default_factory=dict)
    best: Mapping[str, float] = field(default_factory=dict)
    candidates: int = 0


def importances(history: SearchHistory) -> Importances:
    """Return how much each knob that always matters matters for the attacked error.

    Both estimates take a second of all candidates of a long search. fANOVA would take hours, and it counts a knob of
    six values as six knobs (docs/decisions.md).

    Source: Watanabe, Bansal and Hutter, PED-ANOVA, IJCAI 2023, for the best tenth.
    """
    # A candidate whose thresholds were picked may lack some knobs, and would take them out for all. Those that do not
    # always matter would leave too few candidates.
    always = [name for name in history.searched if name not in history.space.given]
    own = (t for t in history.all() if t.state == TrialState.COMPLETE and "from" not in t.user_attrs)
    done = [t for t in own if set(always) <= set(t.params)]
    if not always or len(done) < LEAST or len({t.values[0] for t in done}) < 2:
        return Importances()  # where nothing varies there is no variance to explain
    study = optuna.create_study(directions=history.optuna.directions)
    kept = [(trial, {name: trial.params[name] for name in always}) for trial in done]
    study.add_trials(_with_chance(trial, values, history) for trial, values in kept)
    forest = MeanDecreaseImpurityImportanceEvaluator(seed=history.study.seed)
    last = sorted(t.values[0] for t in done)[int(BEST * len(done))]
    fits = {json.loads(t.user_attrs["candidate"])["fit"] for t in done if t.values[0] <= last}
    best = _shares(study, PedAnovaImportanceEvaluator(target_quantile=BEST)) if len(fits) >= FITS else {}
    return Importances(_shares(study, forest), best, len(done))


def _shares(study: optuna.Study, evaluator: BaseImportanceEvaluator) -> dict[str, float]:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that lower is taken for better: it is
        found = get_param_importances(study, evaluator=evaluator, target=_attacked_error)
    return {knob: float(share) for knob, share in found.items()}


def _with_chance(trial: FrozenTrial, values: Mapping[str, Scalar], history: SearchHistory) -> FrozenTrial:
    """Return a trial with one knob more, and without what is written beside it, which Optuna would copy."""
    training = [value for name, value in values.items() if name in history.space.train]
    drawn = random.Random(f"{history.study.seed} {training or trial.number}").random()
    return create_trial(
        values=trial.values,
        params={**values, CHANCE: drawn},
        distributions={**{n: trial.distributions[n] for n in values}, CHANCE: FloatDistribution(0.0, 1.0)},
    )


def _attacked_error(trial: FrozenTrial) -> float:
    return float(trial.values[0])
