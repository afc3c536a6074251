"""The overhead of the engine: simulated trials without training, compared with a Ray Tune + OptunaSearch script.

    python -m benchmarks.engine_overhead   all of it: an hour on two cores
    python -m benchmarks.engine_overhead --only trials --trials 64 --repeats 1 --instant 0        a few minutes
    python -m benchmarks.engine_overhead --only proposals --methods tpe --upto 1000
    python -m benchmarks.engine_overhead --json                                           the rows as JSON, one per line

A simulated trial sleeps, reports its epochs, and returns made-up scores of six candidates; everything else is the real
engine: Ray's workers, Optuna's journal, candidates.csv, W&B (offline) and the display (piped). The plain script sleeps
as long and reports two numbers. Each run is a separate process; within a repeat the ways run one after the other. `of
ideal` is the time from the first trial's start, divided by the trials' sleep on four slots.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.simulated import CPUS, EPOCHS, LAMBDAS, Pulse, Timed, resident, simulated, sweep, working
from search import session
from search.engine.run import run
from search.optimizer.proposer import Proposer
from search.tracking.csv_log import CsvLog
from search.tracking.live_table import LiveTable
from search.tracking.wandb_tracker import WandbTracker


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The cost of a proposal with so many candidates, in ms of CPU: the median of ten, or one that took too long."""

    method: str
    candidates: int
    propose_ms: float
    finish_ms: float
    driver_mib: float


def ours(storage: Path, trials: int, seconds: float, *, method: str = "tpe", debug: bool = False) -> Timed:
    """Run a search as `launch.py search` does, with a piped display, and time it."""
    study, pulse = simulated(storage, trials=trials, method=method), Pulse()
    with (storage / "display.txt").open("w", encoding="utf-8") as shown:
        display = LiveTable(Console(file=shown), study, list(study.resolved.space.searched()), EPOCHS, 0)
        tracker = WandbTracker(study.wandb, study.folder, lambda line: print(line, file=shown))
        listeners = [CsvLog(study.folder / "candidates.csv", []), tracker, display, pulse]
        with closing(tracker):
            run(study, listeners, work=working(seconds), debug=debug)
    wall = time.perf_counter() - pulse.called
    session.write_report(study)
    return pulse.timed(f"ours, {method}", trials, seconds, wall, time.perf_counter() - pulse.called - wall)


def plain(storage: Path, trials: int, seconds: float, *, reuse: bool) -> Timed:
    """Run a typical script with Ray Tune and Optuna, with the defaults of Tune except for `reuse`."""
    import ray  # not at the top: the engine of `ours` changes the defaults of Tune
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    pulse = Pulse()

    class Hears(tune.Callback):
        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            pulse.trial_started()

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            pulse.trial_ended()

    def trainable(config: dict[str, Any]) -> None:
        for _ in range(EPOCHS):
            time.sleep(seconds / EPOCHS)
            tune.report({"error": abs(math.log10(config["lambda_rc"])) / 3, "latency": float(config["conv_maps"])})

    space = {name: tune.loguniform(1e-3, 1e3) for name in LAMBDAS}
    space |= {"conv_maps": tune.lograndint(4, 65), "decoder_maps": tune.lograndint(8, 65)}
    ray.init(address="local", include_dashboard=False)
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": CPUS}),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(metric=["error", "latency"], mode=["min", "min"]),
            num_samples=trials,
            reuse_actors=reuse,
        ),
        run_config=tune.RunConfig(storage_path=str(storage), callbacks=[Hears()]),
    ).fit()
    ray.shutdown()
    wall = time.perf_counter() - pulse.called
    return pulse.timed("Ray Tune, reuse_actors" if reuse else "Ray Tune", trials, seconds, wall)


WAYS: dict[str, Callable[[Path, int, float], Timed]] = {
    "ours": ours,
    "random": partial(ours, method="random"),
    "reuse": partial(plain, reuse=True),
    "plain": partial(plain, reuse=False),
}


