"""The progress of jobs: what is done is counted by what has ended."""

from __future__ import annotations

import io

from rich.console import Console

from search.engine.jobs import Job, JobsDisplay


def test_a_job_counts_as_done_when_it_has_ended_and_stays_so() -> None:
    console = Console(file=(said := io.StringIO()), width=200)
    display = JobsDisplay("training", [Job(f"seed {seed}", print, ()) for seed in (1, 2, 3)], console)
    display.hear(0, "epoch 9/9", 1.0)
    display.hear(1, "epoch 9/9", 1.0)
    display.done(0)
    display.hear(0, "epoch 8/9", 0.9)  # told before its end, and heard after it
    display.done(1)
    display.done(2)
    assert said.getvalue().splitlines() == [f"training: seed {n} is done, {n} of 3" for n in (1, 2, 3)]
