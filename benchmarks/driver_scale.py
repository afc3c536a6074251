"""What one driver can hold: a search on 100, 1,000 and 10,000 slots, in virtual time.

    python -m benchmarks.driver_scale                                       10,000 candidates on each: minutes
    python -m benchmarks.driver_scale --slots 1000 --candidates 100000      the long one
    python -m benchmarks.driver_scale --json                                a row as JSON, one per line

Trainings of ten minutes report 20 epochs and six candidates each; the worker of one in a hundred dies. Everything is
the product's own, and Ray Tune's: proposals, early stopping, journal, candidates.csv, W&B (offline), display (piped),
report. Workers alone are made up (`benchmarks/virtual_ray.py`), and with them Ray's own waiting for them, which is not
measured. Figures are CPU time of the driver's process, all threads; `core` is the share of one core that the driver
needs at the pace of its slots.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from wandb.sdk import wandb_setup

from benchmarks.simulated import resident, simulated, working
from benchmarks.virtual_ray import Clock, VirtualActors, virtual_time
from search import session
from search.engine.run import run
from search.report.status import status_of
from search.study.callbacks import Callback
from search.tracking.csv_log import CsvLog
from search.tracking.live_table import LiveTable
from search.tracking.wandb_tracker import WandbTracker

EACH, EPOCHS, SECONDS, DYING = 6, 20, 600.0, 0.01
"""Candidates and epochs of a training, its seconds, and the share of trainings whose worker dies."""
BEHIND = 100
"""W&B's writer may be so many calls behind: at a real pace, it has half a second for each training."""


@dataclass(frozen=True, kw_only=True)
class Driven:
    """What one simulated search cost its driver.

    Args:
        each_ms: CPU milliseconds per training, in each quarter of the search.
        core: the share of one core at the pace of the slots, in the last quarter.
        wandb_ms: CPU milliseconds of wandb's own process per training, beside the driver's.
        driver_mib: memory of the driver at the end of each quarter.
        journal_mib, wandb_runs, wandb_mib: what is on the disk.
        end_s: CPU seconds from the last training's end to the search's.
        report_s, report_mib: CPU seconds of the report, and its size.
        status_s: CPU seconds of `status`, which reads the whole journal.
        deaths: of workers.
    """

    slots: int
    candidates: int
    method: str
    stopping: str
    wandb: str
    each_ms: tuple[float, ...]
    core: float
    wandb_ms: float
    driver_mib: tuple[float, ...]
    journal_mib: float
    wandb_runs: int
    wandb_mib: float
    end_s: float
    report_s: float
    report_mib: float
    status_s: float
    deaths: int


