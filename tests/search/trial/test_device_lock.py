"""The device lock keeps a measurement alone on the device."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from search.trial import device_lock as device_lock_module
from search.trial.device_lock import LOOK_S, DeviceLock

CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")  # they compute nothing, so that torch need not be imported anew


def start(work: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=work, args=args)
    process.start()
    return process


def compute(folder: Path, name: str) -> None:
    """Work in batches of 5 ms until told to stop, and note when each began and ended."""
    device_lock = DeviceLock(CPU)
    spans = []
    with device_lock.working():
        (folder / f"{name}.ready").touch()
        while not (folder / "stop").exists():
            device_lock.boundary()
            began = time.monotonic()
            time.sleep(0.005)
            spans.append((began, time.monotonic()))
    (folder / f"{name}.log").write_text(json.dumps(spans))


def test_who_measures_is_alone_and_the_others_go_on_afterwards(tmp_path: Path, own_lane: None) -> None:
    workers = [start(compute, tmp_path, name) for name in "ab"]
    while not all((tmp_path / f"{name}.ready").exists() for name in "ab"):
        time.sleep(0.01)
    quiet, device_lock = [], DeviceLock(CPU)
    for _ in range(3):
        time.sleep(0.1)
        with device_lock.quiet():
            began = time.monotonic()
            time.sleep(0.1)
            quiet.append((began, time.monotonic()))
    time.sleep(0.1)
    (tmp_path / "stop").touch()
    for worker in workers:
        worker.join()
    for name in "ab":
        spans = json.loads((tmp_path / f"{name}.log").read_text())
        assert spans[0][1] < quiet[0][0] and quiet[-1][1] < spans[-1][0]
        for began, ended in quiet:
            assert not [span for span in spans if span[0] < ended and span[1] > began]


def linger(folder: Path, name: str, alone: bool) -> None:
    """Hold the device lock, together with the others or alone, and never let go."""
    device_lock = DeviceLock(CPU)
    with device_lock.quiet() if alone else device_lock.working():
        (folder / f"{name}.ready").touch()
        time.sleep(600)


@pytest.mark.parametrize("alone", [False, True], ids=["computing", "measuring"])
def test_a_process_that_is_killed_lets_go_of_the_lane(tmp_path: Path, own_lane: None, alone: bool) -> None:
    holder = start(linger, tmp_path, "dead", alone)
    while not (tmp_path / "dead.ready").exists():
        time.sleep(0.01)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    device_lock = DeviceLock(CPU)
    with device_lock.quiet():  # it would wait for ever
        pass
    with device_lock.working():
        device_lock.boundary()


def measure_often(folder: Path, name: str) -> None:
    """Hold the device lock alone ten times."""
    device_lock, spans = DeviceLock(CPU), []
    while not (folder / "go").exists():
        time.sleep(0.001)
    for _ in range(10):
        with device_lock.quiet():
            began = time.monotonic()
            time.sleep(0.005)
            spans.append((began, time.monotonic()))
    (folder / f"{name}.log").write_text(json.dumps(spans))


def test_nobody_starves_where_many_compute_and_several_measure(tmp_path: Path, own_lane: None) -> None:
    crowd = [start(compute, tmp_path, f"works{number}") for number in range(8)]
    measuring = [start(measure_often, tmp_path, f"measures{number}") for number in range(3)]
    while len(list(tmp_path.glob("*.ready"))) < len(crowd):
        time.sleep(0.01)
    (tmp_path / "go").touch()
    for process in measuring:
        process.join(60)
        assert process.exitcode == 0
    time.sleep(0.1)
    (tmp_path / "stop").touch()
    for process in crowd:
        process.join(60)
    quiet = sorted(span for path in tmp_path.glob("measures*.log") for span in json.loads(path.read_text()))
    assert len(quiet) == 30 and all(one[1] <= next[0] for one, next in zip(quiet, quiet[1:], strict=False))
    for path in tmp_path.glob("works*.log"):
        spans = json.loads(path.read_text())
        assert spans[-1][0] > quiet[-1][1]  # it went on
        assert not [span for span in spans for began, ended in quiet if span[0] < ended and span[1] > began]


def test_whoever_runs_a_network_in_the_lane_lets_a_measurement_pass_between_its_layers(
    own_lane: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    device_lock, seen = DeviceLock(CPU), list[bool]()

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(device_lock._held)
            time.sleep(2 * LOOK_S)
            return x

    network = nn.Sequential(Layer(), Layer())
    looks: list[float] = []
    monkeypatch.setattr(device_lock, "boundary", lambda: looks.append(time.monotonic()))
    with device_lock.working():
        network(torch.rand(1))
    assert seen == [True, True] and len(looks) == 3  # the network itself, and its layers
    network(torch.rand(1))
    assert seen[2:] == [False, False] and len(looks) == 3  # not while nobody asks


def test_who_is_away_holds_nothing_up_and_comes_back(own_lane: None) -> None:
    device_lock, other = DeviceLock(CPU), DeviceLock(CPU)
    with device_lock.working():
        with pytest.raises(ZeroDivisionError), device_lock.away():
            with other.quiet():
                device_lock.boundary()  # does not wait for what it does not hold
            raise ZeroDivisionError
        assert device_lock._held
    assert not device_lock._held


def test_each_device_has_a_lane_of_its_own(own_lane: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_lock_module, "_identity", lambda device: f"GPU-{device.index}")
    first, again, second = (DeviceLock(torch.device("cuda", index)) for index in (0, 0, 1))
    for device_lock in (first, again, second):
        monkeypatch.setattr(device_lock, "_device", CPU)
    with first.quiet(), second.quiet():
        held = os.open(f"/proc/self/fd/{again._gate}", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_a_lock_that_is_dropped_keeps_no_file_open(own_lane: None) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with DeviceLock(torch.device("cpu")).working():
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(os.listdir("/proc/self/fd")) == before