def alone(way: str, trials: int, seconds: float) -> Timed:
    """Run one way in a separate process, without its output."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_quietly, way, trials, seconds).result()


def _quietly(way: str, trials: int, seconds: float) -> Timed:
    with tempfile.TemporaryDirectory() as folder:
        with (
            (Path(folder) / "printed.txt").open("w", encoding="utf-8") as printed,
            redirect_stdout(printed),
            redirect_stderr(printed),
        ):
            return WAYS[way](Path(folder), trials, seconds)


def proposals(method: str, upto: int, patience_s: float) -> Iterator[Asked]:
    """Yield the cost of a proposal for growing numbers of candidates, until one takes more than `patience_s` of CPU."""
    marks = [10 * 3**power for power in range(20) if 10 * 3**power < upto] + [upto]
    with tempfile.TemporaryDirectory() as folder:
        study = simulated(Path(folder), trials=upto, method=method)
        proposer, costs, told = Proposer(study), list[tuple[float, float]](), 0
        while marks:
            start = time.process_time()
            proposal = proposer.propose()
            assert proposal is not None
            asked = time.process_time()
            candidates = sweep(proposal.params)
            begin = time.process_time()
            proposer.finish(proposal.name, candidates, {})
            costs.append((asked - start, time.process_time() - begin))
            told += len(candidates)
            late = costs[-1][0] > patience_s
            if told >= marks[0] or late:
                propose, finish = (1e3 * median(each) for each in zip(*costs[-1 if late else -10 :], strict=True))
                yield Asked(method=method, candidates=told, propose_ms=propose, finish_ms=finish, driver_mib=resident())
                marks = [] if late else [mark for mark in marks if mark > told]


def table(rows: Sequence[Timed]) -> str:
    """Return the runs as a Markdown table, with the median run of each kind."""
    lines = [
        "| trials | way | start s | trials s | of ideal | wall s | report s | ms each, by quarter | driver MiB | load |"
    ]
    lines.append("| --- " * 10 + "|")
    for key in dict.fromkeys((row.trials, row.seconds, row.way) for row in rows):
        alike = [row for row in rows if (row.trials, row.seconds, row.way) == key]
        row = sorted(alike, key=lambda row: row.trials_s)[len(alike) // 2]
        ideal = f"{row.trials_s / row.ideal:.2f}" if row.ideal else "-"
        cells = [f"{row.trials} of {row.seconds:g} s", row.way, f"{row.start:.1f}", f"{row.trials_s:.1f}", ideal]
        cells += [f"{row.wall:.1f}", f"{row.report:.1f}" if row.report else "-"]
        cells += [", ".join(f"{value:.0f}" for value in column) for column in (row.each_ms, row.driver_mib)]
        lines.append("| " + " | ".join([*cells, f"{row.load:.1f}"]) + " |")
    return "\n".join(lines)


def asked_table(rows: Sequence[Asked]) -> str:
    """Return the costs of proposals as a Markdown table."""
    lines = ["| method | candidates | propose, CPU ms | finish, CPU ms | process MiB |", "| --- " * 5 + "|"]
    for row in rows:
        costs = f"{row.propose_ms:.0f} | {row.finish_ms:.0f} | {row.driver_mib:.0f}"
        lines.append(f"| {row.method} | {row.candidates:,} | {costs} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["trials", "proposals"], help="else both")
    parser.add_argument("--ways", nargs="+", default=["ours", "reuse", "plain"], choices=list(WAYS))
    parser.add_argument("--trials", nargs="+", type=int, default=[64, 256], help="of a second")
    parser.add_argument(
        "--instant", type=int, default=2000, help="trials of no time, of ours alone, drawn at random; 0 for none"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of the fewest trials; the others run once")
    parser.add_argument("--methods", nargs="+", default=["tpe", "nsga2", "gp", "random"])
    parser.add_argument("--upto", type=int, default=10_000, help="candidates")
    parser.add_argument("--patience", type=float, default=2.0, help="seconds of CPU for a proposal")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    timed: list[Timed] = []
    asked: list[Asked] = []
    if args.only != "proposals":
        plans = [(trials, 1.0) for trials in [min(args.trials)] * (args.repeats - 1) + sorted(args.trials)]
        runs = [(way, *resolved) for resolved in plans for way in args.ways]
        for what in runs + ([("random", args.instant, 0.0)] if args.instant else []):
            timed.append(alone(*what))
            if args.json:
                print(json.dumps(asdict(timed[-1])), flush=True)
    for method in args.methods if args.only != "trials" else ():
        for row in proposals(method, args.upto, args.patience):
            asked.append(row)
            if args.json:
                print(json.dumps(asdict(row)), flush=True)
    if not args.json:
        print("\n\n".join(shown for shown in (timed and table(timed), asked and asked_table(asked)) if shown))


if __name__ == "__main__":
    main()
