"""Time to quality: what a search costs until its winner is within one point of the whole grid's, beside others' tools.

    python -m benchmarks.time_to_quality --seeds 20 --out ours.jsonl        our searches on the tables; resumes
    python -m benchmarks.time_to_quality --table ours.jsonl peers.jsonl     the tables of docs/engine.md

The tables (`benchmarks/tables`, made by `benchmarks.quality_tables`) hold real trainings, so a search trains nothing:
each proposal gets the curve, the verdicts and the cost of its training in the table, also if it is stopped. The search
itself is the product's, with its proposals, early stopping and race; one trial runs at a time. It sees the judged
images, and its incumbent is measured on the held-out ones. `benchmarks/peers.py` runs the searches of others.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import exp, inf, log
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any
from unittest import mock

import numpy as np

import spaces
from attacks.threat import ThreatModel
from benchmarks.replay import FOLDER, Replay, Spent, Step, Table, reached, regret
from search.engine.run import run
from search.engine.worker import Report, Work
from search.storage.fingerprint import fingerprint
from search.study.candidate import Candidate, Latency, Proposal, Score
from search.study.loading import make_study
from search.study.study import Study
from search.trial.race import Entrant, contenders, first_images
from spaces.space import Params

THREAT = ThreatModel("Linf", 0.1, "white-box")
SHARES = 0.05, 0.1, 0.2
ARMS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, without the race": {"scoring": "all"},
    "ours, nobody stopped": {"stopping": "none"},
    "TPE, halving (the default until 2026-11)": {"method": "tpe", "scoring": "all"},
    "TPE": {"method": "tpe", "stopping": "none", "scoring": "all"},
    "random": {"method": "random", "stopping": "none", "scoring": "all"},
}


def study_of(table: Table, storage: Path, arm: str, seed: int) -> Study:
    """Return a search over the values of a table's grid."""
    default = {"method": "forecast", "stopping": "halving", "trials": len(table.trainings)}
    fields = {**table.fields, **default, **ARMS[arm], "seed": seed, "storage": str(storage), "name": "replay"}
    return make_study(fields)


def work(table: Table, replay: Replay, scoring: str) -> Work:
    """Return workers that look up the result of a training, and pay for it."""

    def execute(study: Study, proposal: Proposal, report: Report) -> dict[str, Any]:
        levels = {name: values.index(proposal.params.train[name]) for name, values in table.values.items()}
        training, settings = table.place(levels), range(len(table.settings))
        for epoch in range(1, table.epochs + 1):
            report("fit", epoch, {"cheap": replay.train(training, epoch)})
        first = table.settings.index(dict(proposal.params.inference))
        kept, count = list(settings), first_images(table.images)
        if scoring == "race" and len(kept) > 1:
            for setting in settings:
                replay.attack(training, setting, count)
            verdicts = [table.judged_TSN[training, setting, :count].astype(float) for setting in settings]
            entrants = [Entrant(verdicts_N, 1.0) for verdicts_N in verdicts]
            kept = sorted({first, *contenders(entrants, [rival[1:] for rival in proposal.rivals])})
        kept.sort(key=lambda setting: setting != first)
        found = []
        for setting in kept:
            accuracy = replay.attack(training, setting, table.images)
            clean = float(table.clean_TSN[training, setting].mean())
            found.append(
                candidate(Params(proposal.params.train, table.settings[setting]), accuracy, clean, table.images)
            )
        return {"candidates": [one.to_json() for one in found], "curve": list(table.curve_TE[training]), "picture": ""}

    undefended = candidate(Params({}, {}), 0.0, 1.0, table.images)
    latency = Latency(1.0, 1.0, 1.0, 0.0, "table", 1)
    return Work(
        lambda study: [],
        lambda study, architecture: None,
        lambda study: 0.0,
        lambda study: undefended,
        execute,
        lambda study, candidate: latency,
    )


