"""What a user sees of a search: a table of running trials while it runs, and the leaderboard."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from attacks.interval import wilson
from defenses.base import Metrics
from search.study import ranking
from search.study.callbacks import Callback, State
from search.study.candidate import Candidate
from search.study.study import Study
from spaces.domain import Scalar
from spaces.space import Params


@contextmanager
def working(console: Console, doing: str) -> Iterator[None]:
    """Say what takes minutes and, on a terminal, for how long it has been going on."""
    console.print(doing, highlight=False, soft_wrap=True)
    columns = (SpinnerColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task("")
        try:
            yield
        except KeyboardInterrupt:
            console.print(f"interrupted while {doing}", highlight=False, soft_wrap=True)
            raise


@dataclass
class _Row:
    knobs: str
    epoch: int = 0
    loss: float | None = None
    cheap: float | None = None
    since: float = field(default_factory=time.monotonic)


class Display(Callback):
    """A live table on a terminal; a line an event where the output is piped.

    Args:
        searched: the knobs to show.
        epochs: of a whole training.
        done: trials that ended in an earlier run.
    """

    def __init__(self, console: Console, study: Study, searched: Sequence[str], epochs: int, done: int) -> None:
        self.console = console
        self.study = study
        self.searched = searched
        self.epochs = epochs
        self.done = done
        self._rows: dict[str, _Row] = {}
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("trials"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._bar = self._progress.add_task("trials", total=study.trials, completed=done)

    def search_started(self, study: Study, undefended: Candidate) -> None:
        score = undefended.score
        self._say(
            f"undefended {study.label}: clean {percent(score.clean_accuracy)}, attacked "
            f"{percent(score.attacked_accuracy)} ({score.threat}), {score.images} validation images"
        )
        if self.console.is_terminal:
            self._live = Live(self._table(), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def trial_started(self, trial: str, params: Params) -> None:
        knobs = ", ".join(f"{name} {brief(value)}" for name, value in params.train.items() if name in self.searched)
        self._rows[trial] = _Row(knobs)
        self._say(f"{trial} started: {knobs}", piped=True)
        self._refresh()

    def epoch_ended(self, trial: str, epoch: int, metrics: Metrics) -> None:
        row = self._rows.setdefault(trial, _Row(""))
        row.epoch, row.loss, row.cheap = epoch, metrics.get("loss"), metrics.get("cheap")
        self._say(f"{trial} epoch {epoch}/{self.epochs}: quick attacked {percent(row.cheap)}", piped=True)
        self._refresh()

    def trial_ended(
        self, trial: str, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        self._rows.pop(trial, None)
        self.done += state != "interrupted" and trial.startswith("t")
        best = next(iter((*ranking.feasible(self.study, candidates), *ranking.ranked(candidates))), None)
        if best is None:
            self._say(f"{trial} {state}{': ' + reason if reason else ''}")
        else:
            score = best.score
            self._say(
                f"{trial} finished, {len(candidates)} candidates, best {best.candidate}: attacked "
                f"{percent(score.attacked_accuracy)} ({score.threat.knowledge}), oblivious "
                f"{percent(score.oblivious_accuracy)}, white-box {percent(score.white_box_accuracy)}, clean "
                f"{percent(score.clean_accuracy)}, "
                f"{score.latency_ms_p50:.0f} ms"
            )
        self._progress.update(self._bar, completed=self.done)
        self._refresh()

    def search_ended(self, state: State, candidates: Sequence[Candidate]) -> None:
        self.close()

    def close(self) -> None:
        """Take the live table down."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _say(self, line: str, *, piped: bool = False) -> None:
        """Print a line; one that is `piped` only where there is no live table that shows the same."""
        if not (piped and self._live):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._table())

    def _table(self) -> RenderableType:
        table = Table("trial", "knobs", "epoch", "loss", "quick attacked", "seconds", box=None, pad_edge=False)
        for trial, row in self._rows.items():
            loss = "" if row.loss is None else f"{row.loss:.4g}"
            doing = f"{row.epoch}/{self.epochs}" if row.epoch < self.epochs else "scoring"
            seconds = f"{time.monotonic() - row.since:.0f}"
            table.add_row(trial, row.knobs, doing, loss, percent(row.cheap), seconds)
        return Group(self._progress, table)


def leaderboard(
    study: Study, searched: Sequence[str], undefended: Candidate | None, ranked: Sequence[Candidate], top: int = 10
) -> Table:
    """Return the best candidates beside the undefended classifier, percent, with Wilson 95 % intervals."""
    threat = ranked[0].score.threat if ranked else undefended.score.threat if undefended else None
    title = f"{study.name}: {study.defense} on {study.label}, attacked accuracy under {threat}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("candidate", no_wrap=True, min_width=13)
    for heading in searched:
        table.add_column(heading, justify="right", no_wrap=True)
    rejects = any(c.score.clean_rejection or c.score.attacked_rejection for c in ranked)
    several = len(ranking.devices(ranked)) > 1
    apart = ("error %", "rejected %", "clean rejected %") if rejects else ()
    for heading in ("attacked %", "95 %", *apart, "oblivious %", "white-box %", "clean %", "p50 ms"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=max(6, len(heading)))
    if several:
        table.add_column("timed on")
    for candidate in ranked[:top]:
        knobs, device = candidate.params.flat(), [candidate.score.device] if several else []
        figures = _figures(candidate, rejects)
        table.add_row(candidate.candidate, *(brief(knobs[name]) for name in searched), *figures, *device)
    if undefended is not None:
        table.add_row("undefended", *("-" for _ in searched), *_figures(undefended, rejects), style="dim")
    return table


def refusals(study: Study, candidates: Sequence[Candidate]) -> str:
    """Return in one line how many candidates keep to the constraints, the one that refuses most first."""
    within = len(ranking.feasible(study, candidates))
    each = (
        f"{one.words}: {one.within}" + (f" (refuses {one.alone} alone)" if one.alone else "")
        for one in ranking.kept(study, candidates)
    )
    return f"constraints: {within} of {len(candidates)} candidates keep to all; {', '.join(each)}"


def _figures(candidate: Candidate, rejects: bool) -> list[str]:
    score = candidate.score
    apart = (score.attacked_error, score.attacked_rejection, score.clean_rejection) if rejects else ()
    low, high = wilson(score.attacked_accuracy, score.images)
    return [
        percent(score.attacked_accuracy),
        f"{100 * low:.0f}-{100 * high:.0f}",
        *map(percent, apart),
        percent(score.oblivious_accuracy),
        percent(score.white_box_accuracy),
        percent(score.clean_accuracy),
        f"{score.latency_ms_p50:.1f}",
    ]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def brief(value: Scalar) -> str:
    """Return a knob's value, three digits of a float."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