class Meter(Callback):
    """Notes the CPU time and the memory of the driver whenever a training ends, and lets W&B's writer keep up."""

    def __init__(self, actors: VirtualActors, tracker: WandbTracker) -> None:
        self.actors, self.jobs = actors, tracker._writer._jobs
        self.marks: list[tuple[float, float]] = []

    def search_started(self, *told: object) -> None:
        self.mark()

    def trial_ended(self, *told: object) -> None:
        while self.jobs.qsize() > BEHIND:
            time.sleep(0.01)
        self.mark()

    def mark(self) -> None:
        self.marks.append((time.process_time() - self.actors.spent_s, resident()))

    def quarters(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return milliseconds a training, and memory, of each quarter."""
        ends = [(len(self.marks) - 1) * quarter // 4 for quarter in range(5)]
        each = [
            1e3 * (self.marks[last][0] - self.marks[first][0]) / max(1, last - first)
            for first, last in zip(ends, ends[1:], strict=False)
        ]
        return tuple(each), tuple(self.marks[end][1] for end in ends[1:])


def drive(
    storage: Path,
    slots: int,
    candidates: int,
    *,
    method: str = "forecast",
    stopping: str = "none",
    wandb: str = "offline",
) -> Driven:
    """Run one search as `launch.py search` does, with a piped display, and return what it cost its driver."""
    trials = -(-candidates // EACH)
    fields = {"epochs": EPOCHS, "cpus_per_trial": 1.0, "concurrent": slots, "wandb": wandb, "stopping": stopping}
    study, work = simulated(storage, trials=trials, method=method, **fields), working(0.0, EPOCHS)
    actors = VirtualActors(study, work, Clock(), epochs=EPOCHS, seconds=SECONDS, dying=DYING)
    with (storage / "display.txt").open("w", encoding="utf-8") as shown:
        console = Console(file=shown)
        display = LiveTable(console, study, list(study.resolved.space.searched()), EPOCHS, 0)
        tracker = WandbTracker(study.wandb, study.folder, lambda line: print(line, file=shown))
        meter = Meter(actors, tracker)
        with closing(tracker), virtual_time(actors):
            run(study, [CsvLog(study.folder / "candidates.csv", []), tracker, display, meter], work=work)
            core_s = _wandb_s()
        meter_end = time.process_time() - actors.spent_s
    each_ms, driver_mib = meter.quarters()
    report_s, report = _taking(lambda: session.write_report(study))
    status_s, state = _taking(lambda: status_of(study, runs=False))
    runs = [path for path in (study.folder / "wandb").rglob("*.wandb")]
    return Driven(
        slots=slots,
        candidates=state["candidates"],
        method=method,
        stopping=stopping,
        wandb=wandb,
        each_ms=each_ms,
        core=each_ms[-1] / 1e3 * slots / SECONDS,
        wandb_ms=1e3 * core_s / trials,
        driver_mib=driver_mib,
        journal_mib=(study.folder / "study.journal").stat().st_size / 2**20,
        wandb_runs=len(runs),
        wandb_mib=sum(path.stat().st_size for path in runs) / 2**20,
        end_s=meter_end - meter.marks[-1][0],
        report_s=report_s,
        report_mib=report.stat().st_size / 2**20,
        status_s=status_s,
        deaths=actors.deaths,
    )


def _taking(work: Any) -> tuple[float, Any]:
    begin = time.process_time()
    found = work()
    return time.process_time() - begin, found


def _wandb_s() -> float:
    """Return the CPU seconds of wandb's own process; 0 if none was started."""
    service = wandb_setup.singleton()._connection and wandb_setup.singleton().assert_service()._proc
    if not service:
        return 0.0
    spent = Path(f"/proc/{service._process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK")


def alone(*args: Any, **kwargs: Any) -> Driven:
    """Run one search in a separate process, without its output."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_quietly, args, kwargs).result()


def _quietly(args: Any, kwargs: Any) -> Driven:
    with tempfile.TemporaryDirectory() as folder:
        with (
            (Path(folder) / "printed.txt").open("w", encoding="utf-8") as printed,
            redirect_stdout(printed),
            redirect_stderr(printed),
        ):
            return drive(Path(folder), *args, **kwargs)


def table(rows: Sequence[Driven]) -> str:
    """Return the searches as a Markdown table."""
    lines = [
        "| slots | candidates | W&B | CPU ms a training, by quarter | of one core | W&B's process, ms | driver MiB | "
        "journal MiB | runs, MiB | end s | report s, MiB | status s |"
    ]
    lines.append("| --- " * 12 + "|")
    for row in rows:
        each, memory = (", ".join(f"{value:.0f}" for value in column) for column in (row.each_ms, row.driver_mib))
        cells = [f"{row.slots:,}", f"{row.candidates:,}", row.wandb, each, f"{row.core:.2f}", f"{row.wandb_ms:.0f}"]
        cells += [memory, f"{row.journal_mib:.1f}", f"{row.wandb_runs:,}, {row.wandb_mib:.1f}", f"{row.end_s:.0f}"]
        cells += [f"{row.report_s:.1f}, {row.report_mib:.1f}", f"{row.status_s:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", nargs="+", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--candidates", nargs="+", type=int, default=[10_000])
    parser.add_argument("--method", default="forecast")
    parser.add_argument("--stopping", default="none", choices=["halving", "median", "none"])
    parser.add_argument("--wandb", default="offline", choices=["offline", "disabled"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for slots in args.slots:
        for candidates in args.candidates:
            row = alone(slots, candidates, method=args.method, stopping=args.stopping, wandb=args.wandb)
            rows.append(row)
            if args.json:
                print(json.dumps(asdict(row)), flush=True)
    if not args.json:
        print(table(rows))


if __name__ == "__main__":
    main()
