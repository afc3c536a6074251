"""What the report's charts draw; how it is drawn stands in `report.js.j2`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from attacks.interval import wilson
from search.findings import Findings
from spaces.space import Scalar


def risk_coverage(findings: Findings) -> Sequence[tuple[float, float]]:
    """Return the best curve of clean rejection against attacked error; nothing where no candidate rejects."""
    return next((c.score.risk_coverage for c in findings.ranked if c.score.risk_coverage), ())


def charts(findings: Findings) -> dict[str, Any]:
    """Return what the charts draw, for JSON: accuracies in percent, latencies in milliseconds.

    Under attack it is one minus the error, which is what the front is made of: accuracy where nothing is rejected.
    """
    front = {c.candidate for c in findings.front}
    devices = sorted({c.score.device for c in findings.candidates})
    bare = findings.undefended
    best = findings.best and findings.fit(findings.best)
    return {
        "threat": findings.named(),
        "knobs": list(findings.searched),
        "devices": devices,
        "budget": findings.study.max_latency_ms,
        "best": findings.best and findings.best.candidate,
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
                "broken": "; ".join(findings.broken(c)),
                "knobs": [_plain(c.params.flat().get(knob)) for knob in findings.searched],
            }
            for c in findings.ranked
        ],
        "risk": [[_points(rejection), _points(error)] for rejection, error in risk_coverage(findings)],
        "importances": sorted(findings.importances.items(), key=lambda item: item[1]),
        "curves": [
            {"trial": t.trial, "state": t.state, "best": t is best, "y": [_points(y) for y in t.curve]}
            for t in findings.trials
            if t.curve
        ],
    }


def _number(value: float) -> float | None:
    """JSON has no NaN: a chart leaves a gap instead."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _points(fraction: float) -> float | None:
    return _number(100 * fraction)


def _plain(value: Scalar | None) -> Scalar | None:
    return _number(value) if isinstance(value, float) else value
