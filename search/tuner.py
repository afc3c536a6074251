"""Runs a search's trials under Ray Tune: proposals, rungs and ends go through the conductor."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

# Read by Ray when it is imported.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")

from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import AuthenticationError
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from defenses.base import Metrics
from search.conductor import Conductor
from search.events import State
from search.run import execute, settle
from search.score import Candidate
from search.study import Study
from search.trial import Bench, baseline, store_of
from spaces.space import InputError, Params

RESTARTS = 2
"""How often a trial is started again when its worker dies."""
ROOT = Path(__file__).resolve().parent.parent


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
        if proposal is None:
            return Searcher.FINISHED
        name, params = proposal
        self.desk.names[trial_id] = name
        return {"name": name, "train": dict(params.train), "inference": dict(params.inference)}

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


@contextmanager
def joined(study: Study) -> Iterator[dict[str, float]]:
    """Start or join the Ray cluster, yield a trial's resources, and leave it.

    Raises:
        InputError: there is no such cluster, or it does not hold what a trial asks for.
    """
    try:
        yield _join(study)
    finally:
        ray.shutdown()


def run(conductor: Conductor, resources: dict[str, float]) -> State:
    """Run the trials that are left on the cluster that was joined."""
    study, desk = conductor.study, Desk(conductor)
    try:
        conductor.begin(_prepare(study, resources))
        if conductor.left:
            _tuner(study, desk, resources).fit()
    except KeyboardInterrupt:
        return "interrupted"
    return "interrupted" if desk.names else "finished"


def _tuner(study: Study, desk: Desk, resources: dict[str, float]) -> tune.Tuner:
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(_trainable, study=study), resources),
        tune_config=tune.TuneConfig(
            num_samples=desk.conductor.left,
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


def _join(study: Study) -> dict[str, float]:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if study.address is None:
        options |= {"address": "local", "include_dashboard": False}
        options |= {"runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}}}
    else:
        excludes = [".git", ".venv", "runs", "docs", "tests", "*.pyc"]
        options |= {"address": study.address, "runtime_env": {"working_dir": str(ROOT), "excludes": excludes}}
    _reachable(study.address)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, AuthenticationError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"address must be a running Ray cluster, but {study.address}: {reason} "
            "(where the cluster asks for a token, set RAY_AUTH_MODE=token)"
        ) from None
    held = ray.cluster_resources()
    gpus = study.gpus_per_trial
    asked = {"cpu": study.cpus_per_trial, "gpu": (0.25 if held.get("GPU") else 0.0) if gpus is None else gpus}
    for kind, amount in asked.items():
        if amount > held.get(kind.upper(), 0.0):
            raise InputError(
                f"{kind}s_per_trial must be at most what the cluster has, {held.get(kind.upper(), 0.0):g}, "
                f"but is {amount:g}"
            )
    return asked


def _reachable(address: str | None) -> None:
    """Refuse an address where nobody listens at once; Ray would try for more than a minute."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or "://" in str(address):
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise InputError(f"address must be a running Ray cluster, but {address}: {error}") from None


def _trainable(config: dict[str, Any], study: Study) -> None:
    """Run one trial in a worker of Ray."""
    share = 0.25 if study.gpus_per_trial is None else study.gpus_per_trial
    if torch.cuda.is_available() and 0 < share < 1:
        torch.cuda.set_per_process_memory_fraction(share)  # Ray's fractions are bookkeeping only

    def report(fit: str, epoch: int, metrics: Metrics) -> None:
        tune.report({"fit": fit, "epoch": epoch, "reported": list(metrics), **metrics})

    tune.report(execute(study, config["name"], Params(config["train"], config["inference"]), report))


def _prepare(study: Study, resources: dict[str, float]) -> Candidate:
    """Train the classifiers side by side and score the bare one, on workers."""
    remote = ray.remote(num_cpus=resources["cpu"], num_gpus=resources["gpu"], max_retries=RESTARTS)
    needed = Bench.of(study, store_of(study)).needed()
    ray.get([remote(_classifier).remote(study, architecture) for architecture in sorted(needed)])
    undefended: Candidate = ray.get(remote(_undefended).remote(study))
    return undefended


def _classifier(study: Study, architecture: str) -> None:
    Bench.of(study, store_of(study)).classifier(architecture)


def _undefended(study: Study) -> Candidate:
    return baseline(study, store_of(study))
