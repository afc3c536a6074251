"""Runs a search's trials one after the other in this process, without Ray (`--debug`)."""

from __future__ import annotations

from typing import Any

from defenses.base import Metrics
from search.engine.controller import Controller, remeasure_front, settle
from search.engine.worker import Report, Work, seldom
from search.study.callbacks import State


class Stopped(BaseException):
    """Early stopping ended the trial of this process; a BaseException, so that no defense catches it."""


def run(controller: Controller, work: Work) -> State:
    study = controller.study
    try:
        if controller.proposer.undefended() is None:
            controller.classifier_trained(work.quick(study))
        controller.begin(work.undefended(study))
        while proposal := controller.next():
            name = proposal.name
            controller.started(name)

            def report(fit: str, epoch: int, metrics: Metrics, name: str = name) -> None:
                if controller.epoch(name, fit, epoch, metrics):
                    raise Stopped

            def scored(done: int, settings: int, images: int, name: str = name) -> None:
                controller.scored(name, done, settings, images)

            try:
                last: dict[str, Any] | None = work.execute(study, proposal, Report(report, seldom(scored)))
            except Stopped:
                last = None
            settle(controller, name, last)
        remeasure_front(controller, lambda candidate: work.remeasure(study, candidate))
    except KeyboardInterrupt:
        return "interrupted"
    return "finished"
