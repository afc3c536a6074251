"""Searches one after the other for hours, on two real Ray nodes with random faults: what is lost, and what grows.

    python -m benchmarks.soak --hours 8 --storage /tmp/soak

A training is simulated: it sleeps, but takes the lock of its fit, keeps its progress and writes an entry of the store
as a real one does. All else is real: Ray, the journal, candidates.csv, W&B (offline), the display and the report. At
random times a worker or the second node is killed (-9), and a new node joins, or the driver is, and another resumes its
search. Each line is JSON: a fault, the processes' memory and open files, or, at the end, what grew. If anything is
lost, doubled or trained again, it ends with an error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.fault_injection import ROOT, Nodes, below, fits, kill, rows, two_nodes, workers
from benchmarks.simulated import EPOCHS, simulated, sweep, working
from search import api
from search.engine import run
from search.engine.worker import Report
from search.study.candidate import Proposal
from search.study.study import Study

FAULTS = {"worker": 4, "node": 3, "driver": 1}
"""What is killed, and how often of eight times."""
FIELDS = {"threat": "oblivious", "eps": 0.1, "precision": "float32", "cpus_per_trial": 1}
"""Of each study: the threat model of the made-up scores, and a node's only CPU for a training."""
Process = tuple[float, str, int, float, int]
"""The hours since the start, the role, the process's number, its memory in MiB and its open files."""


def execute(study: Study, proposal: Proposal, report: Report, seconds: float) -> dict[str, Any]:
    """Sleep for `seconds` in place of a training that the store lacks, and return made-up candidates."""
    candidates, store = sweep(proposal.params), study.store.expected()
    fit = candidates[0].fit
    with store.lock("fits", fit):
        if store.get("fits", fit) is None:
            curve = (store.load_progress(fit, torch.device("cpu")) or {"curve": []})["curve"]
            for epoch in range(len(curve) + 1, EPOCHS + 1):
                time.sleep(seconds / EPOCHS)
                curve.append(candidates[0].score.attacked_accuracy * epoch / EPOCHS)
                store.save_progress(fit, {"curve": curve})
                report(fit, epoch, {"loss": 1 / epoch, "cheap": curve[-1]})
            store.put("fits", fit, {}, {"curve": curve})
            store.drop_progress(fit)
    curve = store.about("fits", fit)["curve"]
    return {"candidates": [candidate.to_json() for candidate in candidates], "curve": curve, "picture": ""}


def drive(storage: Path, address: str, trials: int, seconds: float) -> None:
    """Run searches one after the other, the unfinished one first, until the storage has a file `stop`."""
    work = replace(working(seconds), execute=partial(execute, seconds=seconds))
    run.run = partial(run.run, work=work)
    for number in count():
        if (storage / "stop").exists():
            return
        name = f"soak-{number:03}"
        if not (storage / name / "report.html").exists():
            study = simulated(storage, name=name, seed=number, trials=trials, address=address, **FIELDS)
            with (storage / f"{name}.log").open("a", encoding="utf-8") as log:
                api.search(study, console=Console(file=log, width=1000, markup=False, emoji=False))


@dataclass
class Soak:
    """A storage with searches, and what it had before each fault.

    Attributes:
        rows: the candidates by search and name.
        fits: the time at which each training was written.
        seen: processes, each minute.
    """

    storage: Path
    rows: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    fits: dict[str, int] = field(default_factory=dict)
    seen: list[Process] = field(default_factory=list)

    def searches(self) -> list[Path]:
        return sorted(path for path in self.storage.glob("soak-*") if path.is_dir())

    def held(self) -> dict[tuple[str, str], dict[str, str]]:
        return {(folder.name, name): row for folder in self.searches() for name, row in rows(folder).items()}

    def keep(self) -> None:
        """Note what a fault must not harm."""
        self.rows, self.fits = self.held(), fits(self.storage)

    def unharmed(self, trials: int) -> dict[str, int]:
        """Check finished searches against what they had at the last fault, and return counts.

        Raises:
            AssertionError: something was lost, doubled or trained again.
        """
        after, again = self.held(), fits(self.storage)
        assert self.rows.items() <= after.items(), "a candidate was lost, or its figures changed"
        assert self.fits.items() <= again.items(), "a finished training was done again"
        assert again.keys() == {row["fit"] for row in after.values()}, "a training has no candidates"
        trained = Counter((search, row["fit"]) for (search, _), row in after.items())
        each = Counter(search for search, _ in trained)
        assert set(each.values()) <= {trials}, f"each search must have {trials} trainings, but {each}"
        for folder in self.searches():
            said = folder.with_suffix(".log").read_text(encoding="utf-8")
            epochs = Counter(re.findall(r"^(t\d+ epoch \d+)", said, re.MULTILINE))
            assert max(epochs.values()) == 1, f"{folder.name}: an epoch that had been kept was trained again"
        return {"searches": len(each), "trainings": len(again), "candidates": len(after)}


