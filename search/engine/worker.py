"""What a search's workers do, whoever runs them. No Ray, Optuna or W&B in here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
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
from search.trial.runner import TrialRunner, baseline, run_trial
from spaces.space import Params

Report = Callable[[str, int, Metrics], None]
"""Hears the fit's fingerprint, the epoch and its metrics; it may raise BaseException to stop the trial."""


@dataclass(frozen=True)
class Work:
    """What workers are asked to do; `benchmarks/engine_overhead.py` puts something else there, to time the engine.

    Its members are functions of modules, so that they travel to a worker by name.
    """

    needed: Callable[[Study], list[str]]
    classifier: Callable[[Study, str], None]
    undefended: Callable[[Study], Candidate]
    execute: Callable[[Study, Proposal, Report], dict[str, Any]]
    remeasure: Callable[[Study, Candidate], Latency]


def execute(study: Study, proposal: Proposal, report: Report) -> dict[str, Any]:
    """Run one trial to its end and return its last report.

    What fails while the storage is away is done again when it has returned: whatever was finished is in the store.
    """
    store = study.store.expected()
    while True:
        try:
            store.wait()
            return _execute(study, proposal, report, store)
        except Exception as error:  # whatever a defense raises is the trial's failure, not the search's
            if store.away and not isinstance(error, StorageError):
                continue
            reason = trouble(error)
            last = {"interrupted": reason} if reason else {"failed": f"{type(error).__name__}: {error}"}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the next trial, if this one took too much
        return last


def _execute(study: Study, proposal: Proposal, report: Report, store: Store) -> dict[str, Any]:
    runner = TrialRunner.of(study, store)
    fit = runner.trainer.key(proposal.params)
    candidates = run_trial(
        study, proposal.params, store, lambda epoch, metrics: report(fit, epoch, metrics), alone=proposal.refines
    )
    best = (*feasible(study, candidates), *ranked(candidates))[0]
    path = study.folder / "pictures" / f"{proposal.name}.png"
    return {
        "candidates": [candidate.to_json() for candidate in candidates],
        "curve": runner.trainer.curve(fit),
        "picture": _drawn(runner, best.params, path),
    }


def _drawn(runner: TrialRunner, params: Params, path: Path) -> str:
    """Return the path of a trial's picture, or nothing: a disk that is full must not cost the candidates."""
    mirror = runner.study.mirror
    try:
        path.parent.mkdir(parents=mirror is not None, exist_ok=True)  # of a URI each node has a folder of its own
        runner.picture(params, path)
    except OSError:
        return ""
    if mirror is not None:
        with suppress(OSError):  # the driver's courier may have more luck
            mirror.send(f"pictures/{path.name}")
    return str(path)


def _needed(study: Study) -> list[str]:
    return sorted(TrialRunner.of(study, study.store.expected()).assets.needed())


def _classifier(study: Study, architecture: str) -> None:
    TrialRunner.of(study, study.store.expected()).assets.classifier(architecture)


def _undefended(study: Study) -> Candidate:
    return baseline(study, study.store.expected())


def _remeasure(study: Study, candidate: Candidate) -> Latency:
    """Measure the latency of a stored fit's candidate again."""
    runner = TrialRunner.of(study, study.store.expected())
    return runner.remeasured(candidate.params)


REAL = Work(_needed, _classifier, _undefended, execute, _remeasure)
