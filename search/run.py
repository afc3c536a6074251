"""Runs a search: under Ray Tune, or its trials one after the other in this process (`debug`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from defenses.base import Metrics
from search.conductor import Conductor
from search.events import Listener, State
from search.score import Candidate
from search.searcher import Proposer
from search.study import Study
from search.work import REAL, Work


class Stopped(BaseException):
    """A rung stopped the trial of this process; no defense may swallow it."""


def run(study: Study, listeners: Sequence[Listener], *, debug: bool = False, work: Work = REAL) -> State:
    """Run what is left of a search and return how it ended.

    Args:
        debug: run the trials in this process, without Ray.
        work: what the workers do.

    Raises:
        InputError: the cluster does not hold what a trial asks for.
    """
    if debug:
        conductor = open_conductor(study, listeners)
        state = _in_process(conductor, work)
    else:
        from search import tuner  # Ray takes a second to import

        with tuner.joined(study) as resources:
            conductor = open_conductor(study, listeners)
            state = tuner.run(conductor, resources, work)
    conductor.end(state)
    return state


def open_conductor(study: Study, listeners: Sequence[Listener]) -> Conductor:
    """Write the study and open its journal; nothing of a search exists before."""
    study.write()
    return Conductor(study, Proposer(study), listeners)


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


def _in_process(conductor: Conductor, work: Work) -> State:
    study = conductor.study
    try:
        conductor.begin(work.undefended(study))
        while proposal := conductor.next():
            name = proposal.name
            conductor.started(name)

            def report(fit: str, epoch: int, metrics: Metrics, name: str = name) -> None:
                if conductor.epoch(name, fit, epoch, metrics):
                    raise Stopped

            try:
                last: dict[str, Any] | None = work.execute(study, proposal, report)
            except Stopped:
                last = None
            settle(conductor, name, last)
        for candidate in conductor.leaders():
            conductor.clocked(candidate, work.clock(study, candidate))
    except KeyboardInterrupt:
        return "interrupted"
    return "finished"
