"""What the engine itself costs: trials that train nothing, beside a plain Ray Tune + OptunaSearch script.

    python -m benchmarks.scale                          all of it: about 20 minutes on two quiet cores
    python -m benchmarks.scale --only trials --trials 64 --repeats 1
    python -m benchmarks.scale --only proposals --methods tpe --upto 1000
    python -m benchmarks.scale --json                   the rows as JSON, one a line

A simulated trial sleeps, reports its epochs, and returns made-up scores of six candidates; everything else is the real
engine: Ray's workers, Optuna's journal, candidates.csv, W&B (offline) and the display (piped). The plain script sleeps
as long and reports two numbers. Each run is a process of its own; within a repeat the ways follow one another.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from attacks.threat import ThreatModel
from defenses.base import Metrics
from search.events import Listener, State
from search.latency import Latency
from search.score import Candidate, Score
from search.store import fingerprint
from search.study import Study, make
from search.work import Proposal, Report, Work
from spaces.puvae import SIGMA_EPS
from spaces.space import Params

CPUS = 0.5
"""CPU cores of a trial: four slots on a machine of two."""
EPOCHS = 4


def scored(params: Params, fit: str) -> Candidate:
    """Return a candidate with a known function of the knobs: the wider the network, the more robust and the slower."""
    knobs: dict[str, Any] = params.flat()
    lost = sum(abs(math.log10(knobs[name])) for name in ("lambda_rc", "lambda_kl", "lambda_ce")) / 9
    noise = abs(math.log10(knobs["sigma_eps"] + 0.01)) / 2
    error = min(1.0, 0.1 + 0.5 * lost + 0.1 * noise + 0.5 / knobs["conv_maps"])
    latency = 1 + knobs["conv_maps"] + knobs["decoder_maps"] / 2 + knobs["dense"] / 100
    threat = ThreatModel("Linf", 0.1, "oblivious")
    attacks = {"oblivious/fgsm": 1 - error / 2, "oblivious/ifgsm-targeted": 1 - error}
    score = Score(
        threat=threat,
        attacked_accuracy=1 - error,
        attacked_error=error,
        attacked_rejection=0.0,
        oblivious_accuracy=1 - error,
        white_box_accuracy=0.0,
        clean_accuracy=1 - error / 10,
        clean_rejection=0.0,
        latency_ms_p50=latency,
        latency_ms_p95=1.1 * latency,
        images=1000,
        device="simulated",
        attacks=attacks,
    )
    name = f"{fit[:8]}-{fingerprint(**params.inference)[:4]}"
    return Candidate(candidate=name, fit=fit, defense="puvae", task="digits/A", params=params, score=score)


def needed(study: Study) -> list[str]:
    return []


def classifier(study: Study, architecture: str) -> None:
    """Train nothing."""


def undefended(study: Study) -> Candidate:
    knobs = {"lambda_rc": 1.0, "lambda_kl": 1.0, "lambda_ce": 1.0, "conv_maps": 4, "decoder_maps": 8, "dense": 128}
    return scored(Params(knobs, {"sigma_eps": 0.0}), "undefended")


def execute(study: Study, proposal: Proposal, report: Report, seconds: float) -> dict[str, Any]:
    """Sleep so long, and return candidates at every sigma_eps."""
    fit = fingerprint(**proposal.params.train)
    settings = [proposal.params.inference, *({"sigma_eps": value} for value in SIGMA_EPS)]
    settings = [setting for at, setting in enumerate(settings) if setting not in settings[:at]]
    candidates = [scored(Params(proposal.params.train, setting), fit) for setting in settings]
    curve = []
    for epoch in range(1, EPOCHS + 1):
        time.sleep(seconds / EPOCHS)
        curve.append(candidates[0].score.attacked_accuracy * epoch / EPOCHS)
        report(fit, epoch, {"loss": 1 / epoch, "cheap": curve[-1]})
    return {"candidates": [candidate.to_json() for candidate in candidates], "curve": curve, "picture": ""}


def clock(study: Study, candidate: Candidate) -> Latency:
    return Latency(candidate.score.latency_ms_p50, candidate.score.latency_ms_p95, 1.0, 0.0, "simulated", 30)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One run of simulated trials.

    Args:
        wall: seconds from the call to its return, the start and the end of Ray included.
        ideal: what the trials sleep, over four slots.
        first: seconds until the first trial ended.
        slopes: milliseconds a trial in each quarter of the run.
        memory: MiB that the driver held at the end of each quarter.
    """

    way: str
    trials: int
    seconds: float
    wall: float
    ideal: float
    first: float
    slopes: tuple[float, ...] = ()
    memory: tuple[float, ...] = ()
    report: float = 0.0


