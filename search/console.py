"""Progress display of long operations, and their end by a signal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from search.formatting import duration

SAID = "what it interrupted was said"
"""The note of a KeyboardInterrupt about which a line was printed."""
EVERY_S = 25.0
"""Seconds of silence after which a command whose output is piped says how far it is."""


@contextmanager
def terminable() -> Iterator[None]:
    """Handle SIGTERM, sent by batch systems and clusters, like Ctrl-C; enter only after Ray has set its handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _as_ctrl_c)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_ctrl_c(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell ignores SIGINT for a script's `&` jobs
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


class Counting(ProgressColumn):
    """The column for an amount of countable things, such as 3 of 8 trainings; one that is half done is not counted."""

    def __init__(self, things: str) -> None:
        super().__init__()
        self.things = things

    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed)} of {int(task.total or 0)} {self.things}")


class TimeLeft(ProgressColumn):
    """The column for the remaining time of a task that has its expected end in its field `ends`, in monotonic seconds.

    It runs down between estimates; nan is an end that nobody knows, and an end that has passed is one too.
    """

    def render(self, task: Task) -> Text:
        left = task.fields["ends"] - time.monotonic()
        return Text(duration(left) if left >= 0.5 else "–")


class ProgressBars(Progress):
    """Progress bars on a terminal; where the output is piped, a line after every `EVERY_S` seconds of silence.

    Args:
        console: where they are shown.
        count: the column for the completed amount; default: percent.
        left: the column for the remaining time; default: an estimate from the last hour.
    """

    def __init__(
        self, console: Console, count: ProgressColumn | None = None, left: ProgressColumn | None = None
    ) -> None:
        self._count, self._left = count or TaskProgressColumn(), left or TimeRemainingColumn()
        self._ended, self._spoke = threading.Event(), time.monotonic()
        self._speaker: threading.Thread | None = None
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(20),
            self._count,
            TimeElapsedColumn(),
            TextColumn("left"),
            self._left,
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=3600.0,
        )

    def start(self) -> None:
        super().start()
        if self.disable and self._speaker is None:
            self._spoke = time.monotonic()
            self._speaker = threading.Thread(target=self._speak, name="progress", daemon=True)
            self._speaker.start()

    def stop(self) -> None:
        self._ended.set()
        if self._speaker is not None:
            self._speaker.join()
        if self.live.is_started:
            super().stop()

    def say(self, line: str) -> None:
        """Print a line; the next one about the progress comes `EVERY_S` seconds later, if none comes before."""
        self._spoke = time.monotonic()
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _speak(self) -> None:
        while not self._ended.wait(max(0.0, self._spoke + EVERY_S - time.monotonic())):
            if time.monotonic() - self._spoke < EVERY_S:
                continue
            self._spoke = time.monotonic()
            visible = [task for task in self.tasks if task.visible]
            if shown := [task for task in visible if not task.finished] or visible[:1]:
                self.say("; ".join(map(self._told, shown)))

    def _told(self, task: Task) -> str:
        """Return the figures of a bar as text."""
        done, left = (str(column.render(task)).strip() for column in (self._count, self._left))
        passed = f"{TimeElapsedColumn().render(task)} so far"
        known = [f"{left} left"] if any(map(str.isdigit, left)) else []
        return f"{task.description.strip()}: {', '.join(filter(None, [done, passed, *known]))}"


@contextmanager
def working(console: Console, doing: str) -> Iterator[None]:
    """Print the name of a long operation and, on a terminal, the time since its start."""
    with ProgressBars(console) as bars:
        bars.say(doing)
        bars.add_task("" if console.is_terminal else doing, total=None)
        try:
            yield
        except KeyboardInterrupt as stop:
            stop.add_note(SAID)
            bars.say(f"interrupted while {doing}")
            raise