def processes(driver: int, nodes: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Yield role and number of the processes of a search: its driver, W&B's, the workers and Ray's own."""
    yield "driver", driver
    yield from (("wandb", pid) for pid, command in below(driver) if "wandb" in command)
    for node in nodes:
        yield from (("worker", pid) for pid in workers(node))
        yield from (
            (name, pid) for pid, command in below(node) for name in ("gcs_server", "raylet/raylet") if name in command
        )


def measured(pid: int) -> tuple[float, int]:
    """Return the memory of a process, in MiB, and the number of its open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))


def growth(seen: Sequence[Process], settled: int = 3) -> dict[str, dict[str, float]]:
    """Return for each role how memory and open files of one process grow an hour, by least squares.

    All processes of a role share one slope, each with a level of its own.

    Args:
        settled: the first measurements of each process that do not count: it imports, and fills its caches.
    """
    grown: dict[str, dict[str, float]] = {}
    for role in dict.fromkeys(each[1] for each in seen):
        by_process: dict[int, list[tuple[float, float, int]]] = {}
        for hours, name, pid, mib, files in seen:
            if name == role:
                by_process.setdefault(pid, []).append((hours, mib, files))
        long = [np.array(each[settled:], dtype=float) for each in by_process.values() if len(each) > settled + 1]
        if long:
            apart = np.concatenate([each - each.mean(axis=0) for each in long])
            mib, files = apart[:, 0] @ apart[:, 1:] / (apart[:, 0] @ apart[:, 0])
            most = np.concatenate(long).max(axis=0)
            figures = {"MiB an hour": mib, "files an hour": files, "most MiB": most[1], "most files": most[2]}
            grown[role] = {name: round(float(value), 2) for name, value in figures.items()}
            grown[role] |= {"processes": len(long), "measurements": len(apart)}
    return grown


def strike(what: str, nodes: Nodes, driver: subprocess.Popen[bytes]) -> None:
    """Kill a worker, the second node (another joins) or the driver."""
    if what == "worker":
        for pid in [pid for node in nodes.running for pid in workers(node.pid)][-1:]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    elif what == "node":
        kill(nodes.running.pop())
        nodes.join()
    else:
        kill(driver)


def soak(
    storage: Path,
    hours: float,
    seed: int,
    *,
    trials: int = 200,
    seconds: float = 4,
    pause: float = 120,
    every: float = 60,
) -> dict[str, Any]:
    """Run searches with faults, print what comes, and return what grew.

    Args:
        trials, seconds: trainings of each search, and seconds of each training.
        pause: mean seconds from one fault to the next.
        every: seconds from one look at the processes to the next.
    """
    storage.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(ROOT)  # workers import this file
    chance, soaked, faults = random.Random(seed), Soak(storage), Counter[str]()
    begin = time.monotonic()
    look, fault = begin + every, begin + pause

    def tell(**what: object) -> None:
        print(json.dumps({"minutes": round((time.monotonic() - begin) / 60, 1), **what}), flush=True)

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.soak", "--drive", nodes.address, "--storage", str(storage)]
        command += ["--trials", str(trials), "--seconds", str(seconds)]
        with (storage / "said").open("ab") as said:
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | nodes.token, stdout=said, stderr=said)

    with two_nodes() as nodes:
        driver = start()
        try:
            while driver.poll() is None:
                now = time.monotonic()
                if now >= look:
                    look += every
                    for role, pid in processes(driver.pid, [node.pid for node in nodes.running]):
                        with suppress(OSError):
                            soaked.seen.append(((now - begin) / 3600, role, pid, *measured(pid)))
                            tell(**dict(zip(("role", "pid", "MiB", "files"), soaked.seen[-1][1:], strict=True)))
                if now >= begin + 3600 * hours:
                    (storage / "stop").touch()
                elif now >= fault:
                    fault = now + chance.expovariate(1 / pause)
                    (what,) = chance.choices([*FAULTS], [*FAULTS.values()])
                    soaked.keep()
                    strike(what, nodes, driver)
                    driver = start() if what == "driver" else driver
                    faults[what] += 1
                    tell(killed=what, candidates=len(soaked.rows))
                time.sleep(0.5)
            assert driver.returncode == 0, (storage / "said").read_text(encoding="utf-8")[-3000:]
        finally:
            kill(driver)
    told = {"killed": dict(faults), **soaked.unharmed(trials), "growth": growth(soaked.seen)}
    tell(**told)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=8, help="after which no new search begins")
    parser.add_argument("--storage", type=Path, required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--trials", type=int, default=200, help="trainings of each search")
    parser.add_argument("--seconds", type=float, default=4, help="of each training")
    parser.add_argument("--pause", type=float, default=120, help="mean seconds from one fault to the next")
    parser.add_argument("--every", type=float, default=60, help="seconds from one look at the processes to the next")
    parser.add_argument("--drive", metavar="ADDRESS", help="be the driver, on a cluster")
    given = parser.parse_args()
    if given.drive:
        drive(given.storage, given.drive, given.trials, given.seconds)
    else:
        more = {name: getattr(given, name) for name in ("trials", "seconds", "pause", "every")}
        soak(given.storage.absolute(), given.hours, given.seed, **more)


if __name__ == "__main__":
    main()
