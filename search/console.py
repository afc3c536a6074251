"""Progress display of long operations, and their end by a signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


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


def progress_bars(
    console: Console, count: ProgressColumn | None = None, left: ProgressColumn | None = None
) -> Progress:
    """Return the progress display of all commands; it shows nothing if the output is piped.

    Args:
        count: the column for the completed amount; default: percent.
        left: the column for the remaining time; default: an estimate from the last hour.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(20),
        count or TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        left or TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=3600.0,
    )


@contextmanager
def working(console: Console, doing: str) -> Iterator[None]:
    """Print the name of a long operation and, on a terminal, the time since its start."""
    console.print(doing, highlight=False, soft_wrap=True)
    with progress_bars(console) as progress:
        progress.add_task("", total=None)
        try:
            yield
        except KeyboardInterrupt:
            console.print(f"interrupted while {doing}", highlight=False, soft_wrap=True)
            raise
