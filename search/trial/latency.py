"""Measure purification latency while no other process computes on the device."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from defenses.base import Defense
from search.study.candidate import Latency
from search.trial.device_lock import DeviceLock, synchronise

REPEATS = 30
WARM_UP = 3
PATIENCE_S = 20.0
"""Seconds after which a slow purifier is not repeated further, with at least three repeats and one warm-up."""
DRIFT = 0.2
"""Relative change of the reference kernel's time above which a measurement is repeated."""
TRIES = 3


def device_name(device: torch.device) -> str:
    """Return the device on which a latency is measured: the GPU's model, or the CPU's model with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} thread(s)"


def _processor() -> str:
    """Return the CPU's model, which `platform` does not provide on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or "CPU")


@torch.no_grad()
def measure(defense: Defense, device_lock: DeviceLock, device: torch.device) -> Latency:
    """Time `purify` and `accept` at batch 128 and 1, with the device lock; repeat while the reference kernel drifts."""
    shape = defense.shape
    x_NCHW = torch.rand(128, shape.channels, shape.height, shape.width, device=device)
    a_DD = torch.rand(512, 512, device=device)
    attempts = []
    defense.eval()

    def work(x_NCHW: Tensor) -> None:
        defense.purify(x_NCHW)
        defense.accept(x_NCHW)

    with device_lock.quiet():
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
    """Return the milliseconds of each repeat after a warm-up, with the device synchronised."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < WARM_UP + REPEATS:
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        times.append(1e3 * (time.perf_counter() - start))
        if len(times) > 3 and time.perf_counter() - begin > PATIENCE_S:
            break
    return times[min(WARM_UP, len(times) - 3) :]
