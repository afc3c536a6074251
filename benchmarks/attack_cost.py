"""The cost of an evaluation in passes through the model: ours, and the same suite run plainly on all images.

    python -m benchmarks.attack_cost   four suites, two budgets: 7 minutes on a quiet core
    python -m benchmarks.attack_cost --task mnist/A --suite search      a convolutional network
    python -m benchmarks.attack_cost --json                             the rows as JSON, one per line

Run it as a module from the repository root. Ours is what a search does: oblivious adversarial examples are crafted once
for all candidates (a row `alone` includes that, a row `images shared` does not), white-box attacks run only on images
that are still correct, and an image stops when it is misclassified. Plainly, every attack runs on all images, to the
last step. Both use the same seeds and image numbers, so that verdicts compare image by image.

A pass is one image through the model, forward or backward. For the suite `standard` there is also the AutoAttack of
torchattacks: it too runs only on surviving images, but with 10 steps instead of 100, and has no oblivious attacks.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torchattacks
from torch import Tensor, nn

from attacks.evaluation import look, observe, strikes
from attacks.gradient_view import View
from attacks.seeding import reproducible
from attacks.suites import SUITES, Suite, craft_oblivious
from attacks.threat import ThreatModel
from search.data import splits
from search.study.loading import make_study
from search.trial.runner import TrialRunner


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Numbers of forward and backward passes of an image, and seconds."""

    forward: int
    backward: int
    seconds: float

    @property
    def passes(self) -> int:
        return self.forward + self.backward

    def plus(self, other: Cost) -> Cost:
        return Cost(
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            seconds=self.seconds + other.seconds,
        )


class Counted(nn.Module):
    """A model that counts the images in its forward and backward passes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0
        self.start = time.perf_counter()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits_NK = self.model(x_NCHW)
        self.forwards += len(x_NCHW)
        if logits_NK.requires_grad:
            logits_NK.register_hook(self._back)
        return logits_NK

    def _back(self, slope_NK: Tensor) -> None:
        self.backwards += len(slope_NK)

    def cost(self) -> Cost:
        """Return the cost since the model was wrapped."""
        return Cost(forward=self.forwards, backward=self.backwards, seconds=time.perf_counter() - self.start)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to evaluate a candidate.

    Args:
        share: its passes divided by those of the plain way.
        accuracy: fraction of the images that are correct in every version.
        spared: number of images that survive here, but not in the plain way.
        felled: number of images that survive in the plain way, but not here.
    """

    suite: str
    eps: float
    way: str
    cost: Cost
    share: float
    accuracy: float
    spared: int
    felled: int


def plainly(suite: Suite, model: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, seed: int) -> Tensor:
    """Run every attack of a suite on all images, to the last step; return bool_N: correct in every version."""
    suite = suite.within(threat)
    right_N = look(model, x_NCHW, y_N, seed).right[0]
    for attack in (*suite.oblivious, *(attack for attack, _ in strikes(suite, model))):
        made_NCHW = attack.craft(View(model), x_NCHW, y_N, threat, seed)
        one_N = look(model, made_NCHW, y_N, seed).right[0]
        right_N = right_N if attack.exceeds(threat) else right_N & one_N
    return right_N


def stock(model: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, seed: int) -> Tensor:
    """Run the AutoAttack of torchattacks, and return bool_N: correct."""
    with reproducible(model, seed):
        classes = model(x_NCHW[:1]).shape[1]
        attack = torchattacks.AutoAttack(model, threat.norm, threat.eps, n_classes=classes, seed=seed)
        made_NCHW = attack(x_NCHW, y_N)
    return look(model, made_NCHW, y_N, seed).right[0]


def compare(
    suite: Suite,
    network: nn.Module,
    x_NCHW: Tensor,
    y_N: Tensor,
    threat: ThreatModel,
    *,
    seed: int = 0,
) -> list[Row]:
    """Evaluate an undefended classifier plainly, then ours: with the oblivious attacks, and with shared images."""
    model = Counted(network)
    plain_N = plainly(suite, model, x_NCHW, y_N, threat, seed)
    plain = model.cost()

    def row(way: str, right_N: Tensor, cost: Cost) -> Row:
        return Row(
            suite=suite.name,
            eps=threat.eps,
            way=way,
            cost=cost,
            share=cost.passes / plain.passes,
            accuracy=float(right_N.double().mean()),
            spared=int((right_N & ~plain_N).sum()),
            felled=int((plain_N & ~right_N).sum()),
        )

    model = Counted(network)
    oblivious = craft_oblivious(suite, model, x_NCHW, y_N, threat, seed)
    shared, model = model.cost(), Counted(network)
    right_N = observe(suite, model, x_NCHW, y_N, threat, oblivious=oblivious, seed=seed).judge().attacked.right[0]
    each = model.cost()
    rows = [row("plain", plain_N, plain), row("ours, alone", right_N, shared.plus(each))]
    rows += [row("ours, images shared", right_N, each)]
    if suite.name == "standard":
        model = Counted(network)
        rows.append(row("stock, 10 steps", stock(model, x_NCHW, y_N, threat, seed), model.cost()))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table; accuracy in percent."""
    heads = "suite", "eps", "way", "forward", "backward", "passes", "of plain", "s", "left", "felled"
    lines = ["| " + " | ".join((*heads, "spared")) + " |", "| --- " * (len(heads) + 1) + "|"]
    for row in rows:
        cells = [row.suite, f"{row.eps:g}", row.way]
        cells += [f"{count:,}" for count in (row.cost.forward, row.cost.backward, row.cost.passes)]
        cells += [f"{row.share:.3f}", f"{row.cost.seconds:.1f}", f"{100 * row.accuracy:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{row.felled}", f"{row.spared}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="mnist/advae-D", help="dense layers: by far the fastest")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--suite", nargs="+", default=["search", "audit", "standard", "full"], choices=list(SUITES))
    parser.add_argument("--eps", nargs="+", type=float, help="in L-inf; else the task's, and a third of it")
    parser.add_argument("--train-images", type=int, default=3000)
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    study = make_study(
        {
            "name": "attacks",
            "defense": "identity",
            "task": args.task,
            "train_images": args.train_images,
            "classifier_epochs": 6,
            "storage": args.storage,
            "wandb": "disabled",
        }
    )
    runner = TrialRunner(study, study.store)
    task, network = runner.assets.resolved.task, runner.assets.target
    x_NCHW, y_N = (t.to(runner.assets.device) for t in splits.load(task.dataset, "validation", limit=args.images))
    rows = []
    for eps in args.eps or (task.eps, task.eps / 3):
        threat = ThreatModel("Linf", eps, "white-box")
        for name in args.suite:
            rows += compare(SUITES[name], network, x_NCHW, y_N, threat)
    print("\n".join(json.dumps(asdict(row)) for row in rows) if args.json else table(rows))


if __name__ == "__main__":
    main()