def candidate(params: Params, accuracy: float, clean: float, images: int) -> Candidate:
    fit, name = fingerprint(**params.train), fingerprint(**params.flat())
    score = Score(
        threat=THREAT,
        attacked_accuracy=accuracy,
        attacked_error=1 - accuracy,
        attacked_rejection=0.0,
        oblivious_accuracy=accuracy,
        white_box_accuracy=accuracy,
        clean_accuracy=clean,
        clean_rejection=0.0,
        latency_ms_p50=1.0,
        latency_ms_p95=1.0,
        images=images,
        device="table",
    )
    return Candidate(candidate=name, fit=fit, defense="table", task="table", params=params, score=score)


def replayed(table: Table, arm: str, seed: int, cap: float) -> list[Step]:
    """Return the trail of one search, without settings that are known to be good: peers have none either."""
    replay = Replay(table, cap)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(spaces, "starts", lambda defense: ()):
        study = study_of(table, Path(folder), arm, seed)
        with suppress(Spent):
            run(study, [], debug=True, work=work(table, replay, study.scoring))
    return replay.trail


def tables(names: Sequence[str]) -> list[Table]:
    return [Table(FOLDER / f"{name}.npz") for name in names]


def rows_of(paths: Sequence[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def lines(rows: Sequence[Mapping[str, Any]], every: Sequence[Table]) -> Iterator[str]:
    """Yield a Markdown table: cost to the goal as a share of the grid's, how often it was reached, regrets in points.

    The geometric mean is that of the medians, where each table has one.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    yield f"| search | {' | '.join(table.name for table in every)} | reached | geometric mean | regret at 5, 10, 20 % |"
    yield f"|{' --- |' * (len(every) + 4)}"
    for arm in arms:
        cells, medians, regrets, found = [], [], [], list[float]()
        for table in every:
            own = (row["trail"] for row in rows if (row["arm"], row["table"]) == (arm, table.name))
            trails = [[Step(*step) for step in trail] for trail in own]
            if not trails:
                cells.append("-")
                continue
            costs = [reached(table, trail) for trail in trails]
            medians.append(median(costs))
            found += costs
            low, _, high = quantiles(costs, n=4) if len(costs) > 1 else (costs[0],) * 3
            cells.append(f"{_cost(median(costs))} ({_cost(low)} to {_cost(high)}; {len(costs)})")
            regrets.append([median(regret(table, trail, share) for trail in trails) for share in SHARES])
        whole = exp(fmean(map(log, medians))) if len(medians) == len(every) and inf not in medians else None
        mean = "-" if whole is None else f"{whole:.3f}"
        often = f"{sum(cost < inf for cost in found)} of {len(found)}"
        yield f"| {arm} | {' | '.join(cells)} | {often} | {mean} | {_points(regrets)} |"


def _cost(share: float) -> str:
    return "not reached" if share == inf or np.isnan(share) else f"{share:.3f}"


def _points(regrets: Sequence[Sequence[float]]) -> str:
    return ", ".join(f"{100 * fmean(column):.1f}" for column in zip(*regrets, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--tables", nargs="+", default=sorted(path.stem for path in FOLDER.glob("*.npz")))
    parser.add_argument("--out", type=Path, default=Path("ours.jsonl"))
    parser.add_argument("--cap", type=float, default=0.3, help="end of a search, as a share of the grid's cost")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these results")
    asked = parser.parse_args()
    if asked.table:
        print("\n".join(lines(rows_of(asked.table), tables(asked.tables))))
        return
    known = rows_of([asked.out]) if asked.out.exists() else []
    done = {(row["table"], row["arm"], row["seed"]) for row in known}
    for seed in range(asked.seeds):
        for table in tables(asked.tables):
            for arm in asked.arms:
                if (table.name, arm, seed) in done:
                    continue
                row = {"table": table.name, "arm": arm, "seed": seed, "trail": replayed(table, arm, seed, asked.cap)}
                with asked.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
