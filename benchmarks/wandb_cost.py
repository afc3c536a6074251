"""What a search's W&B runs cost offline: a run a training and a run a candidate, or a table of candidates instead.

    python -m benchmarks.wandb_cost                 0, 1, 500 and 5,000 candidates: eight minutes on two busy cores
    python -m benchmarks.wandb_cost --candidates 0 500

Made-up trainings of 50 candidates each are logged by the tracker and the real wandb, at once, each row in a process of
its own. `table` logs the candidates of a training as a table in the training's run instead.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import wandb

from benchmarks.simulated import scored, simulated, undefended
from search.study.callbacks import State
from search.study.candidate import Candidate, Proposal
from search.tracking import wandb_panels
from search.tracking.wandb_tracker import WandbTracker
from spaces.space import Params

EACH = 50
"""Candidates of a training."""


class Tabled(WandbTracker):
    """Logs no run of a candidate, but a table in the run of its training."""

    def trial_ended(
        self, trial: Proposal, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        table = partial(wandb_panels.show_table, "candidates", self._study, tuple(candidates))
        self._writer.write(trial.name, table)
        super().trial_ended(trial, state, candidates, picture, reason)

    def _log_candidates(self, ended: object, pictures: object) -> None:
        """Log none."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What logging took: CPU seconds of the driver and of wandb's own processes, and what lies on the disk after."""

    candidates: int
    way: str
    wall_s: float
    driver_s: float
    wandb_s: float
    files: int
    disk_mib: float


WAYS = {"runs": WandbTracker, "table": Tabled}


def cost(way: str, candidates: int) -> Cost:
    """Log a search with so many candidates, and return what it cost."""
    with tempfile.TemporaryDirectory() as storage:
        study = simulated(Path(storage), system_metrics=False)
        study.folder.mkdir()
        space, rng = study.resolved.space, np.random.default_rng(0)
        begun, before = time.perf_counter(), _cpu()
        tracker = WAYS[way]("offline", study.folder, print)
        tracker.search_started(study, undefended(study))
        every: list[Candidate] = []
        for start in range(0, candidates, EACH):
            params = space.drawn(rng)
            trial = Proposal(f"t{start // EACH:03d}", params)
            sigmas = range(start, min(start + EACH, candidates))
            settings = [Params(params.train, {"sigma_eps": float(sigma)}) for sigma in sigmas]
            found = [scored(setting, f"{start:08d}") for setting in settings]
            tracker.trial_started(trial)
            tracker.trial_ended(trial, "finished", found, None, "")
            every += found
        tracker.search_ended("finished", every)
        tracker.close()
        wall_s = time.perf_counter() - begun
        wandb.teardown()  # only now is the time of wandb's own processes known
        driver_s, wandb_s = (after - earlier for after, earlier in zip(_cpu(), before, strict=True))
        inside = [path for path in (study.folder / "wandb").rglob("*") if not path.is_symlink()]
        disk = sum(path.stat().st_blocks * 512 for path in inside) / 2**20
        files = sum(path.is_file() for path in inside)
    return Cost(
        candidates=candidates, way=way, wall_s=wall_s, driver_s=driver_s, wandb_s=wandb_s, files=files, disk_mib=disk
    )


def _cpu() -> tuple[float, float]:
    """Return the CPU seconds of this process, and of its ended children."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime


def alone(way: str, candidates: int) -> Cost:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(cost, way, candidates).result()


def table(rows: Sequence[Cost]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| candidates | way | s | driver, CPU s | wandb, CPU s | files | MiB on disk |", "| --- " * 7 + "|"]
    for row in rows:
        seconds = f"{row.wall_s:.1f} | {row.driver_s:.1f} | {row.wandb_s:.1f}"
        lines.append(f"| {row.candidates:,} | {row.way} | {seconds} | {row.files:,} | {row.disk_mib:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", nargs="+", type=int, default=[0, 1, 500, 5000])
    args = parser.parse_args()
    print(table([alone(way, candidates) for candidates in args.candidates for way in WAYS]))


if __name__ == "__main__":
    main()
