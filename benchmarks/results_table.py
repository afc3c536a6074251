"""The table of docs/results.md: every defense x attack x knowledge on one task, with rejection and latency.

    python -m benchmarks.results_table run advae --storage runs   trains (or loads) and attacks; repeat for each defense
    python -m benchmarks.results_table table --storage runs          prints the table of these runs
    python -m benchmarks.results_table latency   times all of them in one quiet run, ours and paper-sized
    python -m benchmarks.results_table curve --storage runs   Defense-GAN's accuracy over time, from one projection

Each attack runs separately on all images: the number is the accuracy under this attack. White-box takes, for each
image, the worst case over the defense's gradient sources, with EOT if the defense draws noise.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import defenses
from attacks.attack import Attack
from attacks.catalog import CW_L2, FGSM, IFGSM, PGD_40
from attacks.evaluation import observe
from attacks.gradient_view import View
from attacks.suites import Suite
from attacks.threat import ThreatModel
from attacks.verdicts import Observation, Verdict
from defenses.base import Defended, Defense
from defenses.defense_gan import DefenseGAN
from search.classifiers.architectures import ARCHITECTURES
from search.classifiers.task import find_task
from search.data import splits
from search.study.candidate import Images
from search.study.loading import make_study
from search.trial.device_lock import DeviceLock
from search.trial.latency import device_name, measure
from search.trial.runner import TrialRunner
from spaces.space import SearchSpace

KNOBS: dict[str, dict[str, Any]] = {
    "identity": {},
    "puvae": {"lambda_rc": 1.0, "lambda_kl": 2.0, "conv_maps": 8, "decoder_maps": 16, "learning_rate": 2e-3,
              "batch_size": 32, "epochs": 4},
    "gmvae": {"alpha": 15.0, "maps": 16, "batch_size": 32, "epochs": 15},
    "advae": {"lambda_rec": 0.2, "architecture": "unet", "levels": 2, "maps": 8, "pgd_steps": 4, "pgd_step_size": 0.15,
              "batch_size": 64, "learning_rate": 3e-3, "epochs": 8},
    "defense_vae": {"attacks": "fgsm+rand", "maps": 16, "learning_rate": 2e-3, "epoch_share": 0.25, "epochs": 6},
    "defense_gan": {"latent": 64, "maps": 16, "learning_rate": 1e-3, "batch_size": 32, "critic_steps": 3, "epochs": 20,
                    "steps": 25, "restarts": 2, "rate": 30.0},
    "magnet": {"batch_size": 64, "epochs": 60},
    "hgd": {"attack": "pgd", "pgd_steps": 10, "strengths": 4, "maps": 16, "levels": 3, "epochs": 4},
    "diffusion": {"maps": 12, "learning_rate": 2e-3, "epochs": 8, "t_star": 0.1, "steps": 3},
    "adversarial_training": {"start": "pretrained", "pgd_steps": 4, "pgd_step_size": 0.15, "epochs": 6},
}  # fmt: skip
"""Knobs of each defense for training, where they differ from its defaults, the paper's, to fit on two cores."""


def chosen(cw_steps: int) -> tuple[Attack, ...]:
    """Return FGSM, iFGSM (10 steps of eps / 10), AdvAE's PGD (40 steps of eps / 30), AdvAE's CW-L2 with fewer steps."""
    return FGSM, IFGSM, replace(PGD_40, pace=1 / 30), replace(CW_L2, steps=cw_steps)


