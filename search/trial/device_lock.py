"""A lock on a device, so that latency is measured while no other process computes there.

Trials that share a device disturb each other's timings. Therefore a process that computes holds the lock in shared
mode, and one that measures holds it in exclusive mode: the others wait at their next batch boundary, or before the next
layer of any network that they run, also in attacks and scoring.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import finalize

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from search.data.guard import closed

LOOK_S = 0.002
"""Minimum seconds between two checks of a computing process whether another one waits to measure."""


class DeviceLock:
    """A readers-writer lock over the processes of a node, made of two locked files: the lock itself and a gate.

    A computing process holds the lock shared and checks the gate at each batch boundary. A measuring process locks the
    gate, so that the others release the lock and wait, and then locks the lock exclusively. No process waits for
    another lock while it holds the lock, since the owner of that lock may be waiting at the gate; nor for the driver or
    the storage, since all others would wait as long. The locks of a process that dies are released.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = False
        self._looked = 0.0
        folder = Path(tempfile.gettempdir())
        self._gate, self._lock = (
            os.open(folder / f"crucible-{os.getuid()}-{_identity(device)}-{part}", os.O_RDWR | os.O_CREAT)
            for part in ("gate", "lock")
        )
        for file in (self._gate, self._lock):
            finalize(self, os.close, file)

    @contextmanager
    def working(self, doing: str = "trained or judged") -> Iterator[None]:
        """Hold the lock in shared mode; every layer that runs meanwhile is a boundary, and no data can be loaded.

        Args:
            doing: what happens to the model meanwhile (`closed`).

        Raises:
            TrialError: a model's code asked for the data.
        """
        self._enter()
        looking = register_module_forward_pre_hook(lambda *_: self.boundary())
        try:
            with closed(doing):
                yield
        finally:
            looking.remove()
            self._leave()

    def boundary(self) -> None:
        """Let a waiting measurement run first, if there is one."""
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
        """Release the lock while waiting for something else."""
        self._leave()
        try:
            yield
        finally:
            self._enter()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Hold the lock in exclusive mode; no data can be loaded, as in `working`."""
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            with closed("timed"):
                yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            fcntl.flock(self._gate, fcntl.LOCK_UN)

    def _enter(self) -> None:
        fcntl.flock(self._gate, fcntl.LOCK_SH)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        fcntl.flock(self._gate, fcntl.LOCK_UN)
        self._held = True

    def _leave(self) -> None:
        try:
            synchronise(self._device)  # a GPU would still compute its queued work after the release
        finally:
            self._held = False
            fcntl.flock(self._lock, fcntl.LOCK_UN)


def _identity(device: torch.device) -> str:
    """Return an identifier of a device on its node: each GPU has its own lock."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
