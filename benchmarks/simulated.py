"""Simulated trials for `benchmarks.engine_overhead`, which sleep and return made-up but valid scores without training;
and the times of a run.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attacks.threat import ThreatModel
from search.engine.worker import Report, Work
from search.storage.fingerprint import fingerprint
from search.study.callbacks import Callback
from search.study.candidate import Candidate, Latency, Proposal, Score
from search.study.loading import make_study
from search.study.study import Study
from spaces.puvae import SIGMA_EPS
from spaces.space import Params

CPUS = (os.cpu_count() or 1) / 4
"""CPU cores per trial, so that the machine has four slots."""
SLOTS = 4
EPOCHS = 4
LAMBDAS = ("lambda_rc", "lambda_kl", "lambda_ce")


def simulated(storage: Path, **fields: object) -> Study:
    study = {"name": "scale", "task": "digits/A", "space": "wide", "cpus_per_trial": CPUS, "storage": str(storage)}
    return make_study({**study, "stopping": "none", "refine": 0, "wandb": "offline", **fields})


def working(seconds: float, epochs: int = EPOCHS) -> Work:
    return Work(needed, classifier, quick, undefended, partial(execute, seconds=seconds, epochs=epochs), remeasure)


def scored(params: Params, fit: str) -> Candidate:
    """Return a candidate scored by a fixed function of the knobs: a wider network is more robust and slower."""
    knobs: dict[str, Any] = params.flat()
    lost = sum(abs(math.log10(knobs[name])) for name in LAMBDAS) / 9
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


def quick(study: Study) -> float:
    return 0.1


def undefended(study: Study) -> Candidate:
    knobs = {"lambda_rc": 1.0, "lambda_kl": 1.0, "lambda_ce": 1.0, "conv_maps": 4, "decoder_maps": 8, "dense": 128}
    return scored(Params(knobs, {"sigma_eps": 0.0}), "undefended")


def sweep(params: Params) -> list[Candidate]:
    """Return the candidates of a training for every sigma_eps, the proposed one first."""
    fit = fingerprint(**params.train)
    values = dict.fromkeys((params.inference["sigma_eps"], *SIGMA_EPS))
    return [scored(Params(params.train, {**params.inference, "sigma_eps": value}), fit) for value in values]


def execute(study: Study, proposal: Proposal, report: Report, seconds: float, epochs: int = EPOCHS) -> dict[str, Any]:
    """Sleep for `seconds`, and return made-up candidates."""
    candidates, curve = sweep(proposal.params), []
    for epoch in range(1, epochs + 1):
        time.sleep(seconds / epochs)
        curve.append(candidates[0].score.attacked_accuracy * epoch / epochs)
        report(candidates[0].fit, epoch, {"loss": 1 / epoch, "cheap": curve[-1]})
    return {"candidates": [candidate.to_json() for candidate in candidates], "curve": curve, "picture": ""}


def remeasure(study: Study, candidate: Candidate) -> Latency:
    return Latency(candidate.score.latency_ms_p50, candidate.score.latency_ms_p95, 1.0, 0.0, "simulated", 30)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One run of simulated trials.

    Args:
        way: ours, or the plain script.
        start: seconds from the call to the first trial's start: Ray, its workers and their imports.
        trials_s: seconds from there to the end of the last trial.
        ideal: seconds that the trials sleep on all slots.
        wall: seconds from the call to its return.
        report: seconds to write report.html afterwards; 0 for the plain script.
        each_ms: milliseconds per trial, in each quarter of the run.
        driver_mib: memory of the driver at the end of each quarter.
        load: load average of the machine at the end.
    """

    way: str
    trials: int
    seconds: float
    start: float
    trials_s: float
    ideal: float
    wall: float
    report: float
    each_ms: tuple[float, ...]
    driver_mib: tuple[float, ...]
    load: float


class Pulse(Callback):
    """Records the time and the memory of the driver when a trial ends."""

    def __init__(self) -> None:
        self.called = time.perf_counter()
        self.began = 0.0
        self.ends: list[tuple[float, float]] = []

    def trial_started(self, *told: object) -> None:
        self.began = self.began or time.perf_counter()

    def trial_ended(self, *told: object) -> None:
        self.ends.append((time.perf_counter(), resident()))

    def timed(self, way: str, trials: int, seconds: float, wall: float, report: float = 0.0) -> Timed:
        parts = [len(self.ends) * quarter // 4 for quarter in range(5)]
        marks = [self.ends[part - 1][0] if part else self.began for part in parts]
        spans = zip(marks, marks[1:], parts, parts[1:], strict=False)
        return Timed(
            way=way,
            trials=trials,
            seconds=seconds,
            start=self.began - self.called,
            trials_s=self.ends[-1][0] - self.began,
            ideal=math.ceil(trials / SLOTS) * seconds,
            wall=wall,
            report=report,
            each_ms=tuple(1e3 * (end - begin) / max(1, last - first) for begin, end, first, last in spans),
            driver_mib=tuple(self.ends[part - 1][1] for part in parts[1:] if part),
            load=os.getloadavg()[0],
        )


def resident() -> float:
    """Return the memory of this process, in MiB."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