def opened(name: str, args: argparse.Namespace) -> TrialRunner:
    """Return the trial runner of a study with one setting."""
    study = make_study(
        {
            "name": "results",
            "defense": name,
            "task": args.task,
            "space": "paper",
            "knobs": {**_first_of(name), **KNOBS.get(name, {}), **dict(args.knobs)},
            "threat": "oblivious",
            "train_images": args.train_images,
            "eval_images": args.eval_images,
            "cheap_images": 64,
            "classifier_epochs": 6,
            "storage": args.storage,
            "wandb": "disabled",
        }
    )
    return TrialRunner(study, study.store)


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train one defense and attack it; return its row of the table."""
    runner = opened(name, args)
    params = runner.assets.resolved.space.complete({})
    start = time.monotonic()
    key, defense = runner.trainer.fit(
        params, lambda epoch, metrics: print(f"{name} epoch {epoch}: {metrics}", flush=True)
    )
    seconds = time.monotonic() - start
    latency = runner.scorer.latency(defense)
    target, evaluator = Defended(defense, runner.assets.target), runner.assets.evaluator
    white = replace(evaluator.threat, knowledge="white-box")
    row: dict[str, Any] = {
        "defense": name,
        "fit": key,
        "knobs": params.flat(),
        "seconds": seconds,
        "latency": latency.to_json(),
        "images": {"oblivious": len(evaluator.y_N), "white-box": args.white_images},
    }
    for attack in chosen(args.cw_steps):
        made = {attack.name: runner.assets.adversarial(attack, evaluator.x_NCHW, evaluator.y_N, evaluator.threat)}
        nothing = Suite(name="", oblivious=(), white_box=(), draws=1)
        blind = observe(nothing, target, evaluator.x_NCHW, evaluator.y_N, evaluator.threat, oblivious=made)
        x, y = evaluator.x_NCHW[: args.white_images], evaluator.y_N[: args.white_images]
        alone = Suite(name="", oblivious=(), white_box=(attack,), draws=args.draws)
        seen = observe(alone, target, x, y, white, oblivious={})
        row.setdefault("clean", _figures(blind.judge().clean))
        row[attack.name] = {"oblivious": _figures(_all(blind)), "white-box": _figures(_all(seen))}
        print(name, attack.name, row[attack.name], flush=True)
    return row


def _all(found: Observation) -> Verdict:
    """Return the verdict over every version, including those of CW, which has no eps bound."""
    versions = (found.clean, *found.oblivious.values(), *(found.white_box or {}).values())
    return reduce(and_, (Verdict.of(seen, found.limits_S) for seen in versions))


@torch.no_grad()
def curve(args: argparse.Namespace) -> str:
    """Return Defense-GAN's accuracy under oblivious iFGSM by number of steps, and the seconds per step."""
    runner = opened("defense_gan", args)
    _, defense = runner.trainer.fit(runner.assets.resolved.space.complete({}), lambda epoch, metrics: None)
    assert isinstance(defense, DefenseGAN)
    made = runner.assets.adversarial(
        IFGSM, runner.assets.evaluator.x_NCHW, runner.assets.evaluator.y_N, runner.assets.evaluator.threat
    )
    at = (0, 1, 2, 5, 10, 25, 50, 100, 200)
    lines = [
        "| restarts | " + " | ".join(f"L {steps}" for steps in at) + " | s / step |",
        "| --- " * (len(at) + 2) + "|",
    ]
    for restarts in (1, 2, 10):
        defense.at({**runner.assets.resolved.space.usual(), "restarts": restarts})
        torch.manual_seed(0)
        start = time.monotonic()
        projected = defense.trajectory(made[:128], at)
        seconds = (time.monotonic() - start) / max(at)
        found = [
            (runner.assets.target(x).argmax(1) == runner.assets.evaluator.y_N[:128]).float().mean() for x in projected
        ]
        lines.append(f"| {restarts} | " + " | ".join(f"{100 * a:.0f}" for a in found) + f" | {seconds:.3f} |")
    return "\n".join(lines)


