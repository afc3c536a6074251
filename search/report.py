"""The report: one self-contained HTML page on a search, finished or running, that needs no network.

Here stands what the page says; how it looks and how the charts are drawn stands in `report.html.j2`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from attacks.interval import wilson
from attacks.threat import Knowledge
from search import ranking
from search.score import Candidate, Score
from search.store import write_atomic
from search.study import Study
from spaces.space import Params, Scalar

TOP = 10
"""Rows of the leaderboard."""

LINES = 400
"""Lines of the parallel coordinates; more cannot be told apart."""

PICTURES = 6
PICTURE_BYTES = 500_000
"""What all pictures may weigh, so that the page can be mailed."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial as the study's journal tells it.

    Args:
        trial: its identity.
        state: finished, pruned, failed, interrupted or running.
        params: the proposed setting.
        curve: the cheap score, in [0, 1], by epoch.
        reason: why it did not finish; empty otherwise.
        picture: a PNG of clean, attacked and purified images.
        seconds: how long it took.
    """

    trial: str
    state: str
    params: Params
    curve: Sequence[float]
    reason: str
    picture: Path | None
    seconds: float | None


@dataclass(frozen=True)
class Findings:
    """Everything that the page shows.

    Args:
        undefended: the bare classifier, scored by the same suite on the same images.
        candidates: all that are finished.
        best: the best feasible one.
        front: the Pareto front among the feasible.
        searched: names of the knobs that were searched.
        importances: each knob's share in the variance of attacked accuracy; empty after too few trials.
        device: where the latencies were measured.
    """

    study: Study
    undefended: Candidate | None
    candidates: Sequence[Candidate]
    best: Candidate | None
    front: Sequence[Candidate]
    searched: Sequence[str]
    importances: Mapping[str, float]
    trials: Sequence[TrialRecord]
    device: str = ""

    @cached_property
    def ranked(self) -> list[Candidate]:
        """The candidates, the feasible ones first, then by attacked error and latency."""
        return sorted(ranking.ranked(self.candidates), key=lambda c: bool(self.broken(c)))

    @property
    def images(self) -> int:
        """How many validation images were attacked."""
        scored = (*self.candidates, *filter(None, [self.undefended]))
        return max((c.score.images for c in scored), default=self.study.plan().eval_images)

    @property
    def eps(self) -> float | None:
        """The bound of the attacks, in pixel units of [0, 1]; None as long as only the task knows it."""
        scored = self.undefended or next(iter(self.candidates), None)
        return scored.score.threat.eps if scored else self.study.eps

    def count(self, state: str) -> int:
        return sum(trial.state == state for trial in self.trials)

    def broken(self, candidate: Candidate) -> list[str]:
        """Return the constraints of the study that a candidate breaks, in words."""
        words = {
            "alarms": f"alarm: {'; '.join(candidate.score.alarms)}",
            "max_clean_rejection": f"more than {percent(self.study.max_clean_rejection)} of the clean images rejected",
            "min_clean_accuracy": f"clean accuracy below {percent(self.study.min_clean_accuracy)}",
            "max_latency_ms": f"slower than {milliseconds(self.study.max_latency_ms)}",
        }
        return [words[name] for name, excess in ranking.constraints(self.study, candidate).items() if excess > 0]

    def named(self, knowledge: Knowledge | None = None) -> str:
        """Return the threat model in short, to stand at a number: the study's, or the one with this knowledge."""
        norm = "L∞" if self.study.norm == "Linf" else "L2"
        return f"{knowledge or self.study.threat}, {norm}\u00a0eps\u00a0{spoken_eps(self.eps)}"

    def fit(self, candidate: Candidate) -> TrialRecord | None:
        """Return the trial that trained a candidate's fit."""
        train = dict(candidate.params.train)
        return next((t for t in self.trials if dict(t.params.train) == train), None)


def write(findings: Findings, path: Path) -> Path:
    """Write the page and return its path; who reads it meanwhile sees the old page or the new one, whole."""
    return write_atomic(path, render(findings).encode())


def render(findings: Findings) -> str:
    """Return the page."""
    study = findings.study
    return _template().render(
        f=findings,
        study=study,
        top=findings.ranked[:TOP],
        front={c.candidate for c in findings.front},
        interval=interval,
        threat=threat_in_words(findings),
        constraints=constraints(study),
        measures=measures(findings),
        charts=charts(findings),
        rejects=any(c.score.clean_rejection or c.score.attacked_rejection for c in findings.candidates),
        lines=LINES,
        pictures=pictures(findings),
        config=study.to_yaml(),
        plotly=Markup(get_plotlyjs()),
    )


def _template() -> jinja2.Template:
    # Autoescape is always on: names and reasons of failures are not ours, and may hold markup.
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(percent=percent, ms=milliseconds, duration=duration, value=spoken_value)
    return env.get_template("report.html.j2")


def percent(fraction: float | None) -> str:
    if fraction is None or not math.isfinite(fraction):
        return "–"
    return f"{100 * fraction:.1f}\u00a0%"


