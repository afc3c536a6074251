"""Purification latency on a quiet device.

Trials that share a device spoil each other's timings. So whoever computes holds the lane together with the others,
and whoever measures holds it alone: the others wait at their next batch boundary, or before a layer of whatever network
they run, attacks and scoring included.
"""

from __future__ import annotations

import fcntl
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from defenses.base import Defense
from search.study.candidate import Latency

REPEATS = 30
WARM_UP = 3
PATIENCE_S = 20.0
"""Seconds after which a slow purifier is repeated no more, down to three times and one warm-up."""
DRIFT = 0.2
"""How far the reference kernel may move, as a fraction, before a measurement is repeated."""
TRIES = 3
LOOK_S = 0.002
"""How often, at most, a process that computes looks whether another wants to measure, in seconds."""


class Lane:
    """A readers-writer lock over the processes of a node, by two locked files: the gate and the lane.

    A process that computes holds the lane shared and looks at the gate at each batch boundary. One that measures
    closes the gate, so that the others let go and wait, and takes the lane alone. Nobody waits for another lock
    while holding the lane, since whoever has that lock may be waiting at the gate; nor for the driver or the storage,
    since all the others would wait as long. A process that dies lets go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = False
        self._looked = 0.0
        folder = Path(tempfile.gettempdir())
        self._gate, self._lane = (
            os.open(folder / f"crucible-{os.getuid()}-{_identity(device)}-{part}", os.O_RDWR | os.O_CREAT)
            for part in ("gate", "lane")
        )

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the lane together with the others; every layer that is run meanwhile is a boundary."""
        self._enter()
        looking = register_module_forward_pre_hook(lambda *_: self.boundary())
        try:
            yield
        finally:
            looking.remove()
            self._leave()

    def boundary(self) -> None:
        """Let a measurement pass, if one waits."""
        if not self._held or time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        try:
            fcntl.flock(self._gate, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(self._gate, fcntl.LOCK_UN)
        except BlockingIOError:
            self._leave()
            self._enter()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let go of the lane while waiting for something else."""
        self._leave()
        try:
            yield
        finally:
            self._enter()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Hold the lane alone."""
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._lane, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(self._lane, fcntl.LOCK_UN)
            fcntl.flock(self._gate, fcntl.LOCK_UN)

    def _enter(self) -> None:
        fcntl.flock(self._gate, fcntl.LOCK_SH)
        fcntl.flock(self._lane, fcntl.LOCK_SH)
        fcntl.flock(self._gate, fcntl.LOCK_UN)
        self._held = True

    def _leave(self) -> None:
        try:
            _synchronise(self._device)  # what a GPU was given it computes even when nobody waits for it
        finally:
            self._held = False
            fcntl.flock(self._lane, fcntl.LOCK_UN)


def _identity(device: torch.device) -> str:
    """Return what tells a device from the others of its node: each GPU has a lane of its own."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type


def device_name(device: torch.device) -> str:
    """Return what a latency is measured on: the GPU's model, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} thread(s)"


def _processor() -> str:
    """Return the CPU's model, which `platform` does not know on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or "CPU")


@torch.no_grad()
def measure(defense: Defense, lane: Lane, device: torch.device) -> Latency:
    """Time `purify` and `accept` at batch 128 and 1, alone on the device; repeat while the reference kernel drifts."""
    shape = defense.shape
    x_NCHW = torch.rand(128, shape.channels, shape.height, shape.width, device=device)
    a_DD = torch.rand(512, 512, device=device)
    attempts = []
    defense.eval()

    def work(x_NCHW: Tensor) -> None:
        defense.purify(x_NCHW)
        defense.accept(x_NCHW)

    with lane.quiet():
        for _ in range(TRIES):
            before = median(_times(lambda: a_DD @ a_DD, device))
            batch = sorted(_times(lambda: work(x_NCHW), device))
            single = _times(lambda: work(x_NCHW[:1]), device)
            drift = abs(median(_times(lambda: a_DD @ a_DD, device)) / before - 1)
            p95 = batch[min(len(batch) - 1, int(0.95 * len(batch)))]
            attempts.append(Latency(median(batch), p95, median(single), drift, device_name(device), len(batch)))
            if drift <= DRIFT:
                break
    return min(attempts, key=lambda latency: latency.drift)


def _times(work: Callable[[], object], device: torch.device) -> list[float]:
    """Return the milliseconds of each repeat, after a warm-up, the device synchronised."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < WARM_UP + REPEATS:
        _synchronise(device)
        start = time.perf_counter()
        work()
        _synchronise(device)
        times.append(1e3 * (time.perf_counter() - start))
        if len(times) > 3 and time.perf_counter() - begin > PATIENCE_S:
            break
    return times[min(WARM_UP, len(times) - 3) :]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
