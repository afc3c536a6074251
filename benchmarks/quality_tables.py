"""Tables of real trainings for `benchmarks.time_to_quality`: every setting of a grid, trained and attacked once.

    python -m benchmarks.quality_tables puvae-digits --storage /tmp/tables [--part 1/2]    trains; resumes
    python -m benchmarks.quality_tables puvae-digits --storage /tmp/tables --write         benchmarks/tables/*.npz

Each training has the quick score of every epoch and, at every inference setting, a verdict on each of `JUDGED` images
that a search may see and of `JUDGED` held-out images that it does not: the ends of the training and the validation
split, on which nothing was trained. Threat model: white-box, suite `quick`.
Shapes: T trainings, E epochs, S inference settings, N images (judged ones first, then held-out ones).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attacks.gradient_view import View
from defenses.base import Defended, Metrics
from search.data import splits
from search.study.loading import make_study
from search.trial.evaluator import Evaluator
from search.trial.runner import TrialRunner

JUDGED = 300
FOLDER = Path(__file__).parent / "tables"
COMMON: Mapping[str, Any] = {
    "eps": 0.1,
    "suite": "quick",
    "method": "grid",
    "stopping": "none",
    "epochs": 8,
    "train_images": 800,
    "eval_images": 100,
    "cheap_images": 40,
    "classifier_epochs": 10,
    "precision": "float32",
    "wandb": "disabled",
    "task": "digits/A",
    "space": "default",
}
SMALL = {"conv_maps": 4, "decoder_maps": 4, "dense": 32, "latent": 8, "batch_size": 32, "learning_rate": 0.02}
TABLES: Mapping[str, Mapping[str, Any]] = {
    "puvae-digits": {"defense": "puvae", "space": "paper", "knobs": SMALL},
    "advae-digits": {
        "defense": "advae",
        "space": "paper",
        "knobs": {
            "pgd_steps": (2, 5, 10),
            "pgd_step_size": (0.02, 0.05, 0.1),
            "maps": 8,
            "learning_rate": 0.005,
        },
    },
    "defense_vae-digits": {
        "defense": "defense_vae",
        "space": "default",
        "knobs": {
            "variant": ("plain", "rec"),
            "attacks": ("fgsm+rand+cw", "fgsm+rand+cw+clean"),
            "cw_steps": 2,
            "epoch_share": 0.25,
            "kl_weight": (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
            "lambda_ce": 1.0,
            "maps": (4, 8),
            "latent": 16,
            "learning_rate": (1e-3, 2e-3, 5e-3, 1e-2),
        },
    },
    "puvae-mnist": {
        "defense": "puvae",
        "task": "mnist/A",
        "train_images": 2000,
        "epochs": 6,
        "space": "paper",
        "knobs": {
            "lambda_rc": (0.01, 0.1, 1.0, 10.0),
            "lambda_kl": (0.01, 0.1, 1.0, 10.0),
            "lambda_ce": (0.1, 1.0, 10.0, 100.0),
            "conv_maps": 4,
            "decoder_maps": 8,
            "dense": 128,
            "batch_size": 32,
            "learning_rate": 2e-3,
        },
    },
}


def fields(name: str) -> dict[str, Any]:
    """Return the fields of the table's study, without its storage."""
    return {**COMMON, "trials": 1, "name": name, **TABLES[name]}


def runner_of(storage: Path, name: str) -> TrialRunner:
    """Return a runner whose images are the table's."""
    study = make_study({**fields(name), "storage": str(storage)})
    runner = TrialRunner(study, study.store.make())
    assets, resolved = runner.assets, study.resolved
    x_NCHW, y_N = (part.to(assets.device) for part in pool(resolved.task.dataset, study.train_images or 0))
    attacks = resolved.suite.with_rungs().oblivious
    oblivious = {a.name: a.craft(View(assets.target), x_NCHW, y_N, resolved.threat, study.seed) for a in attacks}
    vars(assets)["evaluator"] = Evaluator(resolved.suite, resolved.threat, x_NCHW, y_N, oblivious, study.seed)
    return runner


