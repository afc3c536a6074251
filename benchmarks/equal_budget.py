"""Which gradient source breaks most of a stochastic defense, at an equal number of gradients: steps times noise draws.

    python -m benchmarks.equal_budget NAME --storage runs --images 32 --gradients 20 --knobs steps=10

The defense is that of a search with one training, at its usual inference setting but for --knobs. PGD runs on the same
images through each source, alone. An image's figure is the share of 10 fresh draws in which it stays right. `known`:
the attacker knows the draw, and no other counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from attacks.attack import Attack
from attacks.catalog import PGD_10
from attacks.evaluation import look, under_known_noise
from attacks.gradient_view import View, gradients
from attacks.verdicts import share
from defenses.base import Defended
from search.study.catalog import open_search
from search.trial.runner import TrialRunner
from search.trial.training import silent

DRAWS = 1, 2, 4
LOOKS = 10


def attack(steps: int) -> Attack:
    """Return PGD of so many steps, each 2.5 / steps of eps as Madry et al. have it."""
    return replace(PGD_10, name=f"pgd-{steps}", steps=steps, pace=2.5 / steps)


def rows(args: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of a Markdown table: accuracy in percent, CPU seconds."""
    study = open_search(args.name, args.storage)
    space = study.resolved.space
    params = space.setting(space.usual_of)
    own = dict(params.inference)
    for name, _, value in (wish.partition("=") for wish in args.knobs):
        own[name] = type(own[name])(value)
    params = replace(params, inference=own)
    runner = TrialRunner(study, study.store)
    _, defense = runner.trainer.fit(params, silent)
    target, evaluator = Defended(defense, runner.assets.target), runner.assets.evaluator
    x, y = evaluator.x_NCHW[: args.images], evaluator.y_N[: args.images]
    threat, seed = replace(evaluator.threat, knowledge="white-box"), study.seed
    clean = share(look(target, x, y, seed, LOOKS).right)
    yield f"{params.inference}, {threat}, {len(y)} images: clean {100 * clean:.1f}\n"
    yield "| gradient | steps x draws | left | CPU s |\n| --- | --- | --- | --- |"
    for source in args.sources or gradients(target):
        for draws in args.draws:
            start, pgd = time.process_time(), attack(args.gradients // draws)
            made = pgd.craft(View(target, source, draws), x, y, threat, seed)
            seconds, left = time.process_time() - start, share(look(target, made, y, seed, LOOKS).right)
            yield f"| {source} | {pgd.steps} x {draws} | {100 * left:.1f} | {seconds:.0f} |"
    start, pgd = time.process_time(), attack(args.gradients)
    found = under_known_noise(pgd, target, x, y, threat, seed)
    yield "\n".join(
        f"| known: {name} | {pgd.steps} x 1 | {100 * share(seen.right):.1f} | – |" for name, seen in found.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--gradients", type=int, default=20)
    parser.add_argument("--draws", type=int, nargs="*", default=DRAWS)
    parser.add_argument("--sources", nargs="*", default=[])
    parser.add_argument("--knobs", nargs="*", default=[], help="inference knobs that differ from the usual: steps=10")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for row in rows(args):
        print(row, flush=True)


if __name__ == "__main__":
    main()
