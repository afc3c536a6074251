"""What a user of a GPU asks, in one script and one JSON: no Ray, no downloads, random images.

    python -m benchmarks.gpu --out gpu.json            on the GPU if there is one; meant for ten minutes, not yet run
    python -m benchmarks.gpu --out gpu.json --small    small networks, few images: two minutes of a busy CPU

Trainings: seconds of an epoch of 60,000 images of each defense at its paper's (else its default) size, in both
precisions in turns, and the peak memory. Latency: purification of 128 images, alone and beside neighbours, with the
device lock and without. Attacks: images a second. Agreement: the share of verdicts on real digits that the CPU shares.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

import defenses
import spaces
from attacks.evaluation import observe
from attacks.gradient_view import View
from attacks.suites import SUITES
from attacks.threat import ThreatModel
from benchmarks.latency_under_load import compare
from benchmarks.precision import DEFENSES, PRECISIONS
from defenses.base import Batches, Defended
from search.classifiers.architectures import ARCHITECTURES
from search.classifiers.training import train
from search.data import splits
from search.study.loading import make_study
from search.trial.device_lock import synchronise
from search.trial.latency import device_name
from search.trial.precision import native
from search.trial.runner import TrialRunner
from search.trial.timing import Step

WHITE = ThreatModel("Linf", 0.3, "white-box")
SMALL: Mapping[str, Any] = {"task": "digits/A", "space": "smoke"}


def _runner(defense: str, storage: str, small: bool, **fields: Any) -> TrialRunner:
    space = "paper" if "paper" in spaces.names(defense) else "default"
    whole = {"task": "mnist/A", "space": space}
    study = make_study({"defense": defense, "storage": storage, **(SMALL if small else whole), **fields})
    return TrialRunner(study, study.store)


def trainings(storage: str, small: bool, turns: int) -> list[dict[str, Any]]:
    """Return the seconds of an epoch of each defense in both precisions, from steps that are timed in turns."""
    found = []
    for defense in DEFENSES:
        seconds: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
        peak = dict.fromkeys(seconds, 0)
        for _, precision in product(range(turns), seconds):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            step = Step(_runner(defense, storage, small, precision=precision))
            images = step.images
            seconds[precision].append(step.training().epoch * (1 if small else 60_000 / images))
            peak[precision] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        row = {"defense": defense, "epoch_s": {name: median(times) for name, times in seconds.items()}}
        found.append(row | {"peak_bytes": peak, "faster": median(seconds["float32"]) / median(seconds["bfloat16"])})
    return found


def attacks(device: torch.device, images: int) -> dict[str, float]:
    """Return how many images a second the attacks of the suite `search` craft on a bare classifier A for MNIST."""
    shape = make_study({"task": "mnist/A"}).resolved.task.shape
    view = View(ARCHITECTURES["A"].build(shape).to(device).eval().requires_grad_(False))
    x_NCHW = torch.rand(images, 1, 28, 28, device=device)
    y_N = view(x_NCHW).argmax(1)
    rates = {}
    for attack in SUITES["search"].oblivious:
        craft = partial(attack.craft, view, x_NCHW, y_N, WHITE, 0)
        craft()
        rates[attack.name] = images / _seconds(craft, device)
    return rates


def agreement(device: torch.device, images: int) -> dict[str, float]:
    """Return the share of verdicts on digits that the device and the CPU share: clean, and under the suite `search`."""
    task = make_study({"task": "digits/A"}).resolved.task
    x_NCHW, y_N = splits.load("digits", "train")
    network = ARCHITECTURES["A"].build(task.shape).to(device)
    train(network, x_NCHW.to(device), y_N.to(device), 3, 0)
    space = make_study({"task": "digits/A", "defense": "advae", "space": "smoke"}).resolved.space
    params = space.setting(space.usual_of)
    defense = defenses.find("advae")(params.train, params.inference, task.shape).to(device)
    batches = Batches(x_NCHW.to(device), y_N.to(device), epochs=2, batch_size=64)
    for _ in defense.fit(batches, network.eval().requires_grad_(False)):
        pass
    seen = []
    x_NCHW, y_N = splits.load("digits", "validation", limit=images)
    for place in (device, torch.device("cpu")):
        here, net = (copy.deepcopy(part).to(place).eval().requires_grad_(False) for part in (defense, network))
        target = Defended(here, net)  # type: ignore[arg-type]
        seen.append(observe(SUITES["search"], target, x_NCHW.to(place), y_N.to(place), WHITE).judge())
    pairs = {"clean": [one.clean.right for one in seen], "attacked": [one.attacked.right for one in seen]}
    return {name: float((a.cpu() == b.cpu()).double().mean()) for name, (a, b) in pairs.items()}


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    begin = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    device, begin = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.perf_counter()
    found: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "bfloat16": native(device)}
    with tempfile.TemporaryDirectory() as storage:
        small, (neighbours, turns) = args.small, ([1], 1) if args.small else ([1, 3], 3)
        parts: dict[str, Callable[[], Any]] = {
            "agreement": lambda: agreement(device, 20 if small else 135),
            "attacks": lambda: attacks(device, 8 if small else 1000),
            "trainings": lambda: trainings(storage, small, turns),
            "latency": lambda: [asdict(row) for row in compare(neighbours, turns, device)],
        }
        for name, part in parts.items():
            found[name] = part()
            found["seconds"] = time.perf_counter() - begin
            # What is measured stays, whatever fails after it.
            args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
            print(f"{name}: {json.dumps(found[name])}", flush=True)


if __name__ == "__main__":
    main()
