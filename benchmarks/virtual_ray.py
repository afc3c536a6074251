"""Ray's actors in virtual time, for `benchmarks.driver_scale`: all that a driver does is real but for its workers.

`ray.tune`'s own controller, our searcher, scheduler and callbacks run as they are; in place of `RayActorManager`, which
starts processes and waits for their answers, stands a queue of events. Nothing sleeps.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import count
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from search.engine import ray_backend  # first: it sets what Ray reads when it is imported

# isort: split
import numpy as np
import ray
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.exceptions import RayActorError
from ray.train._internal import storage
from ray.tune.execution import experiment_state, tune_controller
from ray.tune.utils import resource_updater

from search.engine import cluster, controller
from search.engine.cluster import WorkerResources
from search.engine.worker import Report, Work
from search.study.candidate import Proposal
from search.study.study import Study
from spaces.space import Params

START_S, RESET_S = 5.0, 0.1
"""Virtual seconds until a new worker has imported torch, and until a reused one has its next trial."""

Answer = tuple[Callable[..., None] | None, Any]


class Clock:
    """Stands in for the module `time` where the driver looks at the clock; what it has not, the module has."""

    def __init__(self) -> None:
        self.now = time.time()

    def time(self) -> float:
        return self.now

    monotonic = perf_counter = time

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class _Remote:
    """A method of a worker that answers at once."""

    def remote(self, **_: object) -> dict[str, Any]:
        return {}


class _Worker:
    """What Ray Tune holds of a worker, and the reports of its present training that are still to come.

    Args:
        config: of its trial, as Ray Tune sends it.
    """

    get_auto_filled_metrics = _Remote()

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.reports: Iterator[dict[str, Any]] | None = None
        self.tasks = 0
        """Counts what was asked of it and forgotten: an answer to an older question is dropped."""


class VirtualActors:
    """Takes the place of `RayActorManager`.

    Args:
        clock: is moved to the next event, whenever one is waited for.
        seconds: of a whole training, on average; each takes between 0.8 and 1.2 of it.
        dying: the share of trainings whose worker dies once.
    """

    def __init__(
        self, study: Study, work: Work, clock: Clock, *, epochs: int, seconds: float, dying: float, seed: int = 0
    ) -> None:
        self.study, self.work, self.clock = study, work, clock
        self.epochs, self.seconds, self.dying = epochs, seconds, dying
        self.spent_s = 0.0
        """CPU seconds of the thread in which the workers' own work was made up: no cost of a driver."""
        self.deaths = 0
        self._live_actors_to_ray_actors_resources: dict[TrackedActor, tuple[_Worker, None]] = {}  # Tune reads it
        self._pending: dict[TrackedActor, _Worker] = {}
        self._failed: set[int] = set()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers, self._rng = count(), np.random.default_rng(seed)
        self._known: dict[str, tuple[list[dict[str, Any]], float]] = {}

    def __call__(self, resource_manager: object) -> VirtualActors:
        return self

    # What Ray Tune asks for.

    @property
    def num_live_actors(self) -> int:
        return len(self._live_actors_to_ray_actors_resources)

    @property
    def num_pending_actors(self) -> int:
        return len(self._pending)

    @property
    def num_total_actors(self) -> int:
        return self.num_live_actors + self.num_pending_actors

    num_actor_tasks = num_live_actors  # Ray Tune only asks for it to bundle reports, which we do not

    def is_actor_started(self, tracked_actor: TrackedActor) -> bool:
        return tracked_actor in self._live_actors_to_ray_actors_resources and not self.is_actor_failed(tracked_actor)

    def is_actor_failed(self, tracked_actor: TrackedActor) -> bool:
        return tracked_actor.actor_id in self._failed

    def add_actor(
        self,
        cls: object,
        kwargs: dict[str, Any],
        resource_request: object,
        *,
        on_start: Callable[..., None],
        on_stop: Callable[..., None],
        on_error: Callable[..., None],
    ) -> TrackedActor:
        actor = TrackedActor(next(self._numbers), on_start=on_start, on_stop=on_stop, on_error=on_error)
        self._pending[actor] = _Worker(kwargs["config"])

        def started() -> None:
            if actor in self._pending:
                self._live_actors_to_ray_actors_resources[actor] = self._pending.pop(actor), None
                on_start(actor)

        self._later(START_S, started)
        return actor

    def remove_actor(self, tracked_actor: TrackedActor, kill: bool = False, stop_future: object = None) -> bool:
        self._pending.pop(tracked_actor, None)
        if not self.is_actor_started(tracked_actor):
            return False
        self.clear_actor_task_futures(tracked_actor)

        def stopped() -> None:
            self._live_actors_to_ray_actors_resources.pop(tracked_actor, None)
            if tracked_actor._on_stop:
                tracked_actor._on_stop(tracked_actor)

        self._later(RESET_S, stopped)
        return True

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:
        if tracked_actor in self._live_actors_to_ray_actors_resources:
            self._live_actors_to_ray_actors_resources[tracked_actor][0].tasks += 1

    def schedule_actor_task(
        self,
        tracked_actor: TrackedActor,
        method_name: str,
        args: tuple[Any, ...] = (),
        kwargs: object = None,
        on_result: Callable[..., None] | None = None,
        on_error: Callable[..., None] | None = None,
        _return_future: bool = False,
    ) -> object:
        if method_name == "stop" or self.is_actor_failed(tracked_actor):
            return object()
        worker = self._live_actors_to_ray_actors_resources[tracked_actor][0]
        if method_name == "reset":
            worker.config, worker.reports = args[0], None
            self._answer(RESET_S, tracked_actor, worker, (on_result, True))
            return None
        assert method_name == "train"
        begin = time.thread_time()
        worker.reports = worker.reports or self._reports(worker.config)
        report = next(worker.reports)
        self.spent_s += time.thread_time() - begin
        answer = (on_result, report) if report else (on_error, RayActorError())
        self._answer(report.pop("after_s", self.seconds / 100), tracked_actor, worker, answer)
        return None

    def next(self, timeout: float) -> bool:
        """Answer the next question, if that takes no longer than the timeout, and return whether there was one."""
        if not self._events or self._events[0][0] > self.clock.now + timeout:
            self.clock.now += timeout
            return False
        self.clock.now, _, happen = heapq.heappop(self._events)
        happen()
        return True

    def cleanup(self) -> None:
        self._live_actors_to_ray_actors_resources.clear()
        self._events.clear()

    # What workers do.

    def _later(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.clock.now + seconds, next(self._numbers), happen))

    def _answer(self, seconds: float, actor: TrackedActor, worker: _Worker, answer: Answer) -> None:
        tasks, (tell, what) = worker.tasks, answer

        def answered() -> None:
            if worker.tasks == tasks:
                if isinstance(what, RayActorError):
                    self._die(actor, what)
                if tell:
                    tell(actor, what)

        self._later(seconds, answered)

    def _die(self, actor: TrackedActor, error: RayActorError) -> None:
        """Do as Ray does: the actor's own callback comes before the task's."""
        self.deaths += 1
        self._failed.add(actor.actor_id)
        self._live_actors_to_ray_actors_resources.pop(actor)
        if actor._on_error:
            actor._on_error(actor, error)

    def _reports(self, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield all that a training reports to Ray Tune, nothing where its worker dies; the next goes on from there."""
        proposal = Proposal(config["name"], Params(config["train"], config["inference"]), config["refines"])
        again = proposal.name in self._known
        if not again:
            made: list[dict[str, Any]] = []
            report = Report(
                lambda fit, epoch, metrics: made.append({"fit": fit, "epoch": epoch, "metrics": [*metrics.items()]})
            )
            last = self.work.execute(self.study, proposal, report)
            step = self.seconds * self._rng.uniform(0.8, 1.2) / (len(made) + 1)
            self._known[proposal.name] = [*made, last], step
        reports, step = self._known[proposal.name]
        dies = int(self._rng.integers(len(reports))) if not again and self._rng.random() < self.dying else None
        filled = {"time_this_iter_s": step, "done": False, "time_total_s": step, "pid": 1, "hostname": "simulated"}
        filled |= {"node_ip": "127.0.0.1", "config": config, "date": "2026-11-30_00-00-00", "timestamp": 1}
        for number, each in enumerate(list(reports)):
            if number == dies:
                yield {}
            reports.pop(0)  # what was reported is in the store
            yield {**each, **filled, "training_iteration": number + 1, "after_s": step}
        self._known.pop(proposal.name, None)
        yield {"__duplicate__": True, **filled, "done": True, "after_s": RESET_S}


class _Here:
    """The functions of Ray that `search/engine/ray_backend.py` calls: this process does what a worker would do."""

    @staticmethod
    def remote(**_: object) -> Callable[[Callable[..., Any]], Any]:
        return lambda function: SimpleNamespace(remote=function)

    @staticmethod
    def get(answer: Any) -> Any:
        return answer


@contextmanager
def virtual_time(actors: VirtualActors) -> Iterator[None]:
    """Give Ray Tune these actors in place of a cluster, and the driver the clock that they move."""
    with ExitStack() as patches:
        patches.enter_context(patch.dict(os.environ, TUNE_DISABLE_AUTO_INIT="1"))
        patches.enter_context(patch.object(cluster, "joined", lambda study: nullcontext(WorkerResources(1.0, 0.0))))
        patches.enter_context(patch.object(ray_backend, "ray", _Here))
        patches.enter_context(patch.object(ray, "cluster_resources", lambda: {"CPU": 1.0}))
        scratch = patches.enter_context(TemporaryDirectory())
        patches.enter_context(patch.object(storage, "_get_ray_train_session_dir", lambda: scratch))
        patches.enter_context(patch.object(tune_controller, "RayActorManager", actors))
        for module in (tune_controller, experiment_state, resource_updater, controller):
            patches.enter_context(patch.object(module, "time", actors.clock))
        yield
