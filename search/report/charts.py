"""What the report's charts draw; how it is drawn stands in `page/*.js.j2`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from attacks.confidence import wilson
from search.formatting import spoken_device, spoken_value
from search.optimizer.early_stopping import rungs
from search.report.importance import CHANCE
from search.report.summary import Summary
from search.study.candidate import Candidate
from spaces.domain import Scalar

SWEPT = 5
"""Fits whose risk-coverage curves are drawn."""
SETTINGS = 16
"""Settings up to which each has a line of its own in the chart of latencies."""


def charts(summary: Summary) -> dict[str, Any]:
    """Return what the charts draw, for JSON: accuracies in percent, latencies in milliseconds.

    Under attack it is one minus the error, which is what the front is made of: accuracy where nothing is rejected.
    """
    front = {c.candidate for c in summary.front}
    devices = sorted({c.score.device for c in summary.candidates})
    bare, latency = summary.undefended, latencies(summary)
    best = summary.fit(summary.best) if summary.best else None
    domains = summary.study.resolved.space.flat()
    return {
        "threat": summary.named(),
        "knobs": list(summary.searched),
        "ranges": [_range(domains.get(knob)) for knob in summary.searched],
        "devices": [spoken_device(device) for device in devices],
        "budget": summary.study.max_latency_ms,
        "rejection": _points(summary.study.max_clean_rejection),
        "best": summary.best and summary.best.candidate,
        "undefended": _points(1 - bare.score.attacked_error) if bare else None,
        "candidates": [
            {
                "id": c.candidate,
                "ms": _number(c.score.latency_ms_p50),
                "attacked": _points(1 - c.score.attacked_error),
                "low": _points(wilson(1 - c.score.attacked_error, c.score.images)[0]),
                "high": _points(wilson(1 - c.score.attacked_error, c.score.images)[1]),
                "clean": _points(c.score.clean_accuracy),
                "front": c.candidate in front,
                "device": devices.index(c.score.device),
                "broken": "; ".join(summary.broken(c)),
                "knobs": [_plain(c.params.flat().get(knob)) for knob in summary.searched],
            }
            for c in summary.ranked
        ],
        "risk": risk_coverage(summary),
        "latency": latency,
        "lanes": len({one["lane"] for one in latency}),
        "importances": [
            [knob, share, summary.importances.best.get(knob)]
            for knob, share in sorted(summary.importances.overall.items(), key=lambda item: item[1])
        ],
        "chance": CHANCE,
        "rungs": rungs(summary.study) if summary.study.stopping == "halving" else [],
        "curves": [
            {"trial": t.trial, "state": t.state, "best": t is best, "y": [_points(y) for y in t.curve]}
            for t in summary.trials
            if t.curve
        ],
        "scatter": [
            {"trial": t, "cheap": _points(cheap), "final": _points(final), "best": best is not None and t == best.trial}
            for t, cheap, final in (summary.rank_correlation.points if summary.rank_correlation else ())
        ],
    }


def risk_coverage(summary: Summary) -> list[dict[str, Any]]:
    """Return the curves of clean rejection against attacked error of the best fits that can reject."""
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
    """Return each measurement once, on the line of its device and, where there are few, of its setting."""
    knobs = _latency_knobs(summary)
    found = Counter(
        (c.score.device, _setting(c, knobs), c.score.latency_ms_p50, c.score.latency_ms_p95)
        for c in summary.candidates
        if math.isfinite(c.score.latency_ms_p50) and math.isfinite(c.score.latency_ms_p95)
    )
    few = len({(device, setting) for device, setting, *_ in found}) <= SETTINGS
    return [
        {
            "lane": ", ".join(filter(None, (setting if few else "", spoken_device(device)))),
            "device": spoken_device(device),
            "setting": setting,
            "p50": _number(p50),
            "p95": _number(p95),
            "candidates": count,
        }
        for (device, setting, p50, p95), count in sorted(found.items(), key=lambda one: (one[0][0], one[0][2]))
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
    """Return the scale of a knob that is a range, and nothing of a choice."""
    if not isinstance(domain, FloatDistribution | IntDistribution):
        return None
    return "log" if domain.log else "linear"


def _number(value: float) -> float | None:
    """JSON has no NaN: a chart leaves a gap instead."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _points(fraction: float) -> float | None:
    return _number(round(100 * fraction, 6))


def _plain(value: Scalar | None) -> Scalar | None:
    return _number(value) if isinstance(value, float) else value
