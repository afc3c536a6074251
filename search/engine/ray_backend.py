"""Runs a search's trials under Ray Tune: proposals, early stopping and results go through the controller."""

from __future__ import annotations

import logging
import math
import os
import time

# Read by Ray when it is imported.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1e9")  # its record of all trials is never read
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "100000")  # RaySearcher limits them
# If a trial that was stopped early has not ended by then, its worker is never used again, and the next trial fails.
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "120")

from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import tune
from ray.tune import Callback
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from defenses.base import Metrics
from search.engine import worker
from search.engine.cluster import WorkerResources, at_work, ready, slots
from search.engine.controller import RESTARTS, Controller, remeasure_front, settle
from search.engine.timeout import TrialTimeout
from search.engine.worker import Report, Work, seldom
from search.study.callbacks import State
from search.study.candidate import Proposal
from search.study.study import Study
from spaces.exceptions import InputError
from spaces.space import Params

# Ray writes a worker's variables in clear into a log of its node; nodes have their own credentials, if they need any.
class_cache.ENV_VARS_TO_PROPAGATE = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}
logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # a dead worker is no error: its trial restarts


class RayCallbacks(Callback):
    """The state that Ray Tune's searcher and scheduler share: the controller, and our names of Ray's trials.

    Ray pickles all three repeatedly; their state is excluded, since the study's journal is the source of truth.
    """

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.names: dict[str, str] = {}
        self._ended: list[Trial] = []

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.controller.started(self.names[trial.trial_id])

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ended.append(trial)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Delete the reports of ended trials: the study has them, and Ray would keep and write all of them for ever."""
        while self._ended:
            told = self._ended.pop().run_metadata
            told.last_result, told.metric_analysis, told.metric_n_steps = {}, {}, {}

    def __getstate__(self) -> dict[str, Any]:
        return {}


class RaySearcher(Searcher):
    """Proposes trials to Ray Tune, and receives their results.

    A trial is proposed only when a slot is free for it, so that its proposal uses all results so far, and all slots
    start their workers at once. Ray's own rule proposes one trial ahead of the running ones.
    """

    def __init__(self, callbacks: RayCallbacks, resources: WorkerResources) -> None:
        super().__init__()
        self.callbacks = callbacks
        self.resources = resources
        self._slots, self._counted = 0, -math.inf

    def suggest(self, trial_id: str) -> Any:
        if len(self.callbacks.names) >= (self.callbacks.controller.study.concurrent or self._slots_now()):
            return None
        proposal = self.callbacks.controller.next()
        if proposal is None:  # Ray asks again later, unless the search is done
            return Searcher.FINISHED if self.callbacks.controller.done else None
        self.callbacks.names[trial_id] = proposal.name
        params = proposal.params
        setting = {"train": dict(params.train), "inference": dict(params.inference)}
        return {"name": proposal.name, "refines": proposal.refines, **setting}

    def _slots_now(self) -> int:
        """Return the slots of the cluster, at most a second old: Ray Tune asks at every event."""
        if time.monotonic() - self._counted > 1:
            self._slots, self._counted = slots(self.resources), time.monotonic()
        return self._slots

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        name = self.callbacks.names.pop(trial_id)
        if error:
            self.callbacks.controller.died(name)
        else:
            settle(self.callbacks.controller, name, result)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study's journal is the source of truth."""

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a search is resumed from its study, not from Ray Tune")


