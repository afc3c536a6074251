"""Weights & Biases: one run a trial and one for the search, written by the driver.

Whatever W&B does, it never stops, slows or fails a search: a listener's method only puts a job into a queue,
one thread of our own works it off, and no call to wandb gets more than `PATIENCE_S`. Offline runs are folders
that `wandb leet FOLDER/wandb` shows and `wandb sync` uploads.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import plotly.graph_objects as go
import wandb
from wandb.sdk import wandb_setup
from wandb.sdk.lib import wbauth

from defenses.base import Metrics
from search.events import Listener, State
from search.ranking import feasible, front, ranked
from search.score import Candidate
from search.study import Study
from spaces.space import Params

T = TypeVar("T")
P = ParamSpec("P")
Mode = Literal["online", "offline", "disabled"]

PATIENCE_S = 20.0
"""How long one call to wandb may take before W&B counts as failed."""

FLUSH_S = 60.0
"""How long the end of a search waits for what is still in the queue."""

SEARCH = "search"
"""The key of the search's own run; a trial's key is its identity."""

LOWER: dict[Mode, Mode] = {"online": "offline", "offline": "disabled", "disabled": "disabled"}
MEANING: dict[Mode, str] = {
    "online": "the search goes on",
    "offline": "the search goes on and logs offline",
    "disabled": "the search goes on without it",
}
EXIT: dict[State, int] = {"finished": 0, "pruned": 0, "failed": 1, "interrupted": 255}


class Tracker(Listener):
    """Shows a search in W&B.

    Args:
        mode: None is online where a key is found (or what $WANDB_MODE says), else offline.
        folder: the search's folder; wandb's files lie in its `wandb/`.
        say: shows the user one line; called from the tracker's thread.
    """

    def __init__(self, mode: Mode | None, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder.resolve()
        self._say = say
        self._said: set[Mode] = set()
        self._runs: dict[str, wandb.Run] = {}
        self._states: Counter[State] = Counter()
        self._candidates = 0
        self._best: list[Candidate] = []
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        _hush(self._folder)
        self._mode: Mode = mode or _found_mode()
        if self._mode != "disabled":
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()

    def __repr__(self) -> str:
        return f"Tracker(mode={self._mode!r}, folder={str(self._folder)!r})"

    @property
    def mode(self) -> Mode:
        """What W&B does now: it steps down from online to offline to disabled where it fails."""
        return self._mode

    def search_started(self, study: Study, undefended: Candidate) -> None:
        self._study, self._undefended = study, undefended
        config = study.model_dump(exclude={"address", "storage", "data_dir"})  # they tell of the machine
        self._put(self._open, SEARCH, self._about(study.name, "search", config))

    def trial_started(self, trial: str, params: Params) -> None:
        config = {
            "train": dict(params.train),
            "inference": dict(params.inference),
            **self._study.model_dump(include={"defense", "task", "seed", "space"}),
            **self._threat(),
        }
        self._put(self._open, trial, self._about(trial, "trial", config))

    def epoch_ended(self, trial: str, epoch: int, metrics: Metrics) -> None:
        self._put(self._write, trial, partial(_log, {"epoch": epoch, **metrics}))

    def trial_ended(
        self, trial: str, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        self._states[state] += not trial.startswith("r")  # a refinement is no trial
        self._candidates += len(candidates)
        self._best = feasible(self._study, [*self._best, *candidates])[:1]
        best = next(iter((*feasible(self._study, candidates), *ranked(candidates))), None)
        outcome = {**self._threat(), **(best.row() if best else {}), "state": state, "reason": reason}
        if candidates:
            self._put(self._write, trial, partial(_show_table, "candidates", tuple(candidates)))
        if picture is not None:
            self._put(self._write, trial, partial(_show_picture, picture))
        self._put(self._write, trial, partial(_sum_up, outcome))
        self._put(self._finish, trial, EXIT[state])
        self._put(self._write, SEARCH, partial(_log, self._progress()))

    def search_ended(self, state: State, candidates: Sequence[Candidate]) -> None:
        known = tuple(candidates)
        if known:
            self._put(self._write, SEARCH, partial(_show_table, "leaderboard", known))
            chart = partial(_show_pareto, self._study, self._undefended, known)
            self._put(self._write, SEARCH, chart)
        self._put(self._write, SEARCH, partial(_sum_up, self._outcome(state, known)))
        self._put(self._finish, SEARCH, EXIT[state])
        self.close()

    def close(self) -> None:
        """Finish every run and stop, waiting at most `FLUSH_S`. It may be called again."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._jobs.put(None)
        thread.join(FLUSH_S)
        if thread.is_alive():
            self._said.update(MEANING)
            self._say(f"W&B is slow; upload the rest with: wandb sync {self._folder}/wandb/*run-*")

    def _about(self, name: str, job_type: str, config: dict[str, Any]) -> dict[str, Any]:
        study = self._study
        tags = (study.defense, study.task, study.threat)
        return {"group": study.name, "tags": tags, "name": name, "job_type": job_type, "config": config}

    def _threat(self) -> dict[str, Any]:
        threat = self._undefended.score.threat
        return {"threat": threat.knowledge, "norm": threat.norm, "eps": threat.eps}

    def _progress(self) -> dict[str, float]:
        point: dict[str, float] = {"trial": self._states.total(), "candidates": self._candidates}
        for best in self._best:
            point["best/attacked_accuracy"] = best.score.attacked_accuracy
            point["best/latency_ms_p50"] = best.score.latency_ms_p50
        return point

    def _outcome(self, state: State, known: Sequence[Candidate]) -> dict[str, Any]:
        best = next(iter(feasible(self._study, known)), None)
        return {
            **self._threat(),
            "images": self._undefended.score.images,
            "state": state,
            "candidates": len(known),
            **{f"trials/{name}": self._states[name] for name in get_args(State)},
            **{f"undefended/{name}": value for name, value in self._undefended.row().items()},
            **({f"best/{name}": value for name, value in best.row().items()} if best else {}),
        }

    def _put(self, job: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        if self._thread is not None:
            self._jobs.put(partial(job, *args, **kwargs))

    # From here on: in the tracker's thread.

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            with contextlib.suppress(Exception):  # `say` is not ours: it may fail too
                job()
        for key in list(self._runs):
            with contextlib.suppress(Exception):
                self._write(key, partial(_sum_up, {"state": "interrupted"}))
                self._finish(key, EXIT["interrupted"])

    def _open(self, key: str, about: dict[str, Any]) -> None:
        """Open a run, stepping down where that fails; a trial that starts again goes on in its run."""
        fault: Exception | None = None
        while self._mode != "disabled" and key not in self._runs:
            # Unless it is reset, wandb-core keeps the identity of a run whose start failed for itself.
            identity = f"{key}-{self._mode}" if fault and self._runs else key
            try:
                start = partial(_start, self._folder, identity, self._mode, about)
                self._runs[key] = _within(PATIENCE_S, start)
            except Exception as error:
                fault = fault or error
                self._step_down()
        if fault is not None:
            self._complain(fault)

    def _write(self, key: str, write: Callable[[wandb.Run], None]) -> None:
        run = self._runs.get(key)
        if run is None:
            return
        try:
            _within(PATIENCE_S, partial(write, run))
        except TimeoutError as error:
            del self._runs[key]
            if run.offline == (self._mode == "offline"):
                self._step_down()
            self._complain(error)
        except ConnectionError as error:  # wandb-core, which serves all runs, has died
            self._runs.clear()
            self._step_down()
            self._complain(error)
        except Exception as error:
            self._complain(error)

    def _finish(self, key: str, exit_code: int) -> None:
        self._write(key, lambda run: run.finish(exit_code=exit_code))
        self._runs.pop(key, None)

    def _step_down(self) -> None:
        self._mode = LOWER[self._mode]
        if not self._runs:
            with contextlib.suppress(Exception):
                _within(PATIENCE_S, wandb.teardown)

    def _complain(self, error: Exception) -> None:
        if self._mode not in self._said:
            self._said.add(self._mode)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self._say(f"W&B failed ({reason[:200]}); {MEANING[self._mode]}")


def pareto_chart(study: Study, undefended: Candidate, candidates: Sequence[Candidate]) -> go.Figure:
    """Return attacked accuracy against latency: all candidates, the feasible front, the bare classifier."""
    under = f"{undefended.score.threat}, {undefended.score.images} images"
    chart = go.Figure(
        layout={
            "title": f"{study.name}: {study.defense} on {study.label}, {under}",
            "xaxis": {"title": "purification latency, p50 in ms"},
            "yaxis": {"title": "attacked accuracy (with rejection), fraction", "range": [0, 1]},
        }
    )
    chart.add_trace(_points("candidates", candidates, mode="markers", opacity=0.5))
    chart.add_trace(_points("Pareto front", front(study, candidates), mode="lines+markers"))
    chart.add_trace(_points("no defense", [undefended], mode="markers", marker={"symbol": "x", "size": 10}))
    return chart


def _points(name: str, candidates: Sequence[Candidate], **style: Any) -> go.Scatter:
    x = [c.score.latency_ms_p50 for c in candidates]
    y = [1 - c.score.attacked_error for c in candidates]  # accuracy where nothing is rejected
    return go.Scatter(name=name, x=x, y=y, text=[c.candidate for c in candidates], **style)


def _log(point: dict[str, float], run: wandb.Run) -> None:
    run.log(point)


def _show_table(name: str, candidates: Sequence[Candidate], run: wandb.Run) -> None:
    rows = [c.row() for c in ranked(candidates)]
    columns: list[str | int] = list(dict.fromkeys(column for row in rows for column in row))
    data = [[row.get(str(column)) for column in columns] for row in rows]
    run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)})


