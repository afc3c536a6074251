"""The data of the report's charts; they are drawn by `templates/*.js.j2`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from attacks.confidence import wilson
from search.export import provenance
from search.formatting import spoken_device, spoken_value
from search.optimizer.early_stopping import rungs
from search.report.importance import CHANCE
from search.report.summary import Summary
from search.study.candidate import Candidate, Score
from spaces.domain import Scalar
from spaces.space import Params

T = TypeVar("T")

ANY = "CANDIDATE"
"""Stands for the name of a candidate in the command that exports one."""
SWEPT = 5
"""Maximum number of fits whose risk-coverage curves are drawn."""
MOST, MOST_TRAININGS = 5000, 1000
"""Maximum numbers of candidates and of trainings in the page, beside the front and the best: it grows no further, and a
browser opens it as fast."""
SETTINGS = 16
"""Maximum number of settings that get separate lines in the latency chart."""


def charts(summary: Summary) -> dict[str, Any]:
    """Return the data of the charts, for JSON: accuracies in percent, latencies in milliseconds.

    Attacked accuracy here is one minus the attacked error, an objective of the front; without rejection they are equal.
    """
    front = {c.candidate for c in summary.front}
    devices = sorted({c.score.device for c in summary.candidates})
    bare, latency = summary.undefended, latencies(summary)
    domains, shown = summary.study.resolved.space.flat(), shown_candidates(summary)
    cut = len(shown) < len(summary.candidates)  # else the page counts
    ranks = [{"rank": rank} if cut else {} for rank, _ in shown]
    rows = [r | _candidate(summary, c, c.candidate in front, devices) for r, (_, c) in zip(ranks, shown, strict=True)]
    return {
        "threat": summary.named(),
        "knobs": list(summary.searched),
        "fixed": _fixed(summary),
        "export": provenance.export(summary.study, ANY),
        "ranges": [_range(domains.get(knob)) for knob in summary.searched],
        "devices": [spoken_device(device) for device in devices],
        "budget": summary.study.max_latency_ms,
        "rejection": _points(summary.study.max_clean_rejection),
        "best": summary.best and summary.best.candidate,
        "undefended": _points(1 - bare.score.attacked_error) if bare else None,
        "candidates": _columns(rows),
        "total": len(summary.candidates),
        "risk": risk_coverage(summary),
        "latency": latency,
        "lanes": len({one["lane"] for one in latency}),
        "importances": [
            [knob, share, summary.importances.best.get(knob)]
            for knob, share in sorted(summary.importances.overall.items(), key=lambda item: item[1])
        ],
        "chance": CHANCE,
        **_trainings(summary),
    }


def shown_candidates(summary: Summary) -> list[tuple[int, Candidate]]:
    """Return the candidates in the page, with their ranks: of very many the best, the front, evenly the others."""
    every = list(enumerate(summary.ranked, start=1))
    if len(every) <= MOST:
        return every
    front, others = {c.candidate for c in summary.front}, every[MOST // 2 :]
    spread = {rank for rank, _ in evenly(others, MOST // 2)}
    return every[: MOST // 2] + [(rank, c) for rank, c in others if rank in spread or c.candidate in front]


def evenly(every: Sequence[T], most: int) -> list[T]:
    """Return so many of them at most, evenly spaced."""
    count = min(most, len(every))
    return [every[i * len(every) // count] for i in range(count)]


def _trainings(summary: Summary) -> dict[str, Any]:
    best = summary.fit(summary.best) if summary.best else None
    first = best_of_trials(summary)
    curves = [t for t in summary.trials if t.curve]
    shown = {t.trial for t in (*evenly(curves, MOST_TRAININGS), *([best] if best else []))}
    points = summary.rank_correlation.points if summary.rank_correlation else ()
    return {
        "rungs": rungs(summary.study, summary.study.resolved.epochs) if summary.study.stopping == "halving" else [],
        "curves": [
            {
                "trial": t.trial,
                "state": t.state,
                "reason": t.reason,
                "best": t is best,
                "candidate": first.get(t.trial),
                "knobs": _settings(summary, t.params),
                "y": [_points(y) for y in t.curve],
            }
            for t in curves
            if t.trial in shown
        ],
        "scatter": [
            {
                "trial": t,
                "cheap": _points(cheap),
                "final": _points(final),
                "best": best is not None and t == best.trial,
            }
            for t, cheap, final in points
            if t in shown
        ],
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return rows of the same keys as columns, since thousands of rows would repeat their keys."""
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def _candidate(summary: Summary, candidate: Candidate, on_front: bool, devices: Sequence[str]) -> dict[str, Any]:
    score = candidate.score
    low, high = wilson(1 - score.attacked_error, score.images)
    note, against = summary.standing(candidate)
    return {
        "id": candidate.candidate,
        "ms": _number(score.latency_ms_p50),
        "images": score.latency_images,
        "attacked": _points(1 - score.attacked_error),
        "low": _points(low),
        "high": _points(high),
        "clean": _points(score.clean_accuracy),
        "oblivious": _points(score.oblivious_accuracy),
        "whiteBox": _points(score.white_box_accuracy),
        **(_rejection(score) if summary.rejects else {}),
        "front": on_front,
        "device": devices.index(score.device),
        "broken": bool(summary.broken(candidate)),
        "note": note,
        "against": against,
        "knobs": _settings(summary, candidate.params),
    }


