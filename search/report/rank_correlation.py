"""How well the cheap scores rank trainings, which early stopping depends on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search.optimizer.early_stopping import grace, rungs
from search.optimizer.history import SearchHistory, state_of
from search.study.candidate import Candidate
from search.study.study import Study
from spaces.domain import Scalar

LEAST = 4
"""Minimum number of trainings for a correlation."""
ENOUGH = 8
"""Minimum number of trainings for a warning about a low correlation."""
LOW = 0.5
QUICK = "quick scores (for early stopping) against final scores"


@dataclass(frozen=True)
class Rank:
    """How the cheap scores after one epoch rank the finished trainings.

    Args:
        epoch: None for the last epoch of each training.
        trainings: number of trainings compared.
        rho: Spearman's rho between cheap and final scores; None with too few trainings or if one score is constant.
        low, high: the 95 % interval of rho, by Bonett and Wright's standard error.
        tau: Kendall's tau-b.
    """

    epoch: int | None
    trainings: int
    rho: float | None = None
    low: float | None = None
    high: float | None = None
    tau: float | None = None

    @property
    def when(self) -> str:
        return "the last epoch" if self.epoch is None else f"epoch {self.epoch}"

    @property
    def poor(self) -> bool:
        """Whether the cheap score ranks badly, and enough trainings were compared to say so."""
        return self.trainings >= ENOUGH and (self.rho is None or self.rho < LOW)


@dataclass(frozen=True)
class RankCorrelation:
    """The agreement of cheap and final scores over the finished trainings.

    Trainings that were stopped early have no final score, so they are not included.

    Args:
        usual: whether final scores are those at the usual inference setting of the space, like the cheap scores;
            otherwise some training was not scored there, and each training's best is used.
        points: (trial, cheap score of its last epoch, final score), scores in [0, 1]; the final score is one minus the
            attacked error.
        ranks: one for each rung, then that of the last epoch.
        epochs: of the longest training.
    """

    study: Study
    usual: bool
    points: Sequence[tuple[str, float, float]]
    ranks: Sequence[Rank]
    epochs: int = 1

    @property
    def last(self) -> Rank:
        return self.ranks[-1]

    @property
    def setting(self) -> str:
        return "at the usual inference setting" if self.usual else "at each training's best inference setting"

    @property
    def line(self) -> str:
        """The correlation in one line."""
        if self.last.rho is None:
            why = f"they need {LEAST}" if len(self.points) < LEAST else "one of the two does not vary"
            return f"{QUICK} of {len(self.points)} finished trainings: no rank correlation, {why}"
        rungs = "".join(f", after {r.when} {r.rho:.2f}" for r in self.ranks[:-1] if r.rho is not None)
        within = f" ({self.last.low:.2f} to {self.last.high:.2f})" if self.last.low is not None else ""
        return (
            f"{QUICK} of {self.last.trainings} finished trainings: Spearman's rho "
            f"{self.last.rho:.2f}{within}, Kendall's tau {self.last.tau:.2f}{rungs}"
        )

    @property
    def warning(self) -> str:
        """Advice if the cheap score ranks badly; empty if it ranks well, or with too few trainings."""
        poor = next((rank for rank in self.ranks if rank.poor), None)
        if poor is None:
            return ""
        if len({final for *_, final in self.points}) == 1:
            return f"all {len(self.points)} finished trainings are equal under attack: no score can rank them"
        found = "is the same for all of" if poor.rho is None else f"ranks badly (rho {poor.rho:.2f})"
        remedy = (
            f"more --cheap-images than {self.study.cheap_images}"
            if self.last.poor
            else f"a later --grace than {grace(self.study, self.epochs)}"
        )
        if self.study.stopping != "none":
            remedy += ", or --stopping none: good trainings may have been stopped"
        return f"the quick score after {poor.when} {found} {poor.trainings} finished trainings; try {remedy}"

    def to_json(self) -> dict[str, Any]:
        return {
            "final": self.setting,
            "line": self.line,
            "ranks": [vars(rank) for rank in self.ranks],
            "warning": self.warning or None,
        }


def rank_correlation(history: SearchHistory, candidates: Iterable[Candidate]) -> RankCorrelation:
    """Compare the cheap scores of the finished trainings of a search with the final scores of their fits.

    Args:
        candidates: all candidates of the search.
    """
    study, usual = history.study, history.usual
    fits: dict[tuple[tuple[str, Scalar], ...], list[Candidate]] = {}
    for candidate in candidates:
        fits.setdefault(_key(candidate.params.train), []).append(candidate)
    found = []
    for trial in history.trials():
        curve = {int(epoch): float(score) for epoch, score in trial.user_attrs.get("curve", [])}
        if state_of(trial) == "finished" and curve:
            scored = history.candidate_of(trial)
            found.append((str(trial.user_attrs["trial"]), curve, fits[_key(scored.params.train)]))
    at_usual = [[c for c in of if c.params.inference == usual] for *_, of in found]
    everywhere = all(at_usual)
    finals = [
        max(1 - c.score.attacked_error for c in (at if everywhere else of))
        for at, (*_, of) in zip(at_usual, found, strict=True)
    ]
    curves = [curve for _, curve, _ in found]
    points = [(name, curve[max(curve)], final) for (name, curve, _), final in zip(found, finals, strict=True)]
    return RankCorrelation(
        study, everywhere, points, ranks(curves, finals, rungs(study, history.epochs)), history.epochs
    )


def ranks(curves: Sequence[Mapping[int, float]], finals: Sequence[float], epochs: Sequence[int]) -> list[Rank]:
    """Return the rank correlations after each of `epochs` and after the last epoch of each curve.

    Args:
        curves: the cheap score by epoch, for each training.
        finals: the final score of each training.
        epochs: the rungs of early stopping.
    """
    found = []
    for epoch in epochs:
        on = [(curve[epoch], final) for curve, final in zip(curves, finals, strict=True) if epoch in curve]
        found.append(_rank(epoch, on))
    return [*found, _rank(None, [(curve[max(curve)], final) for curve, final in zip(curves, finals, strict=True)])]


def _rank(epoch: int | None, pairs: Sequence[tuple[float, float]]) -> Rank:
    """Source: Bonett and Wright, Sample size requirements for estimating Pearson, Kendall and Spearman correlations,
    Psychometrika 65, 2000, equation 3.
    """
    n = len(pairs)
    if n < LEAST:
        return Rank(epoch, n)
    from scipy.stats import ConstantInputWarning, kendalltau, spearmanr  # takes half a second

    cheap, final = zip(*pairs, strict=True)
    with warnings.catch_warnings(action="ignore", category=ConstantInputWarning):
        rho, tau = float(spearmanr(cheap, final).statistic), float(kendalltau(cheap, final).statistic)
    if not np.isfinite(rho):
        return Rank(epoch, n)
    if abs(rho) > 1 - 1e-9:
        return Rank(epoch, n, rho, None, None, tau)
    wide = 1.96 * np.sqrt((1 + rho**2 / 2) / (n - 3))
    low, high = (float(np.tanh(np.arctanh(rho) + side * wide)) for side in (-1, 1))
    return Rank(epoch, n, rho, low, high, tau)


def _key(train: Mapping[str, Scalar]) -> tuple[tuple[str, Scalar], ...]:
    return tuple(sorted(train.items()))
