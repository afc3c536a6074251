"""Machines that are network namespaces: they reach each other by name, as well as their cables let them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks.machines import CUT, WHOLE, Link, Machines, lacking, machines

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

SERVER = """
import socket
server = socket.create_server(("", 7000))
print("listens", flush=True)
while True:
    server.accept()[0].sendall(b"x" * 300_000)
"""
CLIENT = """
import socket, time
begin, got = time.monotonic(), 0
with socket.create_connection(("two", 7000), 5) as server:
    connected = time.monotonic() - begin
    while got < 300_000:
        got += len(server.recv(1 << 16))
print(connected)
"""


@pytest.fixture(scope="module")
def two() -> Iterator[Machines]:
    """Two machines, of which the second sends 300 kB to whoever connects."""
    with machines("one", "two") as made:
        server = made.popen("two", [sys.executable, "-c", SERVER], os.environ, stdout=-1)
        assert server.stdout and server.stdout.readline() == b"listens\n"
        yield made


def asked(two: Machines, link: Link) -> float | None:
    """Return the seconds of a connection from the first to the second; None if there was none."""
    two.set_link("one", link)
    try:
        done = two.run("one", [sys.executable, "-c", CLIENT], os.environ)
    finally:
        two.set_link("one", WHOLE)
    return float(done.stdout) if done.returncode == 0 else None


def test_machines_reach_each_other_by_name_and_nothing_else(two: Machines) -> None:
    assert asked(two, WHOLE) is not None
    outside = two.run("one", [sys.executable, "-c", CLIENT.replace("two", "192.0.2.1")], os.environ)
    assert outside.returncode != 0


def test_a_cable_delays_each_way_and_what_it_loses_is_sent_again(two: Machines) -> None:
    took = asked(two, Link(delay_s=0.2, loss=0.05))
    assert took is not None and took >= 0.4


def test_a_cut_cable_carries_nothing_and_a_mended_one_all(two: Machines) -> None:
    begin = time.monotonic()
    assert asked(two, CUT) is None and time.monotonic() - begin > 4
    assert asked(two, WHOLE) is not None


def test_machines_leave_nothing_behind() -> None:
    with machines("gone") as made:
        process = made.popen("gone", ["sleep", "600"], os.environ)
        assert process.pid in made.running("gone")
    assert process.wait(10) == -9 and not made.running("gone")
