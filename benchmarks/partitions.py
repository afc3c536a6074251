"""Searches on three machines whose network or head fails while they train: what is lost, doubled or done again.

    python -m benchmarks.partitions                      every fault, one search each
    python -m benchmarks.partitions cut-20s head-paused  some of them

The machines are network namespaces with a real Ray cluster across them (`benchmarks/machines.py`; root alone may make
them): the driver and Ray's head on the first, one CPU for trainings on each other, one folder for results. If anything
is lost, doubled or trained again, or still runs at the end, it ends with an error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.fault_injection import ROOT, SEARCH, below, fits, rows, wait_for
from benchmarks.machines import CUT, WHOLE, Link, Machines, lacking, machines

PORT = 6379
WORKERS = ("one", "two")


class Cluster:
    """A Ray cluster across three machines: `head` without trainings, `one` and `two`.

    Args:
        folder: for the files of Ray; its path must be short, because it contains sockets.
    """

    def __init__(self, folder: Path, made: Machines) -> None:
        self.folder, self.machines = folder, made
        self.environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self.address = f"{made.address('head')}:{PORT}"
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.clocks: dict[str, dict[str, str]] = {}
        self._start("head", "--head", f"--port={PORT}", "--include-dashboard=false", "--no-monitor", "--num-cpus=0")
        for name in WORKERS:
            self.join(name)

    def mend(self) -> None:
        """Make both workers' machines whole; one whose node has ended, or whose clock is wrong, gets a new one."""
        for name in WORKERS:
            self.machines.set_link(name, WHOLE)
            if self.clocks.pop(name, None) or self.nodes[name].poll() is not None:
                self.join(name)

    def join(self, name: str) -> None:
        """Start a worker's machine anew."""
        self.machines.kill(name)
        self._start(name, f"--address={self.address}", "--num-cpus=1")

    def set_clock(self, name: str, ahead_s: int) -> None:
        """Start a worker's machine anew with a clock that is ahead."""
        library = self.folder / "clock.so"
        source = Path(__file__).with_name("clock.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
        self.clocks[name] = {"LD_PRELOAD": str(library), "CLOCK_AHEAD_S": str(ahead_s)}
        self.join(name)

    def _start(self, name: str, *arguments: str) -> None:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
        command += ["--object-store-memory=100000000", f"--node-ip-address={self.machines.address(name)}"]
        command += arguments
        for _ in range(5):  # on a busy machine a node may take longer than the half minute that Ray gives it
            temp = self.folder / str(len(list(self.folder.iterdir())))
            temp.mkdir()
            # A device lock of its own, as on a machine of its own.
            own = {"TMPDIR": str(temp)} | self.clocks.get(name, {})
            with (temp / "log").open("wb") as log:
                self.nodes[name] = node = self.machines.popen(
                    name, [*command, f"--temp-dir={temp}"], self.environment | own, stdout=log, stderr=log
                )
            while node.poll() is None:
                if "Ray runtime started" in (temp / "log").read_text(encoding="utf-8"):
                    return
                time.sleep(0.2)
        raise AssertionError((temp / "log").read_text(encoding="utf-8")[-3000:])

    def workers(self, name: str) -> list[int]:
        """Return the processes of a machine that run trials."""
        return [pid for pid in self.machines.running(name) if "ray::ImplicitFunc" in command_of(pid)]


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start a cluster, and stop it at the end with all that runs on its machines."""
    folder = Path(tempfile.mkdtemp(prefix="cr-", dir="/tmp"))
    try:
        with machines("head", *WORKERS) as made:
            yield Cluster(folder, made)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def command_of(pid: int) -> str:
    """Return the command line of a process; "" if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def trains(pid: int) -> bool:
    """Return whether a process holds the lock of a fit."""
    with suppress(OSError):
        return any("/locks/fits-" in os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir())
    return False


class Search:
    """A search on the cluster, driven from the head's machine.

    Args:
        storage: a folder, in which its output goes to `log`.
    """

    def __init__(self, at: Cluster, storage: Path, trials: int) -> None:
        self.at, self.storage, self.trials = at, storage, trials
        self.log = storage / "log"
        command = [sys.executable, str(ROOT / "launch.py"), "search", "--name", "ordeal", "--storage", str(storage)]
        command += [*SEARCH, "--trials", str(trials), "--address", at.address]
        with self.log.open("wb") as log:
            self.driver = at.machines.popen("head", command, at.environment, cwd=storage, stdout=log, stderr=log)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def ended(self) -> int:
        return len(re.findall(r"^t\d+ (?:finished|failed)", self.said(), re.MULTILINE))

    def starts(self) -> Counter[str]:
        """Return how often each trial was started."""
        return Counter(re.findall(r"^(t\d+) started", self.said(), re.MULTILINE))

    def wait_for(self, what: Callable[[], object]) -> None:
        wait_for(what, self.driver, self.log)


def cut_20s(search: Search) -> None:
    search.at.machines.set_link("one", CUT)
    time.sleep(20)
    search.at.machines.set_link("one", WHOLE)


def handed_over(search: Search) -> None:
    """Cut a machine off until its trial has started elsewhere; then it is back."""
    cut_for_good(search)
    search.at.machines.set_link("one", WHOLE)


def cut_for_good(search: Search) -> None:
    """Cut a machine off while it trains, and wait until Ray gives it up and its trial has started elsewhere."""
    search.wait_for(lambda: any(map(trains, search.at.workers("one"))))
    search.at.machines.set_link("one", CUT)
    search.wait_for(lambda: " started" in search.said().partition("has been marked dead")[2])


def head_paused(search: Search) -> None:
    _pause(search.at.machines.running("head"))


def ray_paused(search: Search) -> None:
    """Pause the processes of Ray on the head's machine, but not the driver."""
    driver = {search.driver.pid, *(pid for pid, _ in below(search.driver.pid))}
    _pause([pid for pid in search.at.machines.running("head") if pid not in driver])


def _pause(pids: Sequence[int]) -> None:
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(30 * (number == signal.SIGSTOP))


def slow_line(search: Search) -> None:
    search.at.machines.set_link("one", Link(delay_s=0.1, loss=0.05))


def clock_ahead(search: Search) -> None:
    """Replace a machine by one whose clock is an hour ahead, and wait until it trains."""
    search.at.set_clock("one", 3600)
    search.wait_for(lambda: any(map(trains, search.at.workers("one"))))


FAULTS: Mapping[str, Callable[[Search], None]] = {
    "cut-20s": cut_20s,
    "slow-line": slow_line,
    "head-paused": head_paused,
    "ray-paused": ray_paused,
    "handed-over": handed_over,
    "cut-for-good": cut_for_good,
    "clock-ahead": clock_ahead,
}


def ordeal(at: Cluster, storage: Path, fault: str, trials: int) -> dict[str, Any]:
    """Run a search with one fault, which comes after its first training, and return times and counts.

    Raises:
        AssertionError: something was lost, doubled or trained again, or still runs.
    """
    at.mend()
    begin, search = time.monotonic(), Search(at, storage, trials)
    search.wait_for(lambda: search.ended() and at.workers("one"))
    kept, trained = rows(storage / "ordeal"), fits(storage)
    times = [time.monotonic() - begin]
    before = search.ended()
    FAULTS[fault](search)
    times.append(time.monotonic() - begin)
    assert search.driver.wait(1800) == 0, search.said()[-5000:]
    times.append(time.monotonic() - begin)
    for name in WORKERS:  # a machine that is still cut off keeps its worker, which waits, until it hears of the cluster
        at.machines.set_link(name, WHOLE)
    until = time.monotonic() + 300
    while left := [pid for name in WORKERS for pid in at.workers(name)]:
        assert time.monotonic() < until, f"{left} still run trials, five minutes after the search's end"
        time.sleep(0.5)
    times.append(time.monotonic() - begin)
    names = ("fault at s", "mended at s", "search ended at s", "last worker ended at s")
    took = dict(zip(names, map(round, times), strict=True))
    return {"fault": fault, "trainings before": before, **took, **unharmed(search, kept, trained)}


def unharmed(search: Search, kept: Mapping[str, dict[str, str]], trained: Mapping[str, int]) -> dict[str, Any]:
    """Check a finished search against what it had before a fault, and return counts.

    Args:
        kept, trained: its `rows` and `fits` at the fault.

    Raises:
        AssertionError: something was lost, doubled or trained again, or the driver's last lines are false.
    """
    storage, trials, said = search.storage, search.trials, search.said()
    after, again = rows(storage / "ordeal"), fits(storage)
    command = [sys.executable, str(ROOT / "launch.py"), "status", "ordeal", "--json", "--storage", str(storage)]
    state = json.loads(subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout)
    told = {key: state[key] for key in ("finished", "pruned", "failed", "running", "interrupted")}
    assert told == {"finished": trials, "pruned": 0, "failed": 0, "running": 0, "interrupted": 0}, told
    assert kept.items() <= after.items(), "a candidate was lost, or its figures changed"
    assert trained.items() <= again.items(), "a finished training was done again"
    assert len(again) == trials and len(after) == state["candidates"] == 2 * trials, (len(again), len(after))
    epochs = Counter(re.findall(r"^(t\d+ epoch \d+)", said, re.MULTILINE))
    assert max(epochs.values()) == 1, "an epoch that had been kept was trained again"
    exported = re.findall(r"^export +python .* --candidate (\S+)", said, re.MULTILINE)
    best = [state["best"]["candidate"]] if state["best"] else []
    assert exported == best and after.keys() >= {*best}, f"the last line is not of the best, {best}: {said[-500:]}"
    return {"trainings": trials, "candidates": len(after), "started again": search.starts().total() - trials}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", help=f"which: {', '.join(FAULTS)}; default: all")
    parser.add_argument("--trials", type=int, default=8, help="trainings of each search")
    given = parser.parse_args()
    if unknown := set(given.faults) - FAULTS.keys():
        parser.error(f"a fault must be one of {', '.join(FAULTS)}, but is {', '.join(sorted(unknown))}")
    if why := lacking():
        parser.error(why)
    with cluster() as at:
        for fault in given.faults or FAULTS:
            with tempfile.TemporaryDirectory() as storage:
                print(json.dumps(ordeal(at, Path(storage), fault, given.trials)), flush=True)


if __name__ == "__main__":
    main()
