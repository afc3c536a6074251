"""A lock on a device, so that a latency is measured while nobody else computes there.

Trials that share a device spoil each other's timings. So whoever computes holds the lock together with the others,
and whoever measures holds it alone: the others wait at their next batch boundary, or before a layer of whatever network
they run, attacks and scoring included.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

LOOK_S = 0.002
"""How often, at most, a process that computes looks whether another wants to measure, in seconds."""


class DeviceLock:
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
            synchronise(self._device)  # what a GPU was given it computes even when nobody waits for it
        finally:
            self._held = False
            fcntl.flock(self._lane, fcntl.LOCK_UN)


def _identity(device: torch.device) -> str:
    """Return what tells a device from the others of its node: each GPU has a lane of its own."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