class Pulse(Listener):
    """Notes the time and the driver's memory whenever a trial ends."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def trial_ended(self, *told: object) -> None:
        self.ends.append((time.perf_counter(), resident()))


def resident() -> float:
    """Return the memory of this process, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def simulated(storage: Path, **fields: object) -> Study:
    study = {"name": "scale", "task": "digits/A", "space": "wide", "cpus_per_trial": CPUS, "storage": str(storage)}
    return make({**study, "stopping": "none", "patience": 10**9, "refine": 0, "wandb": "offline", **fields})


def ours(storage: Path, trials: int, seconds: float) -> Timed:
    from rich.console import Console
    from search.ledger import Ledger
    from search.live import Display
    from search.run import run
    from search.tracking import Tracker
    from search import session

    study = simulated(storage, trials=trials)
    work = Work(needed, classifier, undefended, partial(execute, seconds=seconds), clock)
    pulse, plan = Pulse(), study.plan()
    start = time.perf_counter()
    with (storage / "display").open("w") as shown:
        display = Display(Console(file=shown), study, list(plan.space.searched()), plan.epochs, 0)
        tracker = Tracker("offline", study.folder, print)
        ledger = Ledger(study.folder / "candidates.csv", [])
        run(study, [ledger, tracker, display, pulse], work=work)
    end = time.perf_counter()
    session.write_report(study)
    reported = time.perf_counter() - end
    ends = pulse.ends
    quarters = [len(ends) * part // 4 for part in range(5)]
    marks = [start if not at else ends[at - 1][0] for at in quarters]
    slopes = [1e3 * (b - a) / max(1, n - m) for a, b, m, n in zip(marks, marks[1:], quarters, quarters[1:])]
    memory = tuple(round(ends[at - 1][1]) for at in quarters[1:])
    return Timed(way="ours", trials=trials, seconds=seconds, wall=end - start, ideal=ideal(trials, seconds),
                 first=ends[0][0] - start, slopes=tuple(round(s, 1) for s in slopes), memory=memory, report=reported)


def ideal(trials: int, seconds: float) -> float:
    return math.ceil(trials / 4) * seconds


def plain(storage: Path, trials: int, seconds: float, *, reuse: bool) -> Timed:
    """The script that a user of Ray Tune and Optuna writes, with Tune's own defaults but for `reuse`."""
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    def trainable(config: dict[str, Any]) -> None:
        for epoch in range(1, EPOCHS + 1):
            time.sleep(seconds / EPOCHS)
            tune.report({"error": abs(math.log10(config["lambda_rc"])) / 3, "latency": float(config["conv_maps"])})

    space = {name: tune.loguniform(1e-3, 1e3) for name in ("lambda_rc", "lambda_kl", "lambda_ce")}
    space |= {"conv_maps": tune.lograndint(4, 65), "decoder_maps": tune.lograndint(8, 65)}
    start = time.perf_counter()
    ray.init(address="local", include_dashboard=False)
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": CPUS}),
        param_space=space,
        tune_config=tune.TuneConfig(search_alg=OptunaSearch(metric=["error", "latency"], mode=["min", "min"]),
          num_samples=trials, reuse_actors=reuse),
        run_config=tune.RunConfig(storage_path=str(storage)),
    ).fit()
    ray.shutdown()
    wall = time.perf_counter() - start
    return Timed(way="plain, reuse_actors" if reuse else "plain", trials=trials, seconds=seconds, wall=wall, ideal=ideal(trials, seconds), first=0.0)


if __name__ == "__main__":
    which, trials, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    with tempfile.TemporaryDirectory(dir="/tmp/h6") as folder:
        way = {"ours": ours, "plain": partial(plain, reuse=False), "reuse": partial(plain, reuse=True)}[which]
        print(way(Path(folder), trials, seconds))