def pool(dataset: str, trained: int) -> tuple[Tensor, Tensor]:
    """Return 2 x `JUDGED` images on which nothing was trained, mixed, x_NCHW and y_N."""
    sizes = splits.sizes(dataset)
    x_NCHW, y_N = splits.load(dataset, "train", None, min(sizes.train, trained + 4 * JUDGED))
    more_NCHW, more_N = splits.load(dataset, "validation", None, 2 * JUDGED if sizes.validation > 2 * JUDGED else None)
    x_NCHW, y_N = torch.cat([x_NCHW[trained:], more_NCHW]), torch.cat([y_N[trained:], more_N])
    chosen = torch.randperm(len(y_N), generator=torch.Generator().manual_seed(0))[: 2 * JUDGED]
    return x_NCHW[chosen], y_N[chosen]


def train(storage: Path, name: str, part: int, parts: int) -> None:
    """Train and attack each setting whose number is `part` modulo `parts`, unless its file is there."""
    runner = runner_of(storage, name)
    folder = storage / name
    folder.mkdir(exist_ok=True)
    every = trainings(runner)
    for number in range(part, len(every), parts):
        path = folder / f"{number:04d}.npz"
        if path.exists():
            continue
        begin, epochs = time.process_time(), list[int]()

        def report(epoch: int, metrics: Metrics, epochs: list[int] = epochs) -> None:
            epochs.append(epoch)

        key, defense = runner.trainer.fit(every[number], report)
        curve = runner.trainer.curve(key)
        assert curve, f"fit {key} was scored by another version of the code: remove it from {storage}/.store/fits"
        trained, rows = time.process_time(), list[tuple[Any, Any]]()
        for setting in runner.scorer.settings(every[number]):
            model = Defended(defense.at(setting.inference), runner.assets.target)
            verdict = runner.assets.evaluator.observe(model).judge()
            rows.append((verdict.attacked.right[0].cpu().numpy(), verdict.clean.right[0].cpu().numpy()))
        done = time.process_time()
        settings = runner.scorer.settings(every[number])
        about = {
            "train": dict(every[number].train),
            "settings": [dict(setting.inference) for setting in settings],
            "epoch_s": (trained - begin) / len(epochs) if epochs else float("nan"),
            "image_s": (done - trained) / len(rows) / (2 * JUDGED),
        }
        attacked, clean = (np.packbits(np.array(bits), axis=-1) for bits in zip(*rows, strict=True))
        with path.with_suffix(".tmp").open("wb") as file:
            np.savez_compressed(file, curve=curve, attacked=attacked, clean=clean, about=json.dumps(about))
        path.with_suffix(".tmp").rename(path)
        print(
            f"{name} {number + 1} of {len(every)}: {done - begin:.1f} s, last quick score {curve[-1]:.2f}", flush=True
        )


def trainings(runner: TrialRunner) -> list[Any]:
    """Return every training of the grid once, in the grid's order."""
    found: dict[str, Any] = {}
    for params in runner.study.resolved.space.grid():
        found.setdefault(json.dumps(dict(params.train), sort_keys=True), params)
    return list(found.values())


def write(storage: Path, name: str) -> Path:
    """Write the table of all files of the storage, which must be complete."""
    parts = [np.load(path) for path in sorted((storage / name).glob("*.npz"))]
    abouts = [json.loads(str(part["about"])) for part in parts]
    assert len(parts) == len(trainings(runner_of(storage, name))), f"{name} is not complete: {len(parts)} trainings"
    whole = {
        "fields": fields(name),
        "trainings": [about["train"] for about in abouts],
        "settings": abouts[0]["settings"],
        "judged": JUDGED,
        "epoch_s": float(np.nanmedian([about["epoch_s"] for about in abouts])),
        "image_s": float(np.median([about["image_s"] for about in abouts])),
    }
    path = FOLDER / f"{name}.npz"
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(
        path,
        about=json.dumps(whole),
        curve=np.array([part["curve"] for part in parts], np.float32),
        attacked=np.array([part["attacked"] for part in parts]),
        clean=np.array([part["clean"] for part in parts]),
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", choices=list(TABLES))
    parser.add_argument("--storage", type=Path, default=Path("/tmp/tables"))
    parser.add_argument("--part", default="1/1", help="which part of the trainings, such as 1/2")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    asked.storage.mkdir(parents=True, exist_ok=True)
    part, parts = map(int, asked.part.split("/"))
    torch.set_num_threads(1)
    for name in asked.names:
        if asked.write:
            print(write(asked.storage, name))
        else:
            train(asked.storage, name, part - 1, parts)


if __name__ == "__main__":
    main()