def _rejection(score: Score) -> dict[str, Any]:
    return {
        "accuracy": _points(score.attacked_accuracy),
        "interval": [_points(end) for end in wilson(score.attacked_accuracy, score.images)],
        "rejected": _points(score.attacked_rejection),
        "cleanRejected": _points(score.clean_rejection),
    }


def best_of_trials(summary: Summary) -> dict[str, str]:
    """Return the best candidate of each trial that has one."""
    best = dict[frozenset[tuple[str, Scalar]], str]()
    for candidate in summary.ranked:
        best.setdefault(frozenset(candidate.params.train.items()), candidate.candidate)
    fits = {t.trial: frozenset(t.params.train.items()) for t in summary.trials}
    return {trial: best[train] for trial, train in fits.items() if train in best}


def _settings(summary: Summary, params: Params) -> list[Scalar | None]:
    values = params.flat()
    return [_plain(values.get(knob)) for knob in summary.searched]


def _fixed(summary: Summary) -> dict[str, Scalar | None]:
    """Return the knobs that were not searched, which are the same in all candidates."""
    values = summary.ranked[0].params.flat() if summary.candidates else {}
    return {knob: _plain(value) for knob, value in values.items() if knob not in summary.searched}


def risk_coverage(summary: Summary) -> list[dict[str, Any]]:
    """Return the risk-coverage curves of the best fits that can reject."""
    swept: dict[str, Candidate] = {}
    for candidate in summary.ranked:
        if candidate.score.risk_coverage and len(swept) < SWEPT:
            swept.setdefault(candidate.fit, candidate)
    return [
        {
            "id": c.candidate,
            "picked": [_points(c.score.clean_rejection), _points(c.score.attacked_error)],
            "points": [[_points(rejection), _points(error)] for rejection, error in c.score.risk_coverage],
        }
        for c in swept.values()
    ]


def latencies(summary: Summary) -> list[dict[str, Any]]:
    """Return each distinct latency, grouped by device and, if there are few settings, by setting."""
    knobs, found = _latency_knobs(summary), dict[tuple[str, str, float, float, str], list[str]]()
    for _, c in shown_candidates(summary):
        score = c.score
        if math.isfinite(score.latency_ms_p50) and math.isfinite(score.latency_ms_p95):
            measured = (score.latency_ms_p50, score.latency_ms_p95, score.latency_images)
            found.setdefault((score.device, _setting(c, knobs), *measured), []).append(c.candidate)
    few = len({(device, setting) for device, setting, *_ in found}) <= SETTINGS
    return [
        {
            "lane": ", ".join(filter(None, (setting if few else "", spoken_device(device)))),
            "device": spoken_device(device),
            "setting": setting,
            "p50": _number(p50),
            "p95": _number(p95),
            "images": images,
            "candidates": len(own),
            "candidate": own[0],
        }
        for (device, setting, p50, p95, images), own in sorted(found.items(), key=lambda one: (one[0][0], one[0][2]))
    ]


def _latency_knobs(summary: Summary) -> list[str]:
    """Return the searched knobs that can change the latency."""
    defense = summary.study.resolved.defense
    declared = (*fields(defense.Train), *fields(defense.Inference))
    return [one.name for one in declared if one.metadata["latency"] and one.name in summary.searched]


def _setting(candidate: Candidate, knobs: Sequence[str]) -> str:
    values: Mapping[str, Scalar] = candidate.params.flat()
    return ", ".join(f"{knob} {spoken_value(values.get(knob))}" for knob in knobs)


def _range(domain: BaseDistribution | None) -> str | None:
    """Return the scale of a numeric knob; None for a categorical one."""
    if not isinstance(domain, FloatDistribution | IntDistribution):
        return None
    return "log" if domain.log else "linear"


def _number(value: float) -> float | None:
    """Return the value with 6 significant digits; None for NaN, which JSON does not have."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _points(fraction: float) -> float | None:
    return _number(round(100 * fraction, 6))


def _plain(value: Scalar | None) -> Scalar | None:
    return _number(value) if isinstance(value, float) else value
