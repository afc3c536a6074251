"""The importance of each knob, estimated by Optuna from the finished candidates of a search."""

from __future__ import annotations

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

LEAST, MOST = 8, 10_000
"""Minimum and maximum number of candidates for an estimate; of more, so many drawn at random."""
BEST = 0.1
"""The fraction of the candidates that counts as the best."""
FITS = 5
"""Minimum number of trainings among the best candidates for their estimate: candidates of one fit share the train-time
knobs, so they count as one observation of these."""
CHANCE = "(chance)"
"""An additional knob with one random value per training; its share shows what is due to chance."""


@dataclass(frozen=True)
class Importances:
    """The share of each knob, in [0, 1]; the shares of all knobs, including `CHANCE`, sum to one.

    Args:
        overall: shares of the variance of the attacked error over all candidates that a random forest explains.
        best: shares in separating the best tenth of the candidates from the rest; empty if it has too few trainings.
        candidates: number of candidates used.
    """

    overall: Mapping[str, float] = field(default_factory=dict)
    best: Mapping[str, float] = field(default_factory=dict)
    candidates: int = 0


def importances(history: SearchHistory) -> Importances:
    """Return the importance for the attacked error of each knob that is not conditional on another knob.

    Both estimates take about a second for a long search. fANOVA would take hours, and it counts a knob with six values
    as six knobs (docs/decisions.md).

    Source: Watanabe, Bansal and Hutter, PED-ANOVA, IJCAI 2023, for the best tenth.
    """
    # Optuna uses only knobs that all trials have, so candidates that lack a knob (picked thresholds) are left out.
    # Requiring the conditional knobs too would leave too few candidates.
    always = [name for name in history.searched if name not in history.space.given]
    own = (t for t in history.all() if t.state == TrialState.COMPLETE and "from" not in t.user_attrs)
    done = [t for t in own if set(always) <= set(t.params)]
    if len(done) > MOST:
        done = random.Random(history.study.seed).sample(done, MOST)
    if not always or len(done) < LEAST or len({t.values[0] for t in done}) < 2:
        return Importances()  # without variation there is no variance to explain
    study = optuna.create_study(directions=history.optuna.directions)
    kept = [(trial, {name: trial.params[name] for name in always}) for trial in done]
    study.add_trials(_with_chance(trial, values, history) for trial, values in kept)
    forest = MeanDecreaseImpurityImportanceEvaluator(seed=history.study.seed)
    last = sorted(t.values[0] for t in done)[int(BEST * len(done))]
    fits = {history.candidate_of(t).fit for t in done if t.values[0] <= last}
    best = _shares(study, PedAnovaImportanceEvaluator(target_quantile=BEST)) if len(fits) >= FITS else {}
    return Importances(_shares(study, forest), best, len(done))


def _shares(study: optuna.Study, evaluator: BaseImportanceEvaluator) -> dict[str, float]:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that lower values count as better
        found = get_param_importances(study, evaluator=evaluator, target=_attacked_error)
    return {knob: float(share) for knob, share in found.items()}


def _with_chance(trial: FrozenTrial, values: Mapping[str, Scalar], history: SearchHistory) -> FrozenTrial:
    """Return the trial with the additional knob, and without its attributes, which Optuna would copy."""
    training = [value for name, value in values.items() if name in history.space.train]
    drawn = random.Random(f"{history.study.seed} {training or trial.number}").random()
    return create_trial(
        values=trial.values,
        params={**values, CHANCE: drawn},
        distributions={**{n: trial.distributions[n] for n in values}, CHANCE: FloatDistribution(0.0, 1.0)},
    )


def _attacked_error(trial: FrozenTrial) -> float:
    return float(trial.values[0])