def milliseconds(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3g}\u00a0ms" if value < 1000 else f"{value:,.0f}\u00a0ms"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.0f}\u00a0s"
    minutes = round(seconds / 60)
    return f"{minutes}\u00a0min" if minutes < 60 else f"{minutes // 60}\u00a0h {minutes % 60:02d}\u00a0min"


def spoken_value(value: Scalar | None) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def spoken_eps(eps: float | None) -> str:
    """Return eps as papers write it: 0.3, but 8/255."""
    if eps is None:
        return "of the task"
    levels = eps * 255
    in_levels = len(f"{eps:g}") > 5 and abs(levels - round(levels)) < 1e-3
    return f"{round(levels)}/255" if in_levels else f"{eps:g}"


def interval(score: Score) -> tuple[float, float]:
    """Return the Wilson 95 % interval of the attacked accuracy."""
    return wilson(score.attacked_accuracy, score.images)


def threat_in_words(findings: Findings) -> str:
    knows = {
        "white-box": "The attacker knows the classifier and the defense in full",
        "oblivious": "The attacker knows the classifier but not the defense",
        "black-box": "The attacker sees only the classes that the whole answers, and trains a substitute on them",
    }[findings.study.threat]
    reach = "the task's eps" if findings.eps is None else spoken_eps(findings.eps)
    if findings.study.norm == "L2":
        return f"{knows}, and may move an image by up to {reach} in the L2 norm ({findings.named()})."
    return f"{knows}, and may move every pixel by up to {reach} of the way from black to white ({findings.named()})."


def constraints(study: Study) -> list[str]:
    least, budget = study.min_clean_accuracy, study.max_latency_ms
    return [
        *([f"clean accuracy of at least {percent(least)}"] if least is not None else []),
        *([f"purification latency of at most {milliseconds(budget)}"] if budget is not None else []),
        f"at most {percent(study.max_clean_rejection)} of the clean images rejected",
        "no alarm",
    ]


def measures(findings: Findings) -> Iterator[tuple[str, str, list[str]]]:
    """Yield measure, condition, and the values of the best candidate and of the undefended classifier."""
    batch = "p50, batch of 128" + (f", {findings.device}" if findings.device else "")
    asked = [("Black-box accuracy", findings.named("black-box"), lambda s: percent(s.black_box_accuracy))]
    rows: list[tuple[str, str, Callable[[Score], str]]] = [
        ("Attacked images accepted and wrong", findings.named(), lambda s: percent(s.attacked_error)),
        ("Attacked images rejected", findings.named(), lambda s: percent(s.attacked_rejection)),
        ("Oblivious accuracy", findings.named("oblivious"), lambda s: percent(s.oblivious_accuracy)),
        *(asked if findings.study.threat == "black-box" else []),
        ("White-box accuracy", findings.named("white-box"), lambda s: percent(s.white_box_accuracy)),
        ("Clean accuracy", "no attack", lambda s: percent(s.clean_accuracy)),
        ("Clean images rejected", "no attack", lambda s: percent(s.clean_rejection)),
        ("Purification latency", batch, lambda s: milliseconds(s.latency_ms_p50)),
    ]
    for measure, condition, of in rows:
        yield measure, condition, [of(c.score) if c else "–" for c in (findings.best, findings.undefended)]


def risk_coverage(findings: Findings) -> Sequence[tuple[float, float]]:
    """Return the best curve of clean rejection against attacked error; nothing where no candidate rejects."""
    return next((c.score.risk_coverage for c in findings.ranked if c.score.risk_coverage), ())


def charts(findings: Findings) -> dict[str, Any]:
    """Return what the charts draw, for JSON: accuracies in percent, latencies in milliseconds.

    Under attack it is one minus the error, which is what the front is made of: accuracy where nothing is rejected.
    """
    front = {c.candidate for c in findings.front}
    bare = findings.undefended
    best = findings.best and findings.fit(findings.best)
    return {
        "threat": findings.named(),
        "knobs": list(findings.searched),
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


def pictures(findings: Findings) -> list[tuple[TrialRecord, str]]:
    """Return the trials whose pictures are shown, the best ones first, each with a data URL."""
    leaders = filter(None, map(findings.fit, findings.ranked[: 5 * TOP]))
    shown: list[tuple[TrialRecord, str]] = []
    room = PICTURE_BYTES
    for trial in {t.trial: t for t in (*leaders, *findings.trials)}.values():
        data = _png(trial.picture)
        if data and len(data) <= room and len(shown) < PICTURES:
            room -= len(data)
            shown.append((trial, "data:image/png;base64," + base64.b64encode(data).decode()))
    return shown


def _png(picture: Path | None) -> bytes:
    try:
        data = picture.read_bytes() if picture else b""
    except OSError:  # the page of a search whose pictures were cleaned away is still a page
        return b""
    return data if data.startswith(b"\x89PNG\r\n\x1a\n") else b""
