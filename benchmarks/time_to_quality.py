"""Time to quality: the epochs that a search needs to get within one point of the best of PuVAE's whole paper grid.

    python -m benchmarks.time_to_quality grid 1 2 3 4 5   trains the grids: 216 trainings, 14 minutes on one core each
    python -m benchmarks.time_to_quality search 1 2 3 4 5       searches on each grid; trains nothing
    python -m benchmarks.time_to_quality continuous 1 2 3 4 5   searches continuous ranges of the same knobs; trains

Task: sklearn's 8 x 8 digits under white-box attack, with a small PuVAE. The result of a training depends only on its
knobs and the seed, so a search over the values of the grid is replayed: each proposed training gets the rung scores and
candidates that it has in the grid. Its epochs count as if it were trained, also those of stopped trainings. Each grid
is searched with several sampler seeds. Grids are stored in `--storage`, and continue where they stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar
from unittest import mock

from defenses.base import Metrics
from search.engine.run import run
from search.engine.worker import REAL, Report, Work
from search.optimizer.history import SearchHistory, state_of
from search.study.callbacks import Callback, State
from search.study.candidate import Candidate, Latency, Proposal
from search.study.loading import make_study
from search.study.ranking import feasible
from search.study.study import Study
from search.trial import evaluator
from search.trial.runner import TrialRunner
from spaces import puvae
from spaces.exceptions import InputError
from spaces.space import Params

T = TypeVar("T")
POINT = 0.01
BASE: dict[str, Any] = {
    "task": "digits/A",
    "eps": 0.1,
    "suite": "quick",
    "epochs": 8,
    "train_images": 800,
    "eval_images": 100,
    "cheap_images": 40,
    "classifier_epochs": 10,
    "wandb": "disabled",
}
KNOBS = {"conv_maps": 4, "decoder_maps": 4, "dense": 32, "latent": 8, "batch_size": 32, "learning_rate": 0.02}
ARMS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, without the known start": {},
    "ours, median rule": {"stopping": "median"},
    "ours, nobody stopped": {"stopping": "none"},
    "random": {"method": "random", "stopping": "none"},
    "random, halving": {"method": "random"},
}
"""The arms to compare. The paper's best setting is tried first, except in arms named `without` or `random`."""


def study_of(storage: Path, name: str, **fields: Any) -> Study:
    """Return a search over the paper's values of lambda_rc, lambda_kl, lambda_ce and sigma_eps."""
    knobs = KNOBS | fields.pop("knobs", {})
    return make_study(
        {"name": name, "space": "paper", "trials": 216, "storage": str(storage), "knobs": knobs} | BASE | fields
    )


def grid_of(storage: Path, seed: int) -> Study:
    return study_of(storage, f"grid-{seed}", method="grid", stopping="none", seed=seed)


@dataclass(frozen=True)
class Training:
    """The result of one training of a grid: the rung score of each epoch, and a candidate for each sigma_eps."""

    curve: Sequence[float]
    candidates: Sequence[Candidate]


@dataclass(frozen=True)
class Table:
    """A finished grid.

    Args:
        trainings: the trainings by their train-time knobs.
        best: the best attacked accuracy within the constraints.
        epochs: total number of epochs.
    """

    undefended: Candidate
    trainings: Mapping[str, Training]
    best: float
    epochs: int

    @classmethod
    def of(cls, study: Study) -> Table:
        """Read the grid from its study, without failed trainings.

        Raises:
            InputError: the grid is not finished.
        """
        history, found = SearchHistory(study), dict[str, list[Candidate]]()
        whole = history.space.trainings()
        if history.ended() != whole:
            raise InputError(
                f"a table needs a finished grid, but {study.name} has {history.ended()} of {whole} trainings"
            )
        for candidate in history.candidates():
            found.setdefault(Table.key(candidate.params), []).append(candidate)
        curves = {
            Table.key(history.space.complete(trial.params)): [score for _, score in trial.user_attrs["curve"]]
            for trial in history.trials()
            if state_of(trial) == "finished"
        }
        trainings = {key: Training(curves[key], candidates) for key, candidates in found.items()}
        undefended = history.undefended()
        assert undefended is not None
        best = max(c.score.attacked_accuracy for c in feasible(study, history.candidates()))
        return cls(undefended, trainings, best, sum(len(training.curve) for training in trainings.values()))

    @staticmethod
    def key(params: Params) -> str:
        """Return the key of a training."""
        return json.dumps(dict(params.train), sort_keys=True)

    def work(self) -> Work:
        """Return workers that look up the result of a training in the table."""

        def execute(study: Study, proposal: Proposal, report: Report) -> dict[str, Any]:
            training = self.trainings[Table.key(proposal.params)]
            fit = training.candidates[0].fit
            for epoch, score in enumerate(training.curve, start=1):
                report(fit, epoch, {"cheap": score})
            first = sorted(training.candidates, key=lambda c: c.params.inference != proposal.params.inference)
            return {"candidates": [c.to_json() for c in first], "curve": training.curve, "picture": ""}

        def remeasure(study: Study, candidate: Candidate) -> Latency:
            score = candidate.score
            return Latency(score.latency_ms_p50, score.latency_ms_p95, score.latency_ms_p50, 0.0, score.device, 1)

        return Work(
            lambda study: [], lambda study, architecture: None, lambda study: self.undefended, execute, remeasure
        )