def latency(args: argparse.Namespace) -> str:
    """Return the purification latency at batch 128 of every defense: at the size trained here, and at its defaults.

    Nothing is trained: no defense here takes longer for other weights. The images are validation images, and the same
    under iFGSM on an untrained classifier. Defense-GAN's default, 200 steps, takes minutes per batch on a CPU: it
    is timed at 2 steps, which are 3 evaluations, and multiplied, because all steps cost the same.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = find_task(args.task)
    bare = ARCHITECTURES[task.classifier].build(task.shape).to(device).eval().requires_grad_(False)
    x_NCHW, y_N = (part.to(device) for part in splits.load(task.dataset, "validation", None, args.eval_images))
    attacked_NCHW = IFGSM.craft(View(bare), x_NCHW, y_N, ThreatModel("Linf", task.eps, "oblivious"), 0)
    lines = [f"| defense | ms, as trained here | ms, default size | on {device_name(device)} |", "| --- " * 4 + "|"]
    for name in args.names or defenses.names():
        family, cells = defenses.find(name), []
        space = SearchSpace.of(family)
        for knobs in (KNOBS.get(name, {}), {}):
            values = {**space.defaults, **knobs}
            slow = name == "defense_gan" and not knobs
            inference = {n: values[n] for n in space.inference} | ({"steps": 2} if slow else {})
            defense = family({n: values[n] for n in space.train}, inference, task.shape).to(device)
            if type(defense).adopt is not Defense.adopt:
                defense.adopt(bare)
            images: dict[Images, Tensor] = {"clean": x_NCHW, "attacked": attacked_NCHW}
            ms = measure(Defended(defense, bare), images, DeviceLock(device)).ms_p50
            cells.append(f"{67 * ms:.0f} (67 x {ms:.0f})" if slow else f"{ms:.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


def _figures(verdict: Any) -> dict[str, float]:
    return {"accuracy": verdict.accuracy, "error": verdict.error, "rejection": verdict.rejection}


def _first_of(name: str) -> dict[str, Any]:
    """Return the default of each knob, which reduces the paper's grids to one setting."""
    return dict(SearchSpace.of(defenses.find(name)).defaults)


def _cell(figures: dict[str, float]) -> str:
    accuracy, error = (f"{100 * figures[kind]:.1f}" for kind in ("accuracy", "error"))
    return f"{accuracy} / {error}" if figures["rejection"] else accuracy


def table(args: argparse.Namespace) -> str:
    """Return the Markdown table in percent: accuracy, and also the error if images are rejected."""
    rows = [json.loads(path.read_bytes()) for path in sorted((Path(args.storage) / "results").glob("*.json"))]
    names = [key for key in rows[0] if isinstance(rows[0][key], dict) and "oblivious" in rows[0][key]]
    names.remove("images")
    heads = ["defense", "clean", *(f"{n} OBL" for n in names), *(f"{n} WB" for n in names), "rejected: clean, OBL, WB"]
    lines = ["| " + " | ".join([*heads, "ms / 128"]) + " |", "| --- " * (len(heads) + 1) + "|"]
    for row in rows:
        cells = [row["defense"], _cell(row["clean"])]
        cells += [_cell(row[n][k]) for k in ("oblivious", "white-box") for n in names]
        most = {k: max(row[n][k]["rejection"] for n in names) for k in ("oblivious", "white-box")}
        rejected = (row["clean"]["rejection"], most["oblivious"], most["white-box"])
        cells += [" / ".join(f"{100 * r:.1f}" for r in rejected), f"{row['latency']['ms_p50']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "curve", "latency"])
    parser.add_argument("names", nargs="*", help="defenses; else all")
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--task", default="mnist/A")
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--eval-images", type=int, default=200)
    parser.add_argument("--white-images", type=int, default=100)
    parser.add_argument("--cw-steps", type=int, default=100)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--knobs", nargs="*", default=[], type=lambda text: tuple(text.split("=", 1)))
    args = parser.parse_args()
    args.knobs = [(name, json.loads(value)) for name, value in args.knobs]
    folder = Path(args.storage) / "results"
    folder.mkdir(parents=True, exist_ok=True)
    if args.what != "run":
        print({"table": table, "curve": curve, "latency": latency}[args.what](args))
        return
    torch.manual_seed(0)
    for name in args.names or defenses.names():
        (folder / f"{name}.json").write_text(json.dumps(run(name, args), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
