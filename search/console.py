"""The terminal while something long runs: what goes on, and how it is ended."""

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
    """Take SIGTERM, a batch system's or a cluster's notice to leave, as Ctrl-C; Ray must have set its own before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _as_ctrl_c)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_ctrl_c(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what a script starts with `&`
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def progress_bars(
    console: Console, count: ProgressColumn | None = None, left: ProgressColumn | None = None
) -> Progress:
    """Return the progress display of every command; it shows nothing where the output is piped.

    Args:
        count: the column that says how much is done; else percent.
        left: the column that says how long it will take still; else an estimate from the last hour.
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
    """Say what takes minutes and, on a terminal, for how long it has been going on."""
    console.print(doing, highlight=False, soft_wrap=True)
    with progress_bars(console) as progress:
        progress.add_task("", total=None)
        try:
            yield
        except KeyboardInterrupt:
            console.print(f"interrupted while {doing}", highlight=False, soft_wrap=True)
            raise
