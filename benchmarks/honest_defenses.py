"""Honest defenses under the audit, and an attack written apart that says whether a refusal is right: a Markdown table.

    python -m benchmarks.honest_defenses --storage /tmp/honest --seeds 1 2 3 4 5     about an hour on one core; resumes
    python -m benchmarks.honest_defenses --storage /tmp/honest --defenses magnet --sizes smoke --eps 0.1 --seeds 1

Each defense is trained on digits with the usual setting of a named space, for each seed. The attack apart shares no
code with attacks/: ascent of cross-entropy and of the margin, 100 steps each, through the model, past the purifier, on
the bare classifier, and on the distances of a defense that chooses the nearest of a candidate for each class; and for a
defense that rejects with the detectors' excess subtracted at four weights. A refusal by `baseline` is confirmed where
it leaves no 5 points fewer errors behind the defense than on the bare classifier.

Shapes: D draws, N images, C channels, H x W pixels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.audit.audit import audit
from attacks.threat import ThreatModel
from defenses.base import Defended
from defenses.puvae import PuVAE
from search.study.loading import make_study
from search.trial.runner import TrialRunner
from search.trial.training import silent
from spaces.space import Params

DEFENSES = "adversarial_training", "advae", "puvae", "magnet", "gmvae", "defense_vae"
STUDY: dict[str, Any] = {"task": "digits/A", "trials": 1, "wandb": "disabled", "eval_images": 100, "cheap_images": 20}
STEPS, LOOKS = 100, 5


def apart(model: Defended, x_NCHW: Tensor, y_N: Tensor, eps: float, *, bare: bool = False) -> float:
    """Return the share of images with a version within L-inf eps that is accepted and wrong.

    Args:
        bare: whether to attack the classifier without the defense.
    """
    defense, classifier = model.defense, model.classifier
    whole: Callable[[Tensor], Tensor] = classifier if bare else model

    def past(z: Tensor) -> Tensor:
        return model(z.detach()).detach() + classifier(z) - classifier(z).detach()

    def excess(z: Tensor) -> Tensor:
        if bare or not len(defense.limits()):
            return z.new_zeros(len(z))
        limits_S = defense.limits().double().clamp(max=1e12)
        return ((defense.suspicion(z).double() - limits_S) / (1 + limits_S.abs())).clamp(min=0).sum(1).to(z)

    def wrong(z: Tensor) -> Tensor:
        with torch.no_grad():
            looks = []
            for look in range(LOOKS if defense.stochastic and not bare else 1):
                torch.manual_seed(look)  # every version meets the same noise
                looks.append((whole(z).argmax(1) != y_N) & (excess(z) == 0))
        return torch.stack(looks)

    fell_DN = wrong(x_NCHW)
    ways: list[Callable[[Tensor], Tensor]] = [classifier] if bare else [model, past, classifier]
    if not bare and isinstance(defense, PuVAE):
        ways.append(lambda z: -50 * (defense.candidates(z) - z[:, None]).flatten(2).norm(dim=2))
    weights = (0.0,) if bare or not len(defense.limits()) else (0.0, 0.1, 1.0, 10.0)
    for start, (way, weight, gain) in enumerate(product(ways, weights, (cross_entropy, margin))):
        torch.manual_seed(start)
        z = (x_NCHW + eps * (2 * torch.rand_like(x_NCHW) - 1)).clamp(0, 1)
        for step in range(STEPS):
            z.requires_grad_()
            loss = (gain(way(z), y_N) - weight * excess(z)).sum()
            (slope,) = torch.autograd.grad(loss, z)
            with torch.no_grad():
                z = (z + eps / 8 * (1 - step / STEPS) * slope.sign()).clamp(x_NCHW - eps, x_NCHW + eps).clamp(0, 1)
            if step % 5 == 4:
                fell_DN = fell_DN | wrong(z)
    return float(fell_DN.double().mean())


def cross_entropy(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NK, y_N, reduction="none")


def margin(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    others_NK = logits_NK.scatter(1, y_N[:, None], -torch.inf)
    return others_NK.amax(1) - logits_NK.gather(1, y_N[:, None])[:, 0]


def judged(storage: Path, name: str, size: str, seed: int, epss: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Train a defense and yield its figures at each eps."""
    fields = {"name": f"{name}-{size}-{seed}", "defense": name, "space": size, "seed": seed, "storage": str(storage)}
    study = make_study({**STUDY, **fields})
    runner, space = TrialRunner.of(study, study.store.make()), study.resolved.space
    params = Params({knob: space.usual_of(knob, domain) for knob, domain in space.train.items()}, space.usual())
    _, defense = runner.trainer.fit(params, silent)
    images, model = (runner.assets.evaluator.x_NCHW, runner.assets.evaluator.y_N), runner.assets.target
    for eps in epss:
        defended = Defended(defense.at(params.inference), model)
        found = audit(defended, *images, ThreatModel("Linf", eps, "white-box"), seed=seed + 1)
        yield {
            "setting": [name, size, eps],
            "seed": seed,
            "clean": found.robustness.clean.accuracy,
            "attacked": found.robustness.strongest.accuracy,
            "error": found.robustness.strongest.error,
            "bare": found.baselines["undefended"].strongest.error,
            "apart": apart(defended, *images, eps),
            "bare apart": apart(defended, *images, eps, bare=True),
            "alarms": [gate.name for gate in found.gates if not gate.passed],
        }


def table(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table: least to most over the seeds, in percent."""
    yield "| defense | space | eps | clean | attacked | wrong | apart | undefended wrong | apart | alarms |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for setting, group in groupby(sorted(found, key=lambda row: row["setting"]), key=lambda row: row["setting"]):
        rows = list(group)
        raised = [alarm for row in rows for alarm in row["alarms"]]
        alarms = ", ".join(f"{name} {raised.count(name)}" for name in dict.fromkeys(raised)) or "none"
        ends = [
            dict.fromkeys(f"{100 * end(row[key] for row in rows):.0f}" for end in (min, max))
            for key in ("clean", "attacked", "error", "apart", "bare", "bare apart")
        ]
        spans = [" to ".join(pair) for pair in ends]
        yield f"| {' | '.join([*map(str, setting), *spans, alarms])} (of {len(rows)}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--defenses", nargs="+", default=DEFENSES)
    parser.add_argument("--sizes", nargs="+", default=("smoke", "default"))
    parser.add_argument("--eps", nargs="+", type=float, default=(0.1, 0.3))
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3, 4, 5))
    args = parser.parse_args()
    log = args.storage / "honest.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    found = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    for seed, name, size in product(args.seeds, args.defenses, args.sizes):
        done = [row["setting"][2] for row in found if row["setting"][:2] == [name, size] and row["seed"] == seed]
        for row in judged(args.storage, name, size, seed, [eps for eps in args.eps if eps not in done]):
            found.append(row)
            with log.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
