"""Latency: the lane keeps a measurement alone, and the figures are what was timed."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from defenses.base import Shape
from defenses.puvae import PuVAE
from search import latency
from search.latency import Lane, measure

CPU = torch.device("cpu")


def compute(folder: Path, name: str) -> None:
    """Work in batches of 5 ms until told to stop, and note when each began and ended."""
    lane = Lane(CPU)
    spans = []
    with lane.working():
        (folder / f"{name}.ready").touch()
        while not (folder / "stop").exists():
            lane.boundary()
            began = time.monotonic()
            time.sleep(0.005)
            spans.append((began, time.monotonic()))
    (folder / f"{name}.log").write_text(json.dumps(spans))


@pytest.fixture
def own_lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane of the test's own, for child processes too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def test_who_measures_is_alone_and_the_others_go_on_afterwards(tmp_path: Path, own_lane: None) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compute, args=(tmp_path, name)) for name in "ab"]
    for worker in workers:
        worker.start()
    while not all((tmp_path / f"{name}.ready").exists() for name in "ab"):
        time.sleep(0.01)
    quiet, lane = [], Lane(CPU)
    for _ in range(3):
        time.sleep(0.1)
        with lane.quiet():
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


def test_a_measurement_has_ordered_percentiles_and_names_its_device(own_lane: None) -> None:
    small = {"conv_maps": 2, "decoder_maps": 2, "dense": 8, "latent": 2}
    found = measure(PuVAE(small, {"sigma_eps": 0.0}, Shape(1, 8, 8, 10)), Lane(CPU), CPU)
    assert 0 < found.single_ms_p50 <= found.ms_p50 <= found.ms_p95
    assert found.device.endswith(f", {torch.get_num_threads()} thread(s)")


def test_a_measurement_is_repeated_while_the_reference_drifts(own_lane: None, monkeypatch: pytest.MonkeyPatch) -> None:
    defense = PuVAE({"conv_maps": 1, "decoder_maps": 1, "dense": 8, "latent": 1}, {}, Shape(1, 8, 8, 10))
    series = iter([[1.0], [5.0], [5.0], [2.0], [1.0], [7.0], [7.0], [1.1]])  # reference, batch, single, reference
    monkeypatch.setattr(latency, "_times", lambda work, device: next(series))
    found = measure(defense, Lane(CPU), CPU)
    assert found.ms_p50 == 7.0 and found.drift == pytest.approx(0.1)


def test_the_times_of_a_sleep_are_its_length() -> None:
    times = latency._times(lambda: time.sleep(0.01), CPU)
    assert len(times) == latency.REPEATS
    assert 10 <= sorted(times)[len(times) // 2] < 20
