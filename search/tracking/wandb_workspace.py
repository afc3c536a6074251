"""Creates a W&B workspace for a search: the most useful panels, over the runs of its group."""

from __future__ import annotations

from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import wandb
from wandb.sdk import wandb_setup

from search.formatting import spoken_threat
from search.study.resolved import ResolvedStudy
from search.study.study import Study
from search.tracking import wandb_run
from search.tracking.time_limit import within
from spaces.exceptions import InputError

try:
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.reports.v2 import interface as wr
except ImportError as error:
    raise InputError(f"a workspace needs the packages of requirements.lock, but {error}: run `make setup`") from None

REACH_S = 10.0
"""Time limit for the first answer of the server, in seconds."""
SAVE_S = 60.0
"""Time limit for saving a workspace, in seconds."""
CURVES = 100
"""Maximum number of runs whose learning curves are drawn."""
WIDE = wr.Layout(w=24, h=12)


def view(study: Study) -> str:
    """Create a workspace for a search on the W&B server that has its runs, and return the URL.

    Raises:
        InputError: the runs are not on a server, there is no key, or the server rejects the workspace.
    """
    _uploaded(study)
    wandb_run.hush(study.folder)
    if not wandb_run.has_key():
        raise InputError("a workspace needs a W&B key, but there is none: run `wandb login` or set WANDB_API_KEY")
    server = str(wandb_setup.singleton().settings.base_url)
    _reached(server)
    try:
        return within(SAVE_S, lambda: _saved(study))
    except Exception as error:  # any answer of the server
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise InputError(f"a workspace needs a W&B server that takes it, but {server} does not: {reason}") from None


def workspace(study: Study, entity: str, project: str) -> ws.Workspace:
    """Return the workspace; it is not saved yet."""
    resolved = study.resolved
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"{study.name}: {study.defense} on {study.label}",
        sections=[
            ws.Section(name="Candidates", is_open=True, panels=_candidates(study, resolved)),
            ws.Section(name="Learning curves", is_open=True, panels=_curves(resolved)),
            ws.Section(name="Pictures", is_open=True, panels=[wr.MediaBrowser(media_keys=["picture"], layout=WIDE)]),
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=CURVES),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("Group") == study.name],
            # Trainings before candidates: `max_runs` counts the first of all runs.
            order=[
                ws.Ordering(ws.Metric("JobType"), ascending=False),
                ws.Ordering(ws.Summary("attacked_accuracy"), ascending=False),
            ],
            pinned_columns=[f"summary:{name}" for name in ("attacked_accuracy", "latency_ms_p50", "clean_accuracy")],
        ),
    )


def _candidates(study: Study, resolved: ResolvedStudy) -> list[wr.PanelTypes]:
    """Return the panels of the candidates, over train-time and inference-time knobs."""
    attacked, latency = wr.SummaryMetric("attacked_accuracy"), wr.SummaryMetric("latency_ms_p50")
    axis = wr.ParallelCoordinatesPlotColumn
    knobs = [
        axis(
            metric=wr.Config(f"{'train' if name in resolved.space.train else 'inference'}.{name}"),
            display_name=name,
            log=bool(getattr(domain, "log", False)),
        )
        for name, domain in resolved.space.searched().items()
    ]
    figures = [axis(metric=latency, display_name="ms"), axis(metric=attacked, display_name="attacked accuracy")]
    return [
        wr.ScatterPlot(
            title=f"Attacked accuracy ({spoken_threat(resolved.threat)}) against latency, p50 in ms",
            x=latency,
            y=attacked,
            layout=wr.Layout(w=12, h=10),
        ),
        wr.ParameterImportancePlot(with_respect_to="attacked_accuracy", layout=wr.Layout(w=12, h=10)),
        wr.ParallelCoordinatesPlot(
            title=f"Knobs ({spoken_threat(resolved.threat)})", columns=[*knobs, *figures], layout=WIDE
        ),
        wr.MediaBrowser(title="Pareto front, all candidates", media_keys=["pareto", "risk_coverage"], layout=WIDE),
        wr.WeavePanelSummaryTable(table_name="leaderboard", layout=WIDE),
    ]


def _curves(resolved: ResolvedStudy) -> list[wr.PanelTypes]:
    return [
        wr.LinePlot(
            title=f"Quick attacked accuracy ({spoken_threat(resolved.threat)}) by epoch",
            x="epoch",
            y=["cheap"],
            max_runs_to_show=CURVES,
        ),
        wr.LinePlot(
            title=f"Best attacked accuracy ({spoken_threat(resolved.threat)}) by trial",
            x="trial",
            y=["best/attacked_accuracy"],
        ),
    ]


def _saved(study: Study) -> str:
    entity = wandb_setup.singleton().settings.entity or wandb.Api().default_entity
    made = workspace(study, str(entity), wandb_run.project())
    made.save()  # type: ignore[no-untyped-call]
    return str(made.url)


def _uploaded(study: Study) -> None:
    """Raise an error if no run of the search is on a server; wandb marks uploaded offline runs by a .synced file."""
    found = wandb_run.candidates(study.folder)
    folder = found if found.exists() else study.folder / "wandb"
    offline = [run for run in folder.glob("offline-run-*") if not any(run.glob("*.synced"))]
    # A run that was rewritten offline after a server failure may have an online folder that was never uploaded.
    kept = {_identity(run) for run in offline}
    if any(folder.glob("offline-run-*/*.synced")) or any(_identity(run) not in kept for run in folder.glob("run-*")):
        return
    remedy = "search again under another name with --wandb online, which trains nothing that the store holds"
    if offline:
        remedy = f"upload them with: {wandb_run.upload(study.folder)}"
    raise InputError(f"a workspace shows runs that are on a W&B server, but those of {study.name} are not: {remedy}")


def _identity(run: Path) -> str:
    """Return the id of a run, the end of the name of its folder: [offline-]run-TIME-ID."""
    return run.name.partition("run-")[2].partition("-")[2]


def _reached(server: str) -> None:
    """Raise an error if the server does not answer in `REACH_S`; wandb would retry for a long time."""
    try:
        urlopen(server, timeout=REACH_S).close()
    except HTTPError:
        pass  # this is an answer
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"a workspace needs a W&B server, but {server} does not answer: {reason}") from None
