"""Measure purification latency: the defended model's time minus the bare classifier's, alone on the device.

Shapes: N images, C channels, H x W pixels, P values of an image, V levels that values of the clean images have.
"""

from __future__ import annotations

import copy
import platform
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor, nn

from defenses.base import Defended
from search.study.candidate import Images, Latency
from search.trial.device_lock import DeviceLock, synchronise

BATCH = 128
REPEATS = 30
WARM_UP = 3
PATIENCE_S = 20.0
"""Seconds after which a slow model is not repeated further, with at least three repeats and one warm-up."""
DRIFT = 0.2
"""Relative change of the reference kernel's time above which a measurement is repeated."""
TRIES = 3

T = TypeVar("T")
Turn = Mapping[Images, tuple[float, float]]
"""Milliseconds of the bare classifier and of the defended model on the same images, for each kind of images."""


def device_name(device: torch.device) -> str:
    """Return the device on which a latency is measured: the GPU's model, or the CPU's model with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} thread(s)"


def _processor() -> str:
    """Return the CPU's model, which `platform` does not provide on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or "CPU")


class Unseen:
    """Serves images in turn without end, and never the same one twice.

    One value of each image is moved to another level of the clean images: in each round another value, and each stream
    begins at a random one. About half of the values that are neither the least nor the greatest are moved by one level,
    too. So a model that knows an image, or a part of it, from an attack or from an earlier measurement does not know it
    here, and all values stay those that such images have.

    Args:
        levels_V: the levels, sorted.
    """

    def __init__(self, x_NCHW: Tensor, levels_V: Tensor) -> None:
        self._x_NP, self._shape, self._levels_V = x_NCHW.flatten(1), x_NCHW.shape[1:], levels_V
        self._served = secrets.randbelow(x_NCHW.numel())
        self._chance = torch.Generator().manual_seed(secrets.randbits(63))  # the CPU's: not every device has one

    def take(self, count: int) -> Tensor:
        """Return the next images; there may be more than the stream has."""
        size, values = self._x_NP.shape
        turn_N = torch.arange(self._served, self._served + count, device=self._x_NP.device)
        self._served += count
        x_NP, round_N1 = self._nearby(self._x_NP[turn_N % size]), (turn_N // size)[:, None]
        at_N1, steps_N1 = round_N1 % values, 1 + round_N1 // values
        level_N1 = torch.searchsorted(self._levels_V, x_NP.gather(1, at_N1)) + steps_N1
        x_NP.scatter_(1, at_N1, self._levels_V[level_N1 % len(self._levels_V)])
        return x_NP.unflatten(1, self._shape)

    def _nearby(self, x_NP: Tensor) -> Tensor:
        """Return images with some values one level higher or lower; an attacked value moves by as much as its level."""
        if len(self._levels_V) < 3:
            return x_NP
        draw_NP = torch.randint(4, x_NP.shape, generator=self._chance).to(x_NP.device)
        at_NP = torch.searchsorted(self._levels_V, x_NP).clamp(1, len(self._levels_V) - 2)
        here_NP, there_NP = self._levels_V[at_NP], self._levels_V[at_NP + 2 * (draw_NP % 2) - 1]
        moved_NP = torch.where(here_NP == x_NP, there_NP, x_NP + there_NP - here_NP)
        low, high = self._levels_V[0], self._levels_V[-1]
        inner_NP = (x_NP > low) & (x_NP < high) & (moved_NP > low) & (moved_NP < high)
        return torch.where((draw_NP < 2) & inner_NP, moved_NP, x_NP)


def asked(target: Defended) -> Callable[[Tensor], object]:
    """Return what a user asks of a batch: its classes and, if the defense can reject, which images are accepted."""
    if not target.defense.rejects():
        return classes(target)
    return lambda x_NCHW: (classes(target)(x_NCHW), target.accept(x_NCHW).tolist())


def classes(model: nn.Module) -> Callable[[Tensor], object]:
    """Return what reads the classes of a batch as numbers: a tensor could be one that is computed when it is read."""
    return lambda x_NCHW: model(x_NCHW).argmax(1).tolist()


@torch.no_grad()
def measure(target: Defended, images: Mapping[Images, Tensor], device_lock: DeviceLock) -> Latency:
    """Time a defended model and its bare classifier in turns, with the device lock, at batch 128 and 1.

    Each repeat uses other images. While the reference kernel drifts, the measurement is repeated.

    Args:
        images: x_NCHW of `clean` and of `attacked` images, on the device.

    Returns:
        The latency on the kind of images that took longer.
    """
    target.eval()
    device, levels_V = images["clean"].device, images["clean"].unique()
    streams = {kind: Unseen(x_NCHW, levels_V) for kind, x_NCHW in images.items()}
    # A copy: what the defended model does to its own classifier does not slow the bare one.
    models, a_DD = (classes(copy.deepcopy(target.classifier)), asked(target)), torch.rand(512, 512, device=device)
    attempts = []

    def turn(count: int) -> Turn:
        found: dict[Images, tuple[float, float]] = {}
        for kind, stream in streams.items():
            x_NCHW = stream.take(count)
            bare_ms, defended_ms = (_milliseconds(partial(model, x_NCHW), device) for model in models)
            found[kind] = bare_ms, defended_ms
        return found

    with device_lock.quiet():
        for _ in range(TRIES):
            before = median(_times(lambda: a_DD @ a_DD, device))
            batch, single = (_repeated(partial(turn, count)) for count in (BATCH, 1))
            drift = abs(median(_times(lambda: a_DD @ a_DD, device)) / before - 1)
            attempts.append(_latency(batch, single, drift, device_name(device)))
            if drift <= DRIFT:
                break
    return min(attempts, key=lambda latency: latency.drift)


def _latency(batch: Sequence[Turn], single: Sequence[Turn], drift: float, device: str) -> Latency:
    """Return the latency on the slower kind of images."""
    ms = {kind: _excess([turn[kind] for turn in batch]) for kind in batch[0]}
    kind = max(ms, key=lambda kind: ms[kind])
    single_ms = max(_excess([turn[kind] for turn in single])[0] for kind in single[0])
    return Latency(*ms[kind], single_ms, drift, device, len(batch), kind)


def _excess(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return p50 and p95 of the defended model's times, minus the median of the bare classifier's; never below 0."""
    bare, defended = (sorted(each) for each in zip(*times, strict=True))
    p95 = defended[min(len(defended) - 1, int(0.95 * len(defended)))]
    return max(0.0, median(defended) - median(bare)), max(0.0, p95 - median(bare))


def _times(work: Callable[[], object], device: torch.device) -> list[float]:
    """Return the milliseconds of each repeat of a work."""
    return _repeated(lambda: _milliseconds(work, device))


def _repeated(turn: Callable[[], T]) -> list[T]:
    """Return what each turn returns, after a warm-up."""
    found, begin = list[T](), time.perf_counter()
    while len(found) < WARM_UP + REPEATS:
        found.append(turn())
        if len(found) > 3 and time.perf_counter() - begin > PATIENCE_S:
            break
    return found[min(WARM_UP, len(found) - 3) :]


def _milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of a work, with the device synchronised."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start)