class Spent(NamedTuple):
    """The cost of a search until it reached the goal, or its total cost if it did not."""

    trainings: int
    epochs: int
    reached: bool


class Meter(Callback):
    """Counts trainings and epochs, and ends the search when a candidate within the constraints reaches the goal."""

    def __init__(self, study: Study, goal: float) -> None:
        self.study = study
        self.goal = goal
        self.spent = Spent(0, 0, False)

    def trial_started(self, trial: Proposal) -> None:
        self.spent = self.spent._replace(trainings=self.spent.trainings + 1)

    def epoch_ended(self, trial: Proposal, epoch: int, metrics: Metrics) -> None:
        self.spent = self.spent._replace(epochs=self.spent.epochs + 1)

    def trial_ended(
        self, trial: Proposal, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        good = feasible(self.study, candidates)
        if good and max(candidate.score.attacked_accuracy for candidate in good) >= self.goal - 1e-9:
            self.spent = self.spent._replace(reached=True)
            raise KeyboardInterrupt  # ends the search as Ctrl-C does


def spend(study: Study, goal: float, work: Work = REAL, *, starts: bool = True) -> Spent:
    """Search until a candidate reaches `goal`, an attacked accuracy, and return the cost."""
    meter = Meter(study, goal)
    with mock.patch.object(puvae, "STARTS", puvae.STARTS if starts else ()):
        run(study, [meter], debug=True, work=work)
    return meter.spent


def quickly(do: Callable[[], T]) -> T:
    """Call `do` without cheap gates and pictures, which take longer than these trainings."""
    with (
        mock.patch.object(evaluator, "quick_gates", lambda *args, **kwargs: ()),
        mock.patch.object(TrialRunner, "picture", lambda runner, params, path: path),
    ):
        return do()


def replays(table: Table, seeds: Sequence[int], arm: str) -> list[Spent]:
    """Replay a search on the table of a grid with each sampler seed."""
    found = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            study = study_of(Path(folder), "replay", seed=seed, **ARMS[arm])
            known = arm.startswith("ours") and "without" not in arm
            found.append(spend(study, table.best - POINT, table.work(), starts=known))
    return found


def row(name: str, found: Sequence[Sequence[Spent]], tables: Sequence[Table]) -> str:
    """Return a line of the table: median epochs (trainings) for each grid and overall, and the fraction of the grid."""
    cells = [f"{median(s.epochs for s in spent):.0f} ({median(s.trainings for s in spent):.0f})" for spent in found]
    shares = [s.epochs / table.epochs for spent, table in zip(found, tables, strict=True) for s in spent]
    missed = sum(not s.reached for spent in found for s in spent)
    every = [s for spent in found for s in spent]
    whole = f"{median(s.epochs for s in every):.0f} ({median(s.trainings for s in every):.0f})"
    return f"| {name} | {' | '.join(cells)} | {whole} | {median(shares):.3f} | {missed} of {len(every)} |"


def header(seeds: Sequence[int], tables: Sequence[Table]) -> str:
    """Return the header of the table and the line of the grids themselves."""
    cells = [f"{table.epochs} ({len(table.trainings)}), best {100 * table.best:.0f} %" for table in tables]
    head = f"| epochs (trainings) | {' | '.join(f'seed {seed}' for seed in seeds)} | median | of the grid | missed |"
    return f"{head}\n|{' --- |' * (len(seeds) + 4)}\n| the whole grid | {' | '.join(cells)} | | 1 | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("grid", "search", "continuous"))
    parser.add_argument("seeds", type=int, nargs="+", help="of the trainings")
    parser.add_argument("--storage", type=Path, default=Path("quality"))
    parser.add_argument("--samplers", type=int, default=5, help="searches of each grid, each with its own seed")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    asked = parser.parse_args()
    grids = [grid_of(asked.storage, seed) for seed in asked.seeds]
    if asked.what == "grid":
        for grid in grids:
            print(grid.name, quickly(lambda grid=grid: run(grid, [], debug=True)), flush=True)  # type: ignore[misc]
        return
    tables = [Table.of(grid) for grid in grids]
    print(header(asked.seeds, tables), flush=True)
    if asked.what == "search":
        for arm in asked.arms:
            found = [
                replays(table, [1000 * seed + i for i in range(asked.samplers)], arm)
                for seed, table in zip(asked.seeds, tables, strict=True)
            ]
            print(row(arm, found, tables), flush=True)
        return
    for space in ("wide", "default"):
        found = []
        for seed, table in zip(asked.seeds, tables, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                knobs = {"label_injection": "dense"}
                study = study_of(Path(folder), space, space=space, trials=60, seed=seed, knobs=knobs)
                goal = table.best - POINT
                found.append([quickly(lambda study=study, goal=goal: spend(study, goal))])  # type: ignore[misc]
        print(row(f"ours, the ranges of `{space}`", found, tables), flush=True)


if __name__ == "__main__":
    main()
