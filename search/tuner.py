"""Runs a search's trials under Ray Tune: proposals, rungs and ends go through the conductor."""

from __future__ import annotations

import logging
import os

# Read by Ray when it is imported.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "100000")  # how many are handed out is for Ask to say
# A worker whose last trial, which a rung stopped, has not let go by then is never used again, nor is the next trial.
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "120")

from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from defenses.base import Metrics
from search.cluster import Berth, at_work, joined, ready, slots
from search.conductor import RESTARTS, Conductor
from search.run import settle, time_again
from search.study.callbacks import State
from search.study.candidate import Candidate, Proposal
from search.study.study import Study
from search.watch import Watch
from search.work import Work
from spaces.exceptions import InputError
from spaces.space import Params

__all__ = ["joined", "run"]

logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # a worker that died is no news: its trial goes on


class Desk(Callback):
    """What Ray Tune's searcher and scheduler share: the conductor, and our names of Ray's trials.

    Ray pickles all three again and again; what they hold stays behind, since the study's journal is the truth.
    """

    def __init__(self, conductor: Conductor) -> None:
        self.conductor = conductor
        self.names: dict[str, str] = {}
        self._ended: list[Trial] = []

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.conductor.started(self.names[trial.trial_id])

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ended.append(trial)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Forget what a trial said: the study has it, and Ray would keep all candidates, and write them, for ever."""
        while self._ended:
            told = self._ended.pop().run_metadata
            told.last_result, told.metric_analysis, told.metric_n_steps = {}, {}, {}

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Ask(Searcher):
    """Proposes to Ray Tune, and hears how its trials end.

    A trial is proposed when a slot is free for it, and not before: so its proposal knows all that has ended, and all
    slots start their workers at once. Ray's own rule is one trial ahead of those that run.
    """

    def __init__(self, desk: Desk, berth: Berth) -> None:
        super().__init__()
        self.desk = desk
        self.berth = berth

    def suggest(self, trial_id: str) -> Any:
        if len(self.desk.names) >= (self.desk.conductor.study.concurrent or slots(self.berth)):
            return None
        proposal = self.desk.conductor.next()
        if proposal is None:  # asked again later, unless nothing more can come
            return Searcher.FINISHED if self.desk.conductor.done else None
        self.desk.names[trial_id] = proposal.name
        params = proposal.params
        setting = {"train": dict(params.train), "inference": dict(params.inference)}
        return {"name": proposal.name, "refines": proposal.refines, **setting}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        name = self.desk.names.pop(trial_id)
        if error:
            self.desk.conductor.died(name)
        else:
            settle(self.desk.conductor, name, result)

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the study's journal is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a search is resumed from its study, not from Ray Tune")


class Rungs(FIFOScheduler):
    """Stops trials at rungs."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in Ray
        self.desk = desk

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """Leave it to Ray: a trial that is chosen here takes the next free worker and drops its own, half started."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if "epoch" not in result:
            return self.CONTINUE
        name = self.desk.names[trial.trial_id]
        stops = self.desk.conductor.epoch(name, result["fit"], result["epoch"], dict(result["metrics"]))
        return self.STOP if stops else self.CONTINUE


def run(conductor: Conductor, berth: Berth, work: Work) -> State:
    """Run the trials that are left on the cluster that was joined."""
    study, desk = conductor.study, Desk(conductor)
    remote = ray.remote(num_cpus=berth.cpu, num_gpus=berth.gpu, max_retries=RESTARTS)(at_work)
    try:
        conductor.begin(_prepare(study, berth, remote, work))
        while not conductor.done:
            try:
                with TemporaryDirectory(prefix="crucible-tune-") as scratch:
                    _tuner(study, desk, berth, work, scratch).fit()
            except RuntimeError as error:  # Ray Tune knows no worker that Ray's memory monitor killed
                if not desk.names:
                    raise
                for name in desk.names.values():
                    conductor.died(name, str(error).partition("\n")[0])
                desk.names.clear()
            else:
                break
        if desk.names or not conductor.done:
            return "interrupted"
        time_again(conductor, lambda candidate: ray.get(remote.remote(study, berth, work.clock, candidate)))
    except KeyboardInterrupt:
        return "interrupted"
    return "finished"


def _tuner(study: Study, desk: Desk, berth: Berth, work: Work, scratch: str) -> tune.Tuner:
    trainable = tune.with_parameters(_trainable, study=study, berth=berth, work=work)
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": berth.cpu, "gpu": berth.gpu}),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # the conductor says when there are enough
            search_alg=Ask(desk, berth),
            scheduler=Rungs(desk),
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=scratch,  # nothing is ever read from there, and a full or absent storage must not end Ray Tune
            callbacks=[desk],
            verbose=0,
        ),
    )


def _trainable(config: dict[str, Any], study: Study, berth: Berth, work: Work) -> None:
    """Run one trial in a worker of Ray."""
    try:
        ready(study, berth)
    except InputError as error:  # its node cannot hold the data: no trial is to blame, and each would end here
        tune.report({"interrupted": str(error)})
        return
    proposal = Proposal(config["name"], Params(config["train"], config["inference"]), config["refines"])
    watch = Watch(study, proposal)

    def report(fit: str, epoch: int, metrics: Metrics) -> None:
        with watch.paused():
            tune.report({"fit": fit, "epoch": epoch, "metrics": [*metrics.items()]})  # Tune flattens a dict

    if word := watch.word():
        last: dict[str, Any] = {"failed": word}
    else:
        with watch.running():
            last = work.execute(study, proposal, report)
    tune.report(last)


def _prepare(study: Study, berth: Berth, remote: Any, work: Work) -> Candidate:
    """Train the classifiers side by side and score the bare one, on workers."""
    needed = ray.get(remote.remote(study, berth, work.needed))
    ray.get([remote.remote(study, berth, work.classifier, architecture) for architecture in needed])
    undefended: Candidate = ray.get(remote.remote(study, berth, work.undefended))
    return undefended
