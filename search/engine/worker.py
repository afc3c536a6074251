"""The work of a search's workers, independent of the backend. No Ray, Optuna or W&B in this module."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from defenses.base import Metrics
from search.exceptions import StorageError
from search.storage.outage import trouble
from search.storage.store import Store
from search.study.candidate import Candidate, Latency, Proposal
from search.study.ranking import feasible, ranked
from search.study.study import Study
from search.trial.runner import TrialRunner, baseline, raced_trial
from search.trial.scoring import Scored, unheard
from spaces.space import Params


@dataclass(frozen=True)
class Report:
    """What hears of a running trial.

    Args:
        epoch: called with the fit's fingerprint, the epoch and its metrics; it may raise BaseException to stop the
            trial.
        scored: called after each inference setting.
    """

    epoch: Callable[[str, int, Metrics], None]
    scored: Scored = unheard

    def __call__(self, fit: str, epoch: int, metrics: Metrics) -> None:
        self.epoch(fit, epoch, metrics)


def seldom(heard: Scored, seconds: float = 10.0) -> Scored:
    """Return what passes on a call at most every so many seconds: a driver hears thousands of trainings."""
    last = time.monotonic()

    def scored(done: int, settings: int, images: int) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            heard(done, settings, images)

    return scored


@dataclass(frozen=True)
class Work:
    """The functions that workers run; `benchmarks/engine_overhead.py` replaces them to time the engine.

    They are module-level functions, so that they are sent to a worker by name.
    """

    needed: Callable[[Study], list[str]]
    classifier: Callable[[Study, str], None]
    quick: Callable[[Study], float]
    undefended: Callable[[Study], Candidate]
    execute: Callable[[Study, Proposal, Report], dict[str, Any]]
    remeasure: Callable[[Study, Candidate], Latency]


def execute(study: Study, proposal: Proposal, report: Report) -> dict[str, Any]:
    """Run one trial to its end and return its last report.

    A trial that fails while the storage is unavailable is repeated when it returns: finished work is in the store.
    """
    store = study.store.expected()
    while True:
        try:
            store.wait()
            return _execute(study, proposal, report, store)
        except Exception as error:  # an exception of a defense fails the trial, not the search
            if store.away and not isinstance(error, StorageError):
                continue
            reason = trouble(error)
            last = {"interrupted": reason} if reason else {"failed": f"{type(error).__name__}: {error}"}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the next trial, if this one used too much memory
        return last


def _execute(study: Study, proposal: Proposal, report: Report, store: Store) -> dict[str, Any]:
    runner = TrialRunner.of(study, store)
    fit = runner.trainer.key(proposal.params)
    candidates, dropped = raced_trial(
        study,
        proposal.params,
        store,
        lambda epoch, metrics: report(fit, epoch, metrics),
        alone=proposal.refines,
        rivals=proposal.rivals,
        heard=report.scored,
    )
    best = (*feasible(study, candidates), *ranked(candidates))[0]
    path = study.folder / "pictures" / f"{proposal.name}.png"
    return {
        "candidates": [candidate.to_json() for candidate in candidates],
        "curve": runner.trainer.curve(fit),
        "dropped": [asdict(setting) for setting in dropped],
        "remarks": list(runner.remarks(proposal.params)),
        "picture": _drawn(runner, best.params, path),
    }


def _drawn(runner: TrialRunner, params: Params, path: Path) -> str:
    """Return the path of a trial's picture, or "" if it cannot be written: a full disk must not lose the candidates."""
    mirror = runner.study.mirror
    try:
        path.parent.mkdir(parents=mirror is not None, exist_ok=True)  # for a URI, each node has its own folder
        runner.picture(params, path)
    except OSError:
        return ""
    if mirror is not None:
        with suppress(OSError):  # the driver's StorageSync may succeed later
            mirror.send(f"pictures/{path.name}")
    return str(path)


def settled(study: Study) -> Study:
    """Return the study with the precision of trainings on this machine, where it leaves the choice to the hardware."""
    return study.model_copy(update={"precision": TrialRunner(study, study.store).assets.precision})


def _needed(study: Study) -> list[str]:
    return sorted(TrialRunner.of(study, study.store.expected()).assets.needed())


def _classifier(study: Study, architecture: str) -> None:
    TrialRunner.of(study, study.store.expected()).assets.classifier(architecture)


def _quick(study: Study) -> float:
    return TrialRunner.of(study, study.store.expected()).quick()


def _undefended(study: Study) -> Candidate:
    return baseline(study, study.store.expected())


def _remeasure(study: Study, candidate: Candidate) -> Latency:
    """Re-measure the latency of a candidate of a stored fit."""
    runner = TrialRunner.of(study, study.store.expected())
    return runner.remeasured(candidate.params)


REAL = Work(_needed, _classifier, _quick, _undefended, execute, _remeasure)
