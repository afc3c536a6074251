"""Run the jobs of a final run on workers: under Ray, or one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from search.console import SAID, ProgressBars, terminable
from search.study.study import Study

Tell = Callable[[str, float], None]
"""Called with what is being done, and the fraction of the job that is done."""


@dataclass(frozen=True)
class Job:
    """One job for a worker.

    Args:
        label: the beginning of its progress line.
        what: a module-level function, called with the study, `more` and a Tell.
    """

    label: str
    what: Callable[..., Any]
    more: tuple[object, ...]


RunJobs = Callable[[str, Sequence[Job]], list[Any]]
"""Runs jobs under a title, and returns the result of each."""


@contextmanager
def job_runner(study: Study, *, debug: bool, concurrent: int | None, console: Console) -> Iterator[RunJobs]:
    """Yield the function that runs jobs.

    Args:
        debug: run them in this process, without Ray.
        concurrent: jobs at once; else as many as the cluster can run.

    Raises:
        InputError: the cluster does not have the resources of one trial of the study.
    """
    try:
        if debug:
            with terminable():
                yield lambda title, jobs: _in_process(study, title, jobs, console)
            return
        from search.engine.cluster import joined  # Ray takes a second to import

        with joined(study) as resources, terminable():
            yield lambda title, jobs: _under_ray(study, resources, title, jobs, console, concurrent)
    except KeyboardInterrupt as stop:
        stop.add_note(SAID)
        console.print("interrupted; what is finished is kept: the same command goes on", highlight=False)
        raise


class JobsDisplay:
    """Shows the progress of each job."""

    def __init__(self, title: str, jobs: Sequence[Job], console: Console) -> None:
        self.title, self.jobs = title, jobs
        self._shares = [0.0] * len(jobs)
        self._ended = set[int]()
        self.progress = ProgressBars(console)
        self._whole = self.progress.add_task(title, total=len(jobs))
        self._bars = [self.progress.add_task(f"  {job.label}", total=1.0, visible=False) for job in jobs]

    def hear(self, place: int, doing: str, share: float) -> None:
        """Show what a job does; what a worker told before its end may come after it."""
        if place in self._ended:
            return
        self._shares[place] = share
        line = f"  {self.jobs[place].label}: {doing}"
        self.progress.update(self._bars[place], description=line, completed=share, visible=share < 1)
        self.progress.update(self._whole, completed=sum(self._shares))

    def done(self, place: int) -> None:
        self.hear(place, "done", 1.0)
        self._ended.add(place)  # a share of 1 is no end: the last epoch has it, and the rest of the job comes after it
        self.progress.say(f"{self.title}: {self.jobs[place].label} is done, {len(self._ended)} of {len(self.jobs)}")


def _in_process(study: Study, title: str, jobs: Sequence[Job], console: Console) -> list[Any]:
    display, found = JobsDisplay(title, jobs, console), []
    with display.progress:
        for place, job in enumerate(jobs):
            found.append(job.what(study, *job.more, lambda doing, share, at=place: display.hear(at, doing, share)))
            display.done(place)
    return found


def _under_ray(
    study: Study, resources: Any, title: str, jobs: Sequence[Job], console: Console, concurrent: int | None
) -> list[Any]:
    import ray
    from ray.util.queue import Queue

    from search.engine.cluster import at_work
    from search.engine.controller import RESTARTS

    remote: Any = ray.remote(num_cpus=resources.cpu, num_gpus=resources.gpu, max_retries=RESTARTS)(at_work)
    queue, display = Queue(actor_options={"num_cpus": 0}), JobsDisplay(title, jobs, console)
    left, running, found = list(enumerate(jobs)), dict[Any, int](), dict[int, Any]()
    failed: Exception | None = None
    with display.progress:
        while left or running:
            while left and len(running) < (concurrent or len(jobs)):
                place, job = left.pop(0)
                running[remote.remote(study, resources, job.what, *job.more, RemoteTell(queue, place))] = place
            ready, _ = ray.wait(list(running), timeout=0.5)
            for said in queue.get_nowait_batch(queue.qsize()):
                display.hear(*said)
            for one in ready:
                place = running.pop(one)
                try:
                    found[place] = ray.get(one)
                except Exception as error:  # the running jobs are still completed
                    failed, left = failed or error, []
                    continue
                display.done(place)
    queue.shutdown()
    if failed is not None:
        raise failed
    return [found[place] for place in range(len(jobs))]


class RemoteTell:
    """A Tell for a Ray worker, which does not block."""

    def __init__(self, queue: Any, place: int) -> None:
        self.queue, self.place = queue, place

    def __call__(self, doing: str, share: float) -> None:
        self.queue.actor.put_nowait.remote((self.place, doing, share))
