"""A search on two real Ray nodes that loses a worker, a node and its driver, and is resumed.

    python -m benchmarks.fault_injection                 50 real trainings on digits
    python -m benchmarks.fault_injection --trials 12

After a quarter of the trainings a worker is killed (-9), after half of them a whole node (another one joins), after
three quarters the driver; then `resume`. If anything is lost, doubled or trained again, it ends with an error.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 2
SEARCH = ["--task", "digits/A", "--space", "default", "--method", "random", "--stopping", "none", "--refine", "0"]
SEARCH += ["--knob", "conv_maps=4", "--knob", "decoder_maps=8", "--knob", "dense=64", "--knob", "latent=8"]
SEARCH += [
    "--knob",
    "sigma_eps=0,1",
    "--suite",
    "quick",
    "--eval-images",
    "40",
    "--cheap-images",
    "20",
    "--train-images",
    "300",
]
SEARCH += ["--epochs", str(EPOCHS), "--classifier-epochs", "2", "--wandb", "disabled"]


def below(pid: int) -> Iterator[tuple[int, str]]:
    """Yield the pid and command of every descendant of the process `pid`."""
    children: dict[int, list[int]] = {}
    commands: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(re.sub(r"^.*\) ", "", (entry / "stat").read_text(encoding="utf-8")).split()[1])
            commands[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.name))
    todo = [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            yield child, commands[child]
            todo.append(child)


def workers(pid: int) -> list[int]:
    """Return the descendants of `pid` that run trials."""
    return [child for child, command in below(pid) if "ray::ImplicitFunc" in command]


def kill(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all its descendants with SIGKILL."""
    doomed = [process.pid, *(pid for pid, _ in below(process.pid))]
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


class Nodes:
    """Ray nodes with one CPU each on this machine, started by `ray start`.

    Args:
        folder: for the files of Ray; its path must be short, because it contains sockets.
        python: the interpreter of their environment.
    """

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.folder = folder
        self.python = python
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1"}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.running = [self._start("--head", f"--port={self.port}", "--include-dashboard=false")]
        wait_for(self._answers, self.running[0])
        self.join()

    def join(self) -> None:
        """Add a node."""
        self.running.append(self._start(f"--address={self.address}"))

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        number = len(list(self.folder.iterdir()))
        temp = self.folder / str(number)
        temp.mkdir()
        command = [self.python, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
        command += ["--disable-usage-stats", "--object-store-memory=100000000", f"--temp-dir={temp}"]
        with (temp / "log").open("wb") as log:
            return subprocess.Popen(
                [*command, *arguments],
                cwd=temp,
                env=os.environ | self.token | {"CRUCIBLE_CACHE": str(temp / "cache")},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def two_nodes(python: str = sys.executable) -> Iterator[Nodes]:
    """Start a cluster of two nodes, and stop it at the end."""
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        nodes = Nodes(Path(folder), python)
        try:
            yield nodes
        finally:
            for node in nodes.running:
                kill(node)


def wait_for(what: Callable[[], object], process: subprocess.Popen[Any], log: Path | None = None) -> None:
    """Wait until `what` is true; if the process ends or time runs out, the error includes its log."""
    until = time.monotonic() + 600
    while not what():
        if process.poll() is not None or time.monotonic() > until:
            said = log.read_text(encoding="utf-8") if log else process.stdout.read() if process.stdout else ""
            raise AssertionError(f"it did not come from {process.args!r}\n{said[-5000:]}")
        time.sleep(0.05)


def rows(folder: Path) -> dict[str, dict[str, str]]:
    """Return the complete rows of candidates.csv by candidate; a duplicate candidate is an error.

    They are without the latency, which a quieter measurement at the search's end may replace.
    """
    path = folder / "candidates.csv"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    by_name = {
        row["candidate"]: {column: value for column, value in row.items() if not column.startswith("latency_")}
        for row in found
    }
    assert len(by_name) == len(found), "a candidate stands twice"
    return by_name


def fits(storage: Path) -> dict[str, int]:
    """Return the time at which each finished training was written, in ns."""
    return {
        path.parent.name: path.stat().st_mtime_ns for path in (storage / ".store" / "fits").glob("[!.]*/entry.json")
    }


def fault_injection(storage: Path, trials: int, *more: str) -> dict[str, Any]:
    """Run the search with its faults, and return times and counts.

    Raises:
        AssertionError: something was lost, doubled or trained again.
    """
    begin, folder, log = time.monotonic(), storage / "ordeal", storage / "log"
    launch = [sys.executable, str(ROOT / "launch.py")]
    named = ["--storage", str(storage)]

    def ended() -> int:
        return len(re.findall(r"^t\d+ (?:finished|failed)", log.read_text(encoding="utf-8"), re.MULTILINE))

    with two_nodes() as nodes, log.open("a", encoding="utf-8") as out:

        def due(share: float, at: int) -> bool:
            return ended() >= share * trials and bool(workers(nodes.running[at].pid))

        def start(*arguments: str) -> subprocess.Popen[Any]:
            environment = os.environ | nodes.token
            return subprocess.Popen([*launch, *arguments, *named], env=environment, stdout=out, stderr=out)

        asked = [*SEARCH, "--trials", str(trials), "--address", nodes.address, *more]
        driver = start("search", "--name", "ordeal", *asked)
        took: dict[str, Any] = {"trainings": trials}
        try:
            for share, fault, at in ((0.25, "worker", 0), (0.5, "node", 1), (0.75, "driver", 0)):
                wait_for(partial(due, share, at), driver, log)
                kept, trained = rows(folder), fits(storage)
                if fault == "worker":
                    os.kill(workers(nodes.running[at].pid)[0], signal.SIGKILL)
                elif fault == "node":
                    kill(nodes.running.pop(at))
                    nodes.join()
                else:
                    kill(driver)
                took[f"{fault} killed after"] = {"ended": ended(), "seconds": round(time.monotonic() - begin, 1)}
            driver = start("resume", "ordeal")
            assert driver.wait(1200) == 0, log.read_text(encoding="utf-8")[-3000:]
        finally:
            kill(driver)
    after, again = rows(folder), fits(storage)
    status = subprocess.run(
        [*launch, "status", "ordeal", "--json", *named], capture_output=True, encoding="utf-8", check=True
    ).stdout
    state = json.loads(status)
    told = {key: state[key] for key in ("finished", "pruned", "failed", "running", "interrupted")}
    assert told == {"finished": trials, "pruned": 0, "failed": 0, "running": 0, "interrupted": 0}, told
    assert kept.items() <= after.items(), "a candidate was lost, or its figures changed"
    assert trained.items() <= again.items(), "a finished training was done again"
    assert len(again) == trials and len(after) == state["candidates"] == 2 * trials, (len(again), len(after))
    epochs = Counter(re.findall(r"^(t\d+ epoch \d+)", log.read_text(encoding="utf-8"), re.MULTILINE))
    assert max(epochs.values()) == 1, "an epoch that had been kept was trained again"
    return took | {"candidates": len(after), "seconds": round(time.monotonic() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="trainings")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage:
        print(json.dumps(fault_injection(Path(storage), given.trials), indent=1))


if __name__ == "__main__":
    main()
