"""What `data fetch|check|list|add|remove` do, with their progress."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import DownloadColumn

from attacks.confidence import wilson
from search.classifiers import own
from search.console import ProgressBars
from search.data import adding, splits
from search.data.downloads import Progress
from search.data.folders import full
from search.data.registry import data_set_names, find_data_set
from search.data.user_files import left_out
from search.formatting import counted
from spaces.exceptions import InputError


def fetch(datasets: Sequence[str], data_dir: str | None, console: Console) -> None:
    """Fetch data sets with a progress bar."""
    for dataset in datasets:
        find_data_set(dataset, data_dir)
    for dataset in datasets:
        with _bar(dataset, console) as show:
            splits.fetch(dataset, data_dir, show)
        _say(dataset, data_dir, console)


def check(datasets: Sequence[str], data_dir: str | None) -> list[dict[str, Any]]:
    """Return the state of data sets; of all data sets if `datasets` is empty."""
    return [vars(splits.check(dataset, data_dir)) for dataset in datasets or data_set_names(data_dir)]


def add(name: str, paths: Sequence[Path], wishes: adding.Wishes, data_dir: str | None, console: Console) -> None:
    """Add a user's data with a progress bar, and say what has become of them."""
    with _bar(name, console) as show:
        data = adding.add(name, paths, wishes, data_dir, show)
    _say(name, data_dir, console)
    for line in (f"split: {data.split}", _left_out(paths), _judged(name, data_dir), adding.repeated(name, data_dir)):
        if line:
            console.print(line, highlight=False, soft_wrap=True)


def _left_out(paths: Sequence[Path]) -> str:
    """Return which files of a folder were left out; empty if none was."""
    found = left_out(full(paths[0])) if full(paths[0]).is_dir() else []
    if not found:
        return ""
    some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return f"left out: {counted(len(found), 'file')} that are no pictures, or in no class ({some})"


def _judged(name: str, data_dir: str | None) -> str:
    """Return on how many images searches judge, where that is few."""
    judged = splits.sizes(name, data_dir).attackable("white-box")
    low, high = wilson(0.5, judged)
    few = f"warning: searches judge on {judged} of the validation images (the others are kept aside), which leaves an "
    return f"{few}accuracy of 50 % an interval of {100 * low:.0f} to {100 * high:.0f} %" if judged < splits.FEW else ""


def remove(name: str, data_dir: str | None, console: Console) -> None:
    """Remove a user's data, unless classifiers were added to them."""
    if held := own.names(name, data_dir):
        raise InputError(
            f"data must have no classifiers when they are removed, but {name} has {', '.join(held)}: "
            f"python launch.py classifier remove {name}/{held[0]}"
        )
    adding.remove(name, data_dir)
    console.print(f"removed {name}; the files from which it was added are untouched", highlight=False)


def _say(dataset: str, data_dir: str | None, console: Console) -> None:
    console.print(f"{dataset}: {splits.check(dataset, data_dir).detail}", highlight=False, soft_wrap=True)


@contextmanager
def _bar(what: str, console: Console) -> Iterator[Progress]:
    """Show a progress bar; yield what moves it."""
    with ProgressBars(console, DownloadColumn()) as progress:
        bar = progress.add_task(what, total=None)

        def show(doing: str, done: int, total: int) -> None:
            progress.update(bar, description=doing, completed=done, total=total or None)

        yield show
        progress.remove_task(bar)
