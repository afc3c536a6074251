"""Runs a search: under Ray Tune, or its trials one after the other in this process (`debug`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from defenses.base import Metrics
from search import trial
from search.conductor import Conductor
from search.events import Listener, State
from search.ranking import feasible, ranked
from search.score import Candidate
from search.searcher import Proposer
from search.study import Study
from search.trial import store_of
from spaces.space import Params


class Stopped(BaseException):
    """A rung stopped the trial of this process; no defense may swallow it."""


def run(study: Study, listeners: Sequence[Listener], *, debug: bool = False) -> State:
    """Run what is left of a search and return how it ended.

    Args:
        debug: run the trials in this process, without Ray.

    Raises:
        InputError: the cluster does not hold what a trial asks for.
    """
    if debug:
        conductor = open_conductor(study, listeners)
        state = _in_process(conductor)
    else:
        from search import tuner  # Ray takes a second to import

        with tuner.joined(study) as resources:
            conductor = open_conductor(study, listeners)
            state = tuner.run(conductor, resources)
    conductor.end(state)
    return state


def open_conductor(study: Study, listeners: Sequence[Listener]) -> Conductor:
    """Write the study and open its journal; nothing of a search exists before."""
    study.write()
    return Conductor(study, Proposer(study), listeners)


def execute(study: Study, name: str, params: Params, report: Callable[[str, int, Metrics], None]) -> dict[str, Any]:
    """Run one trial to its end and return its last report.

    Args:
        report: hears the fit's fingerprint, the epoch and its metrics; it may raise BaseException to stop the trial.
    """
    store = store_of(study)
    try:
        bench = trial.Bench.of(study, store)
        fit = bench.fingerprint(params)
        candidates = trial.run_trial(study, params, store, lambda epoch, metrics: report(fit, epoch, metrics))
        best = (*feasible(study, candidates), *ranked(candidates))[0]
        path = study.folder / "pictures" / f"{name}.png"
        return {
            "candidates": [candidate.to_json() for candidate in candidates],
            "curve": bench.curve(fit),
            "picture": _drawn(bench, best.params, path),
        }
    except Exception as error:  # whatever a defense raises is the trial's failure, not the search's
        return {"failed": f"{type(error).__name__}: {error}"}


def _drawn(bench: trial.Bench, params: Params, path: Path) -> str:
    """Return the path of a trial's picture, or nothing: a disk that is full must not cost the candidates."""
    try:
        return str(bench.picture(params, path))
    except OSError:
        return ""


def settle(conductor: Conductor, name: str, last: dict[str, Any] | None) -> None:
    """Tell the study what a trial's last report says; without one of the last reports a rung stopped it."""
    if last is not None and "candidates" in last:
        candidates = [Candidate.from_json(data) for data in last["candidates"]]
        picture = Path(last["picture"]) if last["picture"] else None
        conductor.finished(name, candidates, picture, last["curve"])
    elif last is not None and "failed" in last:
        conductor.failed(name, last["failed"])
    else:
        conductor.pruned(name)


def _in_process(conductor: Conductor) -> State:
    study = conductor.study
    try:
        conductor.begin(trial.baseline(study, store_of(study)))
        while conductor.left and (proposal := conductor.next()):
            name, params = proposal
            conductor.started(name)

            def report(fit: str, epoch: int, metrics: Metrics, name: str = name) -> None:
                if conductor.epoch(name, fit, epoch, metrics):
                    raise Stopped

            try:
                last: dict[str, Any] | None = execute(study, name, params, report)
            except Stopped:
                last = None
            settle(conductor, name, last)
    except KeyboardInterrupt:
        return "interrupted"
    return "finished"
