"""Trainings in bfloat16 beside the same in float32: accuracies by seed and the time of a step, as Markdown tables.

    python -m benchmarks.precision --storage /tmp/precision              accuracies, about an hour on one core; resumes
    python -m benchmarks.precision --storage /tmp/precision --steps      seconds of CPU per step, in turns, minutes

Each defense is trained by its space's usual setting, with its classifiers, in both precisions from the same seeds, and
judged in float32 under white-box attack (suite quick, L-inf eps 0.1).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from search.study.loading import make_study
from search.trial.runner import TrialRunner, run_trial
from search.trial.timing import Step
from search.trial.training import silent

DEFENSES = "puvae", "advae", "gmvae", "defense_vae"
PRECISIONS = "float32", "bfloat16"
KNOBS: Mapping[tuple[str, str], dict[str, Any]] = {
    ("puvae", "mnist"): {"conv_maps": 4, "decoder_maps": 8, "dense": 512, "batch_size": 16},
    ("defense_vae", "digits"): {"kl_weight": 1e-3},  # with the usual 1 its posterior collapses on so few pixels
}
SIZES: Mapping[str, dict[str, Any]] = {
    "digits": {"task": "digits/A"},
    "mnist": {"task": "mnist/A", "train_images": 4000, "epochs": 4, "eval_images": 200},
}
FIGURES = "clean_accuracy", "white_box_accuracy"


def runner_of(storage: Path, defense: str, size: str, precision: str, seed: int) -> TrialRunner:
    fields = {"defense": defense, "precision": precision, "seed": seed, "storage": str(storage), "wandb": "disabled"}
    knobs = KNOBS.get((defense, size), {})
    study = make_study({"suite": "quick", "eps": 0.1, "trials": 1, **SIZES[size], **fields, "knobs": knobs})
    return TrialRunner.of(study, study.store.make())


def accuracies(storage: Path, defense: str, size: str, precision: str, seed: int) -> dict[str, Any]:
    runner = runner_of(storage, defense, size, precision, seed)
    space, begin = runner.study.resolved.space, time.process_time()
    params = space.setting(space.usual_of)
    found, *_ = run_trial(runner.study, params, runner.assets.store, silent, alone=True)
    row = {"defense": defense, "size": size, "precision": precision, "seed": seed}
    return row | {name: getattr(found.score, name) for name in FIGURES} | {"cpu_s": time.process_time() - begin}


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines: mean (deviation over the seeds) in each precision, and the paired difference with its error."""
    yield "| defense | size | accuracy | float32 | bfloat16 | difference (standard error) |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for defense, size, figure in product(DEFENSES, SIZES, FIGURES):
        ours = [row for row in rows if (row["defense"], row["size"]) == (defense, size)]
        by = {p: {row["seed"]: 100 * row[figure] for row in ours if row["precision"] == p} for p in PRECISIONS}
        seeds = sorted(by["float32"].keys() & by["bfloat16"].keys())
        if len(seeds) > 1:
            cells = [f"{mean(by[p][s] for s in seeds):.1f} ({stdev(by[p][s] for s in seeds):.1f})" for p in PRECISIONS]
            differ = [by["bfloat16"][s] - by["float32"][s] for s in seeds]
            cells.append(f"{mean(differ):+.1f} ({stdev(differ) / sqrt(len(seeds)):.1f}, {len(seeds)} seeds)")
            yield f"| {defense} | {size} | {figure.removesuffix('_accuracy')} | {' | '.join(cells)} |"


class CpuStep(Step):
    """Times in seconds of this process's CPU, which neighbours do not change."""

    def _now(self) -> float:
        return time.process_time()


def steps(storage: Path, turns: int = 3) -> Iterator[str]:
    """Yield the lines: how many times as fast training is in bfloat16, medians of `turns` taken in turns."""
    yield "| defense | data | training | its classifier |"
    yield "| --- | --- | --- | --- |"
    usual = product(("default",), DEFENSES, ("mnist/A", "digits/A"))
    for space, defense, task in (("paper", "puvae", "mnist/A"), *usual):
        took: dict[str, list[tuple[float, float]]] = {precision: [] for precision in PRECISIONS}
        for _, precision in product(range(turns), PRECISIONS):
            fields = {"defense": defense, "task": task, "space": space, "precision": precision}
            study = make_study({**fields, "storage": str(storage)})
            step = CpuStep(TrialRunner(study, study.store))
            took[precision].append((step.classifier(), step.training().epoch))
        classifier, fit = (
            median(row[i] for row in took["float32"]) / median(row[i] for row in took["bfloat16"]) for i in (0, 1)
        )
        yield f"| {defense}, {space} | {task} | {fit:.2f} | {classifier:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--defenses", nargs="+", default=DEFENSES)
    parser.add_argument("--sizes", nargs="+", default=tuple(SIZES))
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3, 4, 5))
    args = parser.parse_args()
    if args.steps:
        for line in steps(args.storage):
            print(line, flush=True)
        return
    log = args.storage / "precision.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    done = {(row["defense"], row["size"], row["precision"], row["seed"]) for row in rows}
    for seed, size, defense, precision in product(args.seeds, args.sizes, args.defenses, PRECISIONS):
        if (defense, size, precision, seed) not in done:
            rows.append(accuracies(args.storage, defense, size, precision, seed))
            with log.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
