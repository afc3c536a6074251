"""Runs a search's trials under Ray Tune: proposals, rungs and ends go through the conductor."""

from __future__ import annotations

import os

# Read by Ray when it is imported.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")

from typing import Any

import ray
import torch
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from defenses.base import Metrics
from search.cluster import joined
from search.conductor import Conductor
from search.events import State
from search.run import settle
from search.score import Candidate
from search.study import Study
from search.work import Proposal, Work
from spaces.space import Params

__all__ = ["joined", "run"]

RESTARTS = 2
"""How often a trial is started again when its worker dies."""


class Desk(Callback):
    """What Ray Tune's searcher and scheduler share: the conductor, and our names of Ray's trials.

    Ray pickles all three again and again; what they hold stays behind, since the study's journal is the truth.
    """

    def __init__(self, conductor: Conductor) -> None:
        self.conductor = conductor
        self.names: dict[str, str] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.conductor.started(self.names[trial.trial_id])

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Ask(Searcher):
    """Proposes to Ray Tune, and hears how its trials end."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self.desk = desk

    def suggest(self, trial_id: str) -> Any:
        proposal = self.desk.conductor.next()
        if proposal is None:  # asked again later, unless nothing more can come
            return Searcher.FINISHED if self.desk.conductor.done else None
        self.desk.names[trial_id] = proposal.name
        params = proposal.params
        setting = {"train": dict(params.train), "inference": dict(params.inference)}
        return {"name": proposal.name, "refines": proposal.refines, **setting}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        last = {"failed": f"its worker died, {RESTARTS + 1} times over"} if error else result
        settle(self.desk.conductor, self.desk.names.pop(trial_id), last)

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the study's journal is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a search is resumed from its study, not from Ray Tune")


class Rungs(FIFOScheduler):
    """Stops trials at rungs."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in Ray
        self.desk = desk

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if "epoch" not in result:
            return self.CONTINUE
        metrics = {name: result[name] for name in result["reported"]}
        stops = self.desk.conductor.epoch(self.desk.names[trial.trial_id], result["fit"], result["epoch"], metrics)
        return self.STOP if stops else self.CONTINUE


def run(conductor: Conductor, resources: dict[str, float], work: Work) -> State:
    """Run the trials that are left on the cluster that was joined."""
    study, desk = conductor.study, Desk(conductor)
    remote = ray.remote(num_cpus=resources["cpu"], num_gpus=resources["gpu"], max_retries=RESTARTS)
    try:
        conductor.begin(_prepare(study, remote, work))
        if not conductor.done:
            _tuner(study, desk, resources, work).fit()
        if desk.names:
            return "interrupted"
        for candidate in conductor.leaders():
            conductor.clocked(candidate, ray.get(remote(work.clock).remote(study, candidate)))
    except KeyboardInterrupt:
        return "interrupted"
    return "finished"


def _tuner(study: Study, desk: Desk, resources: dict[str, float], work: Work) -> tune.Tuner:
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(_trainable, study=study, work=work), resources),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # the conductor says when there are enough
            search_alg=Ask(desk),
            scheduler=Rungs(desk),
            max_concurrent_trials=study.concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(study.folder),
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
            callbacks=[desk],
            verbose=0,
        ),
    )


def _trainable(config: dict[str, Any], study: Study, work: Work) -> None:
    """Run one trial in a worker of Ray."""
    share = 0.25 if study.gpus_per_trial is None else study.gpus_per_trial
    if torch.cuda.is_available() and 0 < share < 1:
        torch.cuda.set_per_process_memory_fraction(share)  # Ray's fractions are bookkeeping only

    def report(fit: str, epoch: int, metrics: Metrics) -> None:
        tune.report({"fit": fit, "epoch": epoch, "reported": list(metrics), **metrics})

    params = Params(config["train"], config["inference"])
    tune.report(work.execute(study, Proposal(config["name"], params, config["refines"]), report))


def _prepare(study: Study, remote: Any, work: Work) -> Candidate:
    """Train the classifiers side by side and score the bare one, on workers."""
    needed = ray.get(remote(work.needed).remote(study))
    ray.get([remote(work.classifier).remote(study, architecture) for architecture in needed])
    undefended: Candidate = ray.get(remote(work.undefended).remote(study))
    return undefended
