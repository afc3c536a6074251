"""Several machines on this one: network namespaces, joined by a switch in this process that delays and loses frames.

The switch is a thread and not the kernel's `netem`, which many kernels lack. Machines share the disk and the processes'
numbers; of the network each has an address, a loopback and a table of names of its own.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUNSETIFF, TAP_WITHOUT_HEADER = 0x400454CA, 0x1002
NETWORK = "10.77.0"
"""The first three numbers of every machine's address."""
FRAME = 2048
"""Bytes that hold any Ethernet frame of the usual size."""


@dataclass(frozen=True)
class Link:
    """The state of a machine's network cable.

    Args:
        delay_s: seconds that a frame takes, in each direction.
        loss: the fraction of frames that are lost, in each direction.
    """

    delay_s: float = 0.0
    loss: float = 0.0


CUT = Link(loss=1.0)
WHOLE = Link()


class Switch(threading.Thread):
    """Forwards frames between the machines' network devices.

    Args:
        devices: file descriptors of TAP devices; the device at place i has the hardware address `hardware(i)`.

    Attributes:
        links: the cables, which may be replaced at any time.
    """

    def __init__(self, devices: list[int]) -> None:
        super().__init__(daemon=True)
        self.devices = devices
        self.links = [WHOLE] * len(devices)
        self._due: list[tuple[float, int, int, bytes]] = []
        self._order = itertools.count()
        self._random = random.Random(0)
        self._ends = threading.Event()

    def run(self) -> None:
        while not self._ends.is_set():
            wait = max(0.0, self._due[0][0] - time.monotonic()) if self._due else 0.5
            for device in select.select(self.devices, [], [], min(wait, 0.5))[0]:
                self._take(self.devices.index(device))
            while self._due and self._due[0][0] <= time.monotonic():
                _, _, to, frame = heapq.heappop(self._due)
                self._give(to, frame)

    def end(self) -> None:
        self._ends.set()
        self.join()
        for device in self.devices:
            os.close(device)

    def _take(self, source: int) -> None:
        """Take one frame from a device, and deliver it now or later."""
        frame = os.read(self.devices[source], FRAME)
        for to in range(len(self.devices)):
            meant = frame[0] & 1 or frame[:6] == hardware(to)  # all machines', or this one's
            if to == source or not meant:
                continue
            ends = (self.links[source], self.links[to])
            if any(self._random.random() < link.loss for link in ends):
                continue
            delay = sum(link.delay_s for link in ends)
            if delay:
                heapq.heappush(self._due, (time.monotonic() + delay, next(self._order), to, frame))
            else:
                self._give(to, frame)

    def _give(self, to: int, frame: bytes) -> None:
        try:
            os.write(self.devices[to], frame)
        except OSError:
            pass  # a full queue loses frames, as on any network


def hardware(place: int) -> bytes:
    """Return the Ethernet address of the machine at a place."""
    return bytes([2, 0, 0, 0, 0, place + 1])


class Machines:
    """Machines with names, which resolve to their addresses on each of them."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self._spaces = {name: f"crucible-{os.getpid()}-{name}" for name in names}
        self.switch = Switch([_device(f"cr{os.getpid()}.{place}") for place in range(len(names))])
        hosts = "127.0.0.1 localhost\n" + "".join(f"{self.address(name)} {name}\n" for name in names)
        for place, name in enumerate(names):
            space, device = self._spaces[name], f"cr{os.getpid()}.{place}"
            folder = Path("/etc/netns", space)  # `ip netns exec` lays its files over those in /etc
            folder.mkdir(parents=True)
            itself = f"{self.address(name)} {socket.gethostname()}\n"
            (folder / "hosts").write_text(hosts + itself, encoding="utf-8")
            (folder / "resolv.conf").touch()
            _ip("netns", "add", space)
            _ip("link", "set", device, "netns", space, "name", "eth0", "address", hardware(place).hex(":"))
            inside = ("-n", space)
            _ip(*inside, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            for loop in ("lo", "eth0"):
                _ip(*inside, "link", "set", loop, "up")
            _ip(*inside, "route", "add", "default", "dev", "eth0")  # by which Ray finds its own address
        self.switch.start()

    def address(self, name: str) -> str:
        return f"{NETWORK}.{self.names.index(name) + 1}"

    def set_link(self, name: str, link: Link) -> None:
        """Replace a machine's cable."""
        self.switch.links[self.names.index(name)] = link

    def popen(self, name: str, command: list[str], env: Mapping[str, str], **more: Any) -> subprocess.Popen[Any]:
        """Start a process on a machine."""
        there = ["ip", "netns", "exec", self._spaces[name], *command]
        return subprocess.Popen(there, env=dict(env), start_new_session=True, **more)

    def run(
        self, name: str, command: list[str], env: Mapping[str, str], **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a process on a machine to its end, and return its output."""
        there = ["ip", "netns", "exec", self._spaces[name], *command]
        return subprocess.run(there, env=dict(env), capture_output=True, encoding="utf-8", **more)

    def running(self, name: str) -> list[int]:
        """Return the processes of a machine."""
        there = ["ip", "netns", "pids", self._spaces[name]]
        return [*map(int, subprocess.run(there, capture_output=True, encoding="utf-8").stdout.split())]

    def kill(self, name: str) -> None:
        """Kill all that runs on a machine."""
        while pids := self.running(name):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def end(self) -> None:
        """Remove the machines, with all that runs on them."""
        for name in self.names:
            self.kill(name)
        if self.switch.is_alive():
            self.switch.end()
        for space in self._spaces.values():
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)
            shutil.rmtree(Path("/etc/netns", space), ignore_errors=True)


@contextmanager
def machines(*names: str) -> Iterator[Machines]:
    """Make machines, and remove them at the end."""
    made = Machines(*names)
    try:
        yield made
    finally:
        made.end()


def lacking() -> str:
    """Return why this process may make no machines, or ""."""
    if shutil.which("ip") is None:
        return "it needs iproute2 (`ip`)"
    space = f"crucible-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", space], capture_output=True, encoding="utf-8")
    if tried.returncode:
        return f"this user may make no network namespaces: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", space], capture_output=True)
    return "" if os.access("/dev/net/tun", os.R_OK | os.W_OK) else "/dev/net/tun may not be opened"


def _device(name: str) -> int:
    """Make a TAP device, which lasts as long as its file descriptor."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_WITHOUT_HEADER))
    return device


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
