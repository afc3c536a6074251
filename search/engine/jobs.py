"""The workers of a final run, each with one piece of it: under Ray, or one after the other in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from search.console import terminable
from search.study.study import Study

Tell = Callable[[str, float], None]
"""Hears what is being done, and what share of the whole piece is done."""
PERIOD_S = 3600.0
"""How far back the time left is reckoned from."""
BEAT_S = 60.0
"""Where the output is piped, each piece says as often what it does."""


@dataclass(frozen=True)
class Job:
    """What a worker is asked for.

    Args:
        label: what its line of the progress begins with.
        what: a function of a module, which gets the study, `more`, and a Tell.
    """

    label: str
    what: Callable[..., Any]
    more: tuple[object, ...]


RunJobs = Callable[[str, Sequence[Job]], list[Any]]
"""Does pieces of work under a title, and returns what each found."""


@contextmanager
def job_runner(study: Study, *, debug: bool, concurrent: int | None, console: Console) -> Iterator[RunJobs]:
    """Yield who works.

    Args:
        debug: this process, without Ray.
        concurrent: pieces at once; else what the cluster holds.

    Raises:
        InputError: the cluster does not hold what the study asks for a trial.
    """
    try:
        if debug:
            with terminable():
                yield lambda title, pieces: _in_process(study, title, pieces, console)
            return
        from search.engine.cluster import joined  # Ray takes a second to import

        with joined(study) as resources, terminable():
            yield lambda title, pieces: _under_ray(study, resources, title, pieces, console, concurrent)
    except KeyboardInterrupt:
        console.print("interrupted; what is finished is kept: the same command goes on", highlight=False)
        raise


class Board:
    """How far each piece is: bars on a terminal; lines where the output is piped."""

    def __init__(self, title: str, pieces: Sequence[Job], console: Console) -> None:
        self.title, self.pieces, self.console = title, pieces, console
        self._shares = [0.0] * len(pieces)
        self._said = [time.monotonic()] * len(pieces)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self.progress = Progress(
            *columns,
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=PERIOD_S,
        )
        self._whole = self.progress.add_task(title, total=len(pieces))
        self._bars = [self.progress.add_task(f"  {piece.label}", total=1.0, visible=False) for piece in pieces]

    def hear(self, place: int, doing: str, share: float) -> None:
        self._shares[place] = share
        line = f"  {self.pieces[place].label}: {doing}"
        self.progress.update(self._bars[place], description=line, completed=share, visible=share < 1)
        self.progress.update(self._whole, completed=sum(self._shares))
        if not self.console.is_terminal and time.monotonic() - self._said[place] >= BEAT_S:
            self._say(f"{line.strip()}, {100 * share:.0f} %")
            self._said[place] = time.monotonic()

    def done(self, place: int) -> None:
        self.hear(place, "done", 1.0)
        ended = sum(share >= 1 for share in self._shares)
        self._say(f"{self.pieces[place].label} is done, {ended} of {len(self.pieces)}")

    def _say(self, line: str) -> None:
        self.console.print(f"{self.title}: {line}", highlight=False, soft_wrap=True)


def _in_process(study: Study, title: str, pieces: Sequence[Job], console: Console) -> list[Any]:
    board, found = Board(title, pieces, console), []
    with board.progress:
        for place, piece in enumerate(pieces):
            found.append(piece.what(study, *piece.more, lambda doing, share, at=place: board.hear(at, doing, share)))
            board.done(place)
    return found


def _under_ray(
    study: Study, resources: Any, title: str, pieces: Sequence[Job], console: Console, concurrent: int | None
) -> list[Any]:
    import ray
    from ray.util.queue import Queue

    from search.engine.cluster import at_work
    from search.engine.controller import RESTARTS

    remote: Any = ray.remote(num_cpus=resources.cpu, num_gpus=resources.gpu, max_retries=RESTARTS)(at_work)
    queue, board = Queue(actor_options={"num_cpus": 0}), Board(title, pieces, console)
    left, running, found = list(enumerate(pieces)), dict[Any, int](), dict[int, Any]()
    failed: Exception | None = None
    with board.progress:
        while left or running:
            while left and len(running) < (concurrent or len(pieces)):
                place, piece = left.pop(0)
                running[remote.remote(study, resources, piece.what, *piece.more, Wire(queue, place))] = place
            ready, _ = ray.wait(list(running), timeout=0.5)
            for said in queue.get_nowait_batch(queue.qsize()):
                board.hear(*said)
            for one in ready:
                place = running.pop(one)
                try:
                    found[place] = ray.get(one)
                except Exception as error:  # the others keep what they are at
                    failed, left = failed or error, []
                    continue
                board.done(place)
    queue.shutdown()
    if failed is not None:
        raise failed
    return [found[place] for place in range(len(pieces))]


class Wire:
    """A Tell of a worker of Ray: it waits for nobody."""

    def __init__(self, queue: Any, place: int) -> None:
        self.queue, self.place = queue, place

    def __call__(self, doing: str, share: float) -> None:
        self.queue.actor.put_nowait.remote((self.place, doing, share))
