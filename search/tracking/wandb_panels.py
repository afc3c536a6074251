"""Writes charts, tables, pictures, summaries and exports to a W&B run, one function for each."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go
import wandb

from search.formatting import spoken_threat
from search.study.candidate import Candidate
from search.study.ranking import feasible, front, ranked
from search.study.study import Study
from search.study.verdict import verdict_of_audit, verdict_of_search
from search.study.winner import NOT_AUDITED
from search.tracking.wandb_run import CODE, PROJECT
from search.trial.pictures import caption

Extreme = Literal["max", "min"]
"""Which extreme of a metric the summary of a run keeps."""


def pareto_chart(study: Study, undefended: Candidate, candidates: Sequence[Candidate]) -> go.Figure:
    """Return a chart of attacked accuracy against latency: candidates, the feasible front, the bare classifier."""
    chart = _chart(study, undefended, "purification latency, p50 in ms", "attacked accuracy (with rejection), fraction")
    chart.add_trace(_points("candidates", candidates, mode="markers", opacity=0.5))
    chart.add_trace(_points("Pareto front", front(study, candidates), mode="lines+markers"))
    chart.add_trace(_points("no defense", [undefended], mode="markers", marker={"symbol": "x", "size": 10}))
    return chart


def risk_chart(study: Study, undefended: Candidate, candidates: Sequence[Candidate]) -> go.Figure | None:
    """Return the risk-coverage chart of the best candidate that has a curve; None if no candidate has one."""
    curves = (c for c in (*feasible(study, candidates), *ranked(candidates)) if c.score.risk_coverage)
    best = next(curves, None)
    if best is None:
        return None
    rejected, error = zip(*best.score.risk_coverage, strict=True)
    chart = _chart(study, undefended, "clean images rejected, fraction", "attacked error, fraction")
    chart.add_trace(go.Scatter(name=best.candidate, x=rejected, y=error, mode="lines+markers"))
    bare = [undefended.score.attacked_error] * 2
    chart.add_trace(go.Scatter(name="no defense", x=[0, 1], y=bare, mode="lines", line={"dash": "dot"}))
    return chart


def _chart(study: Study, undefended: Candidate, x: str, y: str) -> go.Figure:
    under = f"{spoken_threat(undefended.score.threat)}, {undefended.score.images} images"
    title = f"{study.name}: {study.defense} on {study.label}, {under}"
    return go.Figure(layout={"title": title, "xaxis": {"title": x}, "yaxis": {"title": y, "range": [0, 1]}})


def _points(name: str, candidates: Sequence[Candidate], **style: Any) -> go.Scatter:
    x = [c.score.latency_ms_p50 for c in candidates]
    y = [1 - c.score.attacked_error for c in candidates]  # the accuracy if nothing is rejected
    return go.Scatter(name=name, x=x, y=y, text=[c.candidate for c in candidates], **style)


def announce(say: Callable[[str], None], run: wandb.Run) -> None:
    """Print the URL of a run; an offline run has none."""
    if run.url:
        say(f"W&B {run.url}")


def save_code(run: wandb.Run) -> None:
    """Log the Python files of this code, with a user's own defenses, as an artifact."""
    with tempfile.TemporaryDirectory() as copied:
        for package in ("spaces", "attacks", "defenses", "search"):
            shutil.copytree(CODE / package, Path(copied) / package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(CODE / "launch.py", copied)
        run.log_code(copied, name=f"source-{PROJECT}")


def log(point: Mapping[str, float], run: wandb.Run) -> None:
    run.log(dict(point))


def define(step: str, extremes: Mapping[str, Extreme], run: wandb.Run) -> None:
    """Set which extreme of each metric the summary of the run keeps."""
    for name, extreme in extremes.items():
        run.define_metric(name, step_metric=step, summary=extreme)


def show_table(name: str, study: Study, candidates: Sequence[Candidate], run: wandb.Run) -> None:
    """Log a ranked table of the candidates, with columns for feasibility and membership in the front."""
    within, best = ({c.candidate for c in of(study, candidates)} for of in (feasible, front))
    rows = [{**c.row(), "feasible": c.candidate in within, "pareto": c.candidate in best} for c in ranked(candidates)]
    columns: list[str | int] = list(dict.fromkeys(column for row in rows for column in row))
    data = [[row.get(str(column)) for column in columns] for row in rows]
    run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)})


def show_picture(picture: Path, run: wandb.Run) -> None:
    """Log a picture, with the predictions for its images as caption."""
    run.log({"picture": wandb.Image(str(picture), caption=caption(picture))})


def show_charts(study: Study, undefended: Candidate, candidates: Sequence[Candidate], run: wandb.Run) -> None:
    for name, of in (("pareto", pareto_chart), ("risk_coverage", risk_chart)):
        if chart := of(study, undefended, candidates):
            run.log({name: wandb.Plotly(chart)})


def sum_up(outcome: Mapping[str, Any], run: wandb.Run) -> None:
    """Update the summary of a run; a pruned trial gets a tag, because W&B has no such state."""
    run.summary.update({name: value for name, value in outcome.items() if value is not None})
    if outcome.get("state") == "pruned":
        run.tags = (*(run.tags or ()), "pruned")


def figures(study: Study, undefended: Candidate, candidate: Candidate) -> dict[str, Any]:
    """Return the summary of a candidate's run: what was measured of it, without its setting, and what it is worth."""
    knobs, row = candidate.params.flat(), candidate.row()
    setting = {
        "candidate",
        "fit",
        "defense",
        "task",
        "threat",
        "norm",
        "eps",
        *(f"knob_{name}" if f"knob_{name}" in row else name for name in knobs),
    }
    measured = {name: value for name, value in row.items() if name not in setting}
    verdict = f"{verdict_of_search(candidate, undefended)}; {NOT_AUDITED}"
    return {**measured, "feasible": bool(feasible(study, [candidate])), "verdict": verdict}


def log_export(study: Study, folder: Path, aliases: Sequence[str], run: wandb.Run) -> None:
    """Log an export as a version of the artifact of its defense and task, and the figures of its audit."""
    evidence = json.loads((folder / "evidence.json").read_bytes())
    told = {name: value for name, value in evidence.items() if isinstance(value, str | int | float | bool)}
    told["verdict"] = verdict_of_audit(evidence)
    name = re.sub(r"[^\w.-]+", "-", f"{study.defense}-{study.label}")
    artifact = wandb.Artifact(
        name, "model", description=(folder / "card.md").read_text(encoding="utf-8"), metadata=told
    )
    for path in sorted(folder.iterdir()):
        if path.is_file():
            artifact.add_file(str(path), skip_cache=True)
    run.log_artifact(artifact, aliases=list(aliases))
    endings = ("accuracy", "error", "rejection", "_of_the_search", "ms_p50", "verdict")
    run.summary.update({f"audited/{name}": value for name, value in told.items() if name.endswith(endings)})
