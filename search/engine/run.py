"""Runs a search: its trials under Ray Tune, or one after the other in this process (`debug`)."""

from __future__ import annotations

from collections.abc import Sequence

from search.console import terminable
from search.engine import local_backend
from search.engine.controller import Controller
from search.engine.worker import REAL, Work, settled
from search.optimizer.proposer import Proposer
from search.study.callbacks import Callback, State
from search.study.study import Study


def run(study: Study, listeners: Sequence[Callback], *, debug: bool = False, work: Work = REAL) -> State:
    """Run the remaining trials of a search and return how it ended.

    Args:
        debug: run the trials in this process, without Ray.
        work: the functions that workers run.

    Raises:
        InputError: the cluster does not have the resources for a trial.
        StorageError: the storage failed; trials that had ended before are kept.
    """
    if debug:
        controller = open_controller(settled(study), listeners)
        with terminable():
            state = local_backend.run(controller, work)
    else:
        from search.engine import cluster, ray_backend  # Ray takes a second to import

        with cluster.joined(study) as resources:
            controller = open_controller(ray_backend.settled(study, resources), listeners)
            with terminable():
                state = ray_backend.run(controller, resources, work)
    controller.end("failed" if controller.trouble else state)
    if controller.trouble is not None:
        raise controller.trouble
    return state


def open_controller(study: Study, listeners: Sequence[Callback]) -> Controller:
    """Write the study and open its journal; no file of a search exists before."""
    study.store.make()
    study.write()
    return Controller(study, Proposer(study), listeners)