def _show_picture(picture: Path, run: wandb.Run) -> None:
    run.log({"picture": wandb.Image(str(picture), caption="clean / attacked / purified")})


def _show_pareto(study: Study, undefended: Candidate, known: Sequence[Candidate], run: wandb.Run) -> None:
    run.log({"pareto": wandb.Plotly(pareto_chart(study, undefended, known))})


def _sum_up(outcome: dict[str, Any], run: wandb.Run) -> None:
    run.summary.update({name: value for name, value in outcome.items() if value is not None})


def _start(folder: Path, key: str, mode: Mode, about: dict[str, Any]) -> wandb.Run:
    """Open a run of its own; the caller bounds the time.

    Raises:
        ConnectionError: online is asked for without a key; wandb would wait for one at the terminal.
    """
    if mode == "online" and not _has_key():
        raise ConnectionError("there is no key: run `wandb login` or set WANDB_API_KEY")
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project="crucible",
        id=_identity(folder, about["group"], key),
        dir=str(folder),
        mode=mode,
        resume="allow",
        reinit="create_new",
        settings=_settings(),
        **about,
    )
    step = "trial" if about["job_type"] == "search" else "epoch"
    run.define_metric(step)
    run.define_metric("*", step_metric=step)
    return run


def _settings() -> wandb.Settings:
    """Return what keeps wandb quick and quiet, and the machine's name, environment and code to itself."""
    return wandb.Settings(
        # shorter than our own patience, so that wandb's clearer error comes first
        init_timeout=PATIENCE_S * 0.8,
        finish_timeout=PATIENCE_S * 0.8,
        finish_timeout_raises=True,
        stop_fn=lambda: None,  # else the stop button of one trial's page interrupts the whole search
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        host="crucible",
        label_disable=True,
        save_code=False,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=5.0,
    )


def _identity(folder: Path, search: str, key: str) -> str:
    """Return the run's identity: the same when the search is resumed, another in another folder."""
    path = folder / "wandb" / "identity"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(uuid.uuid4().hex[:8])
        part.replace(path)
    return re.sub(r"[^\w.-]+", "-", f"{search[:40]}-{key}-{path.read_text()}")


def _hush(folder: Path) -> None:
    """Set what wandb takes from the environment alone."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its crash reports go to a third party
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ["WANDB_DATA_DIR"] = str(folder / "wandb")  # tables are staged here: an offline run needs them
    os.environ["WANDB_CACHE_DIR"] = str(folder / "wandb" / "cache")  # a home folder may be read-only


def _found_mode() -> Mode:
    for mode in get_args(Mode):
        if os.environ.get("WANDB_MODE") == mode:
            return mode
    with contextlib.suppress(Exception):
        return "online" if _has_key() else "offline"
    return "offline"


def _has_key() -> bool:
    settings = wandb_setup.singleton().settings
    told = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key
    return bool(told or wbauth.read_netrc_auth(host=settings.base_url))


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return what `call` returns, or leave it behind.

    Raises:
        TimeoutError: it takes longer.
    """
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="wandb-call", daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer within {seconds:g} s") from None