class RayScheduler(FIFOScheduler):
    """Stops trials early at rungs."""

    def __init__(self, callbacks: RayCallbacks) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in Ray
        self.callbacks = callbacks

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """Leave it to Ray: a trial chosen here takes the next free worker and abandons its own, which is starting."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if "scored" in result:
            self.callbacks.controller.scored(self.callbacks.names[trial.trial_id], *result["scored"])
        if "epoch" not in result:
            return self.CONTINUE
        name = self.callbacks.names[trial.trial_id]
        stops = self.callbacks.controller.epoch(name, result["fit"], result["epoch"], dict(result["metrics"]))
        return self.STOP if stops else self.CONTINUE


def settled(study: Study, resources: WorkerResources) -> Study:
    """Return the study with what its hardware decides, which on a cluster of several machines a worker tells."""
    if study.precision != "auto" or resources.data is None:
        return worker.settled(study)
    remote = ray.remote(num_cpus=resources.cpu, num_gpus=resources.gpu, max_retries=RESTARTS)(at_work)
    told: Study = ray.get(remote.remote(study, resources, worker.settled))
    return told


def run(controller: Controller, resources: WorkerResources, work: Work) -> State:
    """Run the remaining trials on the joined cluster."""
    study, callbacks = controller.study, RayCallbacks(controller)
    remote = ray.remote(num_cpus=resources.cpu, num_gpus=resources.gpu, max_retries=RESTARTS)(at_work)
    try:
        _prepare(controller, resources, remote, work)
        while not controller.done:
            try:
                with TemporaryDirectory(prefix="crucible-tune-") as scratch:
                    _tuner(study, callbacks, resources, work, scratch).fit()
            except RuntimeError as error:  # Ray Tune cannot handle a worker killed by Ray's memory monitor
                if not callbacks.names:
                    raise
                for name in callbacks.names.values():
                    controller.died(name, str(error).partition("\n")[0])
                callbacks.names.clear()
            else:
                break
        if callbacks.names or not controller.done:
            return "interrupted"
        remeasure_front(
            controller, lambda candidate: ray.get(remote.remote(study, resources, work.remeasure, candidate))
        )
    except KeyboardInterrupt:
        return "interrupted"
    return "finished"


def _tuner(study: Study, callbacks: RayCallbacks, resources: WorkerResources, work: Work, scratch: str) -> tune.Tuner:
    trainable = tune.with_parameters(_trainable, study=study, resources=resources, work=work)
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": resources.cpu, "gpu": resources.gpu}),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # the controller decides when there are enough
            search_alg=RaySearcher(callbacks, resources),
            scheduler=RayScheduler(callbacks),
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=scratch,  # never read; a full or unavailable storage must not end Ray Tune
            callbacks=[callbacks],
            verbose=0,
        ),
    )


def _trainable(config: dict[str, Any], study: Study, resources: WorkerResources, work: Work) -> None:
    """Run one trial in a Ray worker."""
    try:
        ready(study, resources)
    except InputError as error:  # its node cannot hold the data: every trial would fail here, whatever its setting
        tune.report({"interrupted": str(error)})
        return
    proposal = Proposal(config["name"], Params(config["train"], config["inference"]), config["refines"])
    watch = TrialTimeout(study, proposal)

    def report(fit: str, epoch: int, metrics: Metrics) -> None:
        with watch.paused():
            tune.report({"fit": fit, "epoch": epoch, "metrics": [*metrics.items()]})  # Tune flattens a dict

    def scored(*progress: int) -> None:
        with watch.paused():
            tune.report({"scored": progress})

    if word := watch.word():
        last: dict[str, Any] = {"failed": word}
    else:
        with watch.running():
            last = work.execute(study, proposal, Report(report, seldom(scored)))
    tune.report(last)


def _prepare(controller: Controller, resources: WorkerResources, remote: Any, work: Work) -> None:
    """Train and score the bare classifier, while other workers train the other classifiers."""
    study, protected = controller.study, controller.study.resolved.protected
    known = controller.proposer.undefended() is not None
    first = remote.remote(study, resources, work.undefended if known else work.quick)
    needed = ray.get(remote.remote(study, resources, work.needed))
    others = [remote.remote(study, resources, work.classifier, name) for name in needed if name != protected]
    if not known:
        controller.classifier_trained(ray.get(first))
        first = remote.remote(study, resources, work.undefended)
    controller.begin(ray.get(first))
    ray.get(others)
