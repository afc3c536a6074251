"""The effect of other trials on the same device on a measured latency, with the device lock and without it.

    python -m benchmarks.latency_under_load   PuVAE on the GPU if there is one, else on the CPU: minutes
    python -m benchmarks.latency_under_load --neighbours 1 2 4 8 --rounds 9
    python -m benchmarks.latency_under_load --json                the rows as JSON, one per line

Neighbours are separate processes, like trials: each trains a PuVAE and attacks it in a loop. In a round the purifier
is measured alone, then beside each number of neighbours without the lock and with it; a row has the median over the
rounds. On a machine with other users, the latency alone is disturbed too: the lock only holds back our own trials.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from statistics import median

import torch
from torch import Tensor

from attacks.evaluation import evaluate
from attacks.suites import SUITES, craft_oblivious
from attacks.threat import ThreatModel
from defenses.base import Batches, Defended, Shape
from defenses.puvae import PuVAE
from search.classifiers.architectures import ARCHITECTURES
from search.study.candidate import Images
from search.trial.device_lock import DeviceLock
from search.trial.latency import device_name, measure

SHAPE = Shape(1, 28, 28, 10)
KNOBS = {"conv_maps": 8, "decoder_maps": 8, "dense": 128, "latent": 16, "batch_size": 32, "epochs": 1}
IMAGES = 64
STOP = -1


@dataclass(frozen=True, kw_only=True)
class Row:
    """The purifier's latency beside neighbours.

    Args:
        ms_p50: latency of a batch of 128 images; the median over the rounds.
        ratio: latency divided by the latency alone; the median over the rounds.
        worst: the largest ratio.
        seconds: duration of a measurement, including the wait for the lock; the median over the rounds.
    """

    neighbours: int
    device_lock: bool
    ms_p50: float
    ratio: float
    worst: float
    seconds: float


class Neighbour:
    """A small version of a trial: it trains a defense and attacks it."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.x_NCHW = torch.rand(IMAGES, 1, 28, 28, device=device)
        self.y_N = torch.randint(10, (IMAGES,), device=device)
        self.classifier = ARCHITECTURES["A"].build(SHAPE).to(device).eval().requires_grad_(False)
        self.defense = PuVAE(KNOBS, {}, SHAPE).to(device)
        self.threat = ThreatModel("Linf", 0.3, "white-box")
        self.suite = SUITES["quick"]
        images = self.x_NCHW, self.y_N
        self.oblivious = craft_oblivious(self.suite, self.classifier, *images, self.threat, 0)

    def work(self) -> None:
        batches = Batches(self.x_NCHW, self.y_N, epochs=1, batch_size=32, seed=0)
        for _ in self.defense.train().requires_grad_(True).fit(batches, self.classifier):
            pass
        target = Defended(self.defense.eval().requires_grad_(False), self.classifier)
        evaluate(self.suite, target, self.x_NCHW, self.y_N, self.threat, oblivious=self.oblivious, seed=0)


def live(rank: int, busy: Synchronized[int], laned: Synchronized[int], done: Synchronized[int], kind: str) -> None:
    """Work while `rank` is below `busy`, holding the device lock if `laned`, until `busy` is STOP."""
    torch.set_num_threads(1)
    os.setsid()  # Linux shares cores between sessions, so this one does not slow the next measurement
    device = torch.device(kind)
    device_lock, neighbour = DeviceLock(device), Neighbour(device)
    while busy.value != STOP:
        if rank >= busy.value:
            time.sleep(0.01)
            continue
        with device_lock.working() if laned.value else nullcontext():
            neighbour.work()
        with done.get_lock():
            done.value += 1


def compare(neighbours: Sequence[int], rounds: int, device: torch.device) -> list[Row]:
    """Measure alone and beside each number of neighbours, without the lock and with it."""
    context = get_context("spawn")
    busy, laned, done = (context.Value("i", 0) for _ in range(3))
    rest = busy, laned, done, device.type
    crowd = [context.Process(target=live, args=(rank, *rest), daemon=True) for rank in range(max(neighbours))]
    for process in crowd:
        process.start()
    neighbour, device_lock = Neighbour(device), DeviceLock(device)  # one that only purifies
    target = Defended(neighbour.defense, neighbour.classifier).requires_grad_(False)
    images: dict[Images, Tensor] = {"clean": neighbour.x_NCHW, "attacked": next(iter(neighbour.oblivious.values()))}

    def beside(count: int, held: bool) -> tuple[float, float]:
        busy.value, laned.value, done.value = count, int(held), 0
        while done.value < 2 * count:  # until all neighbours follow the new rule
            if not all(process.is_alive() for process in crowd):
                raise RuntimeError("a neighbour has died")
            time.sleep(0.05)
        start = time.perf_counter()
        return measure(target, images, device_lock).ms_p50, time.perf_counter() - start

    ways = [(count, held) for count in neighbours for held in (False, True)]
    alone, found = [], {way: list[tuple[float, float]]() for way in ways}
    try:
        beside(max(neighbours), False)  # all imports are done when the first round begins
        for _ in range(rounds):
            busy.value = 0
            time.sleep(1)  # let running work finish
            alone.append(beside(0, True))
            for way in ways:
                found[way].append(beside(*way))
    finally:
        busy.value = STOP
        for process in crowd:
            process.join()
    first = Row(neighbours=0, device_lock=True, ms_p50=median(ms for ms, _ in alone), ratio=1.0, worst=1.0, seconds=0.0)
    rows = [first]
    for (count, held), each in found.items():
        ratios = [ms / one for (ms, _), (one, _) in zip(each, alone, strict=True)]
        ms_p50, seconds = (median(column) for column in zip(*each, strict=True))
        kept = {"ms_p50": ms_p50, "seconds": seconds, "ratio": median(ratios), "worst": max(ratios)}
        rows.append(Row(neighbours=count, device_lock=held, **kept))
    return rows


def table(rows: Sequence[Row], device: torch.device) -> str:
    """Return the rows as a Markdown table."""
    lines = [f"{device_name(device)}, load {os.getloadavg()[0]:.1f}", ""]
    lines += ["| neighbours | device lock | p50 ms | of alone | worst | s a measurement |", "| --- " * 6 + "|"]
    for row in rows:
        device_lock = "" if not row.neighbours else "yes" if row.device_lock else "no"
        figures = f"{row.ms_p50:.2f} | {row.ratio:.2f} | {row.worst:.2f} | {row.seconds:.1f}"
        lines.append(f"| {row.neighbours or 'alone'} | {device_lock} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neighbours", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder  # a separate lock: a search here does not wait
        rows = compare(args.neighbours, args.rounds, device)
    print("\n".join(json.dumps(asdict(row)) for row in rows) if args.json else table(rows, device))


if __name__ == "__main__":
    main()
