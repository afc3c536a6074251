"""Progress and remaining time of a table: trainings are estimated from a timed step, attacks from earlier cells."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console

from search.console import Counting, ProgressBars, TimeLeft
from search.formatting import duration
from search.reproduce.cell_setting import Setting
from search.reproduce.cells import Cells
from search.trial.timing import Step


class TableProgress:
    """A progress bar, and a line for each cell.

    Args:
        cells: number of cells of the table.
    """

    def __init__(self, console: Console, cells: int) -> None:
        self._fits: dict[str, float] = {}
        self._left: list[str] = []
        self._now, self._begun, self._trained, self._part = "", 0.0, 0.0, 0.0
        self._attacks: list[float] = []
        self._slower = 1.0
        self._bar = ProgressBars(console, Counting("cells"), TimeLeft())
        self._task = self._bar.add_task("", total=cells, ends=math.nan)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._bar:
            yield

    def expect(self, cells: Cells, settings: Sequence[Setting]) -> None:
        """Estimate the time of each training that is not in the store yet, by timing a step."""
        threads = torch.get_num_threads()
        for setting in settings:
            key = ""
            try:
                key = cells.missing(setting)
                if key and key not in self._fits:
                    self._bar.update(self._task, description=f"timing a step of {setting.defense}")
                    self._fits[key] = _forecast(cells, setting)
            except Exception:  # any error of a defense; it is reported when its cell runs
                pass
            finally:
                torch.set_num_threads(threads)  # timing a step changes the number of threads
            self._left.append(key)
        self._show()

    def cell(self, words: str) -> None:
        """Record that a cell begins."""
        self._now, self._begun, self._trained, self._part = words, time.monotonic(), 0.0, 0.0
        self._bar.update(self._task, description=words)
        self._show()

    def epoch(self, what: str, epoch: int, epochs: int) -> None:
        """Record an epoch of the training that the present cell needs."""
        self._part, self._trained = epoch / epochs, time.monotonic() - self._begun
        key = self._left[0] if self._left else ""
        if expected := self._part * self._fits.get(key, 0.0):
            self._slower = self._trained / expected
        self._bar.update(self._task, description=f"{self._now}: {what}, epoch {epoch} of {epochs}")
        self._show()

    def done(self, line: str, seconds: float) -> None:
        """Record the result of a cell, and the seconds of its first computation."""
        took = time.monotonic() - self._begun
        if (passed := took - self._trained) > 0.05:
            self._attacks.append(passed)
        if self._left:
            self._fits.pop(self._left.pop(0), None)
        self._bar.advance(self._task)
        kept = "kept; it took " if took < seconds / 2 else ""
        self._bar.say(f"{self._now}: {line} ({kept}{duration(seconds)})")
        self._show()

    def left(self) -> float:
        """Return the estimated remaining seconds."""
        here = self._fits.get(self._left[0], 0.0) * self._part if self._left else 0.0
        each = sum(self._attacks) / len(self._attacks) if self._attacks else 0.0
        return self._slower * (sum(self._fits.values()) - here) + each * sum(map(bool, self._left))

    def _show(self) -> None:
        self._bar.update(self._task, ends=time.monotonic() + self.left())


def _forecast(cells: Cells, setting: Setting) -> float:
    """Return the estimated seconds of a training, from a few timed steps."""
    training = (step := Step(cells.runner(setting))).training()
    return training.fit + training.shared + step.epochs * training.epoch
