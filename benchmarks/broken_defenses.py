"""The broken defenses of benchmarks/broken.py and cheats.py under stock torchattacks and the audit: a Markdown table.

    python -m benchmarks.broken_defenses                              digits, eps 0.1: a minute or two on one core
    python -m benchmarks.broken_defenses --dataset mnist --eps 0.2 --train-images 6000

Stock is torchattacks on the defended model without changes: PGD (10 steps of eps / 4) and AutoAttack (`standard`),
with the exact gradient. Ours is the audit's white-box accuracy.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
import torchattacks
from torch import Tensor, nn

from attacks.audit.audit import audit
from attacks.audit.consistency import copied
from attacks.threat import ThreatModel
from benchmarks.broken import BROKEN, HONEST, LABELS, Member
from benchmarks.cheats import CHEATS
from search.classifiers.training import train
from search.data import splits


def classifier(x_NCHW: Tensor, y_N: Tensor) -> nn.Module:
    """Return a small frozen network that is trained on the images."""
    stride = 1 if x_NCHW.shape[-1] <= 8 else 2
    first, second = nn.Conv2d(x_NCHW.shape[1], 8, 3, stride=stride), nn.Conv2d(8, 16, 3, stride=stride)
    network = nn.Sequential(
        first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 10)
    )
    network(x_NCHW[:1])
    train(network, x_NCHW, y_N, epochs=20, seed=0)
    return network.eval().requires_grad_(False)


def accuracy(target: nn.Module, x_NCHW: Tensor, y_N: Tensor) -> float:
    with torch.no_grad():
        return float((target(x_NCHW).argmax(1) == y_N).double().mean())


def stock(attack: torchattacks.attack.Attack, target: nn.Module, x_NCHW: Tensor, y_N: Tensor) -> str:
    """Return the accuracy under a stock attack, in percent, or `raises` if the attack fails."""
    torch.manual_seed(0)
    try:
        attacked_NCHW = attack(x_NCHW, y_N)
    except (RuntimeError, IndexError):
        return "raises"
    return f"{100 * accuracy(target.eval(), attacked_NCHW, y_N):.0f}"


def row(name: str, target: nn.Module, x_NCHW: Tensor, y_N: Tensor, eps: float) -> str:
    """Return a line of the table."""
    LABELS[:] = [y_N]
    other, another = copied(target), copied(target)  # some change by what they are asked
    pgd = stock(torchattacks.PGD(other, eps=eps, alpha=eps / 4, steps=10), other, x_NCHW, y_N)
    auto = stock(torchattacks.AutoAttack(another, eps=eps, n_classes=10, seed=0), another, x_NCHW, y_N)
    found = audit(target, x_NCHW, y_N, ThreatModel("Linf", eps, "white-box"), seed=1)
    clean, ours = (100 * verdict.accuracy for verdict in (found.robustness.clean, found.robustness.strongest))
    alarms = ", ".join(alarm.partition(":")[0] for alarm in found.alarms) or "none"
    return f"| {name} | {clean:.0f} | {pgd} | {auto} | {ours:.0f} | {alarms} |"


def main() -> None:
    everyone: dict[str, Member] = {**BROKEN, **CHEATS, **HONEST}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("members", nargs="*", help=f"else all: {', '.join(everyone)}")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--train-images", type=int, default=1400)
    parser.add_argument("--images", type=int, default=100)
    args = parser.parse_args()
    training = splits.load(args.dataset, "train", None, args.train_images)
    x_NCHW, y_N = splits.load(args.dataset, "validation", None, args.images)
    network = classifier(*training)
    print("| defense | clean | stock PGD | stock AutoAttack | ours | alarms |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(row("none", network, x_NCHW, y_N, args.eps), flush=True)
    for name in args.members or everyone:
        member = everyone[name]
        if name in HONEST:
            budget = {"eps": args.eps, "pgd_step_size": 0.6 * args.eps, "learning_rate": 3e-3}
            member = replace(member, train={**member.train, **budget})
        print(row(name, member.before(network, *training), x_NCHW, y_N, args.eps), flush=True)


if __name__ == "__main__":
    main()
