"""Displays a running search: a live table of its trials, or one line per event."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from defenses.base import Metrics
from search.console import Counting, ProgressBars, TimeLeft
from search.formatting import brief, counted, points, spoken_threat
from search.study import ranking
from search.study.callbacks import Callback, State
from search.study.candidate import Candidate, Proposal
from search.study.study import Study


@dataclass
class _Row:
    epochs: int
    knobs: str = ""
    epoch: int = 0
    loss: float | None = None
    cheap: float | None = None
    doing: str = "scoring"
    share: float = 0.0
    since: float = field(default_factory=time.monotonic)


class LiveTable(Callback):
    """A live table on a terminal; one line per event if the output is piped.

    Args:
        searched: names of the knobs to show.
        epochs: number of epochs of a training, where it is no knob.
        done: number of trials that ended in an earlier run.
    """

    def __init__(self, console: Console, study: Study, searched: Sequence[str], epochs: int, done: int) -> None:
        self.console = console
        self.study = study
        self.searched = searched
        self.epochs = epochs
        self._rows: dict[str, _Row] = {}
        self._live: Live | None = None
        self._so_far = self._began_with = float(done)
        self._began = math.nan
        self._progress = ProgressBars(console, Counting("trainings"), TimeLeft())
        self._bar = self._progress.add_task(study.name, total=study.trials, completed=done, ends=math.nan)
        if not console.is_terminal:  # on one, the live table shows it
            self._progress.start()

    def classifier_trained(self, study: Study, cheap: float) -> None:
        images = min(study.cheap_images, study.resolved.eval_images)
        self._say(
            f"undefended {study.label}: quick score {points(cheap)}, {images} validation images; all attacks come next"
        )

    def search_started(self, study: Study, undefended: Candidate) -> None:
        score, self._began = undefended.score, time.monotonic()
        self._say(
            f"undefended {study.label}: clean {points(score.clean_accuracy)}, attacked "
            f"{points(score.attacked_accuracy)} ({spoken_threat(score.threat)}), {score.images} validation images"
        )
        if self.console.is_terminal:
            # Drawn four times a second, not at each event: a thousand workers have dozens of these.
            self._live = Live(get_renderable=self._table, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def trial_started(self, trial: Proposal) -> None:
        knobs = ", ".join(
            f"{name} {brief(value)}" for name, value in trial.params.train.items() if name in self.searched
        )
        self._advance(trial, self._row(trial), 0.0)
        self._rows[trial.name] = _Row(self._epochs(trial), knobs)
        self._say(f"{trial.name} started: {knobs}", piped=True)

    def epoch_ended(self, trial: Proposal, epoch: int, metrics: Metrics) -> None:
        row = self._row(trial)
        if not row.epoch:  # the epochs before it are of an earlier run
            self._began_with += (epoch - 1) / (row.epochs + 1)
        row.epoch, row.loss, row.cheap = epoch, metrics.get("loss"), metrics.get("cheap")
        self._advance(trial, row, epoch / (row.epochs + 1))
        self._say(f"{trial.name} epoch {epoch}/{row.epochs}: quick score {points(row.cheap)}", piped=True)

    def setting_scored(self, trial: Proposal, done: int, settings: int, images: int) -> None:
        row = self._row(trial)
        row.doing = f"scored {done}/{settings}"
        scoring = done / settings  # counts like one epoch
        self._advance(trial, row, max(row.share, (row.epochs + scoring) / (row.epochs + 1)))
        if not self.console.is_terminal:  # in the next line about the progress
            scored = f"{trial.name} scored {done} of {counted(settings, 'setting')} on {counted(images, 'image')}"
            self._progress.update(self._bar, description=f"{self.study.name} ({scored})")

    def trial_ended(
        self, trial: Proposal, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        self._advance(trial, self._row(trial), float(state != "interrupted"))
        del self._rows[trial.name]
        best = next(iter((*ranking.feasible(self.study, candidates), *ranking.ranked(candidates))), None)
        if best is None:
            self._say(f"{trial.name} {state}{': ' + reason if reason else ''}")
        else:
            score = best.score
            self._say(
                f"{trial.name} finished, {counted(len(candidates), 'candidate')}, best {best.candidate}: attacked "
                f"{points(score.attacked_accuracy)} ({score.threat.knowledge}), oblivious "
                f"{points(score.oblivious_accuracy)}, white-box {points(score.white_box_accuracy)}, clean "
                f"{points(score.clean_accuracy)}, "
                f"{score.latency_ms_p50:.0f} ms"
            )
        self._progress.update(self._bar, description=self.study.name)

    def _row(self, trial: Proposal) -> _Row:
        return self._rows.setdefault(trial.name, _Row(self._epochs(trial)))

    def _epochs(self, trial: Proposal) -> int:
        return int(trial.params.train.get("epochs", self.epochs))

    def _advance(self, trial: Proposal, row: _Row, share: float) -> None:
        """Show how much of a training is done, and the time left if all goes on as fast as since the start."""
        if trial.refines:  # not one of the trainings that are counted
            return
        self._so_far, row.share = self._so_far + share - row.share, share
        new, rest = self._so_far - self._began_with, self.study.trials - self._so_far
        left = (time.monotonic() - self._began) * rest / new if new > 1e-6 and rest > 1e-6 else math.nan
        self._progress.update(self._bar, completed=round(self._so_far, 6), ends=time.monotonic() + left)

    def search_ended(self, state: State, candidates: Sequence[Candidate]) -> None:
        self.close()

    def close(self) -> None:
        """Stop the live table."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._progress.stop()

    def _say(self, line: str, *, piped: bool = False) -> None:
        """Print a line; a `piped` line is skipped while the live table shows the same information."""
        if not (piped and self._live):
            self._progress.say(line)

    def _table(self) -> RenderableType:
        table = Table("training", "knobs", "epoch", "loss", "quick score", "seconds", box=None, pad_edge=False)
        for column in table.columns:  # no figure is cut: the knobs give way
            column.no_wrap, column.overflow = column.header != "knobs", "fold"
        rows = list(self._rows.items())
        shown = max(1, self.console.height - 6)
        for trial, row in rows[:shown]:
            loss = "" if row.loss is None else f"{row.loss:.4g}"
            doing = f"{row.epoch}/{row.epochs}" if row.epoch < row.epochs else row.doing
            seconds = f"{time.monotonic() - row.since:.0f}"
            table.add_row(trial, row.knobs, doing, loss, points(row.cheap), seconds)
        more = [Text(f"and {len(rows) - shown} more trainings")] if len(rows) > shown else []
        return Group(self._progress, table, *more)
