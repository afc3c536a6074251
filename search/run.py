"""Runs a search: under Ray Tune, or its trials one after the other in this process (`debug`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from defenses.base import Metrics
from search.conductor import Conductor
from search.searcher import Proposer
from search.signals import terminable
from search.study import sync
from search.study.callbacks import Callback, State
from search.study.candidate import Candidate, Latency
from search.study.study import Study
from search.work import REAL, Work


class Stopped(BaseException):
    """A rung stopped the trial of this process; no defense may swallow it."""


def run(study: Study, listeners: Sequence[Callback], *, debug: bool = False, work: Work = REAL) -> State:
    """Run what is left of a search and return how it ended.

    Args:
        debug: run the trials in this process, without Ray.
        work: what the workers do.

    Raises:
        InputError: the cluster does not hold what a trial asks for.
        StorageError: the storage failed; what had ended before is kept.
    """
    if debug:
        conductor = open_conductor(study, listeners)
        with terminable():
            state = _in_process(conductor, work)
    else:
        from search import tuner  # Ray takes a second to import

        with tuner.joined(study) as berth:
            conductor = open_conductor(study, listeners)
            with terminable():
                state = tuner.run(conductor, berth, work)
    conductor.end("failed" if conductor.trouble else state)
    if conductor.trouble is not None:
        raise conductor.trouble
    return state


def open_conductor(study: Study, listeners: Sequence[Callback]) -> Conductor:
    """Write the study and open its journal; nothing of a search exists before."""
    study.store.make()
    study.write()
    return Conductor(study, Proposer(study), listeners)


def settle(conductor: Conductor, name: str, last: dict[str, Any] | None) -> None:
    """Tell the study what a trial's last report says."""
    if last is not None and "candidates" in last:
        candidates = [Candidate.from_json(data) for data in last["candidates"]]
        conductor.finished(name, candidates, sync.picture(conductor.study, last["picture"]), last["curve"])
    elif last is not None and "failed" in last:
        conductor.failed(name, last["failed"])
    elif last is not None and "interrupted" in last:
        conductor.interrupted(name, last["interrupted"])
    else:
        conductor.silent(name)


def time_again(conductor: Conductor, measure: Callable[[Candidate], Latency]) -> None:
    """Time the front again; where that fails, the first figure stands."""
    for candidate in () if conductor.trouble else conductor.leaders():
        try:
            conductor.clocked(candidate, measure(candidate))
        except Exception as error:
            warnings.warn(f"{candidate.candidate} could not be timed again: {error}", stacklevel=2)


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
        time_again(conductor, lambda candidate: work.clock(study, candidate))
    except KeyboardInterrupt:
        return "interrupted"
    return "finished"
