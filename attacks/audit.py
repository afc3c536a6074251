"""The audit: checks that a winner must pass before its number may be believed. Each is a gate with figure and limit.

Source: Carlini et al., On Evaluating Adversarial Robustness, 2019; Athalye et al., Obfuscated Gradients, 2018;
Croce and Hein, AutoAttack, 2020. Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.robustness import Robustness, Verdict, evaluate, look, observe
from attacks.suite import PGD_10, PGD_40, SUITES, Suite, reproducible
from attacks.threat import ThreatModel
from attacks.view import View, gradients, limits, stochastic

SLACK = 0.05
"""How far a heavier attack may still lower the accuracy before the lighter one counts as unconverged."""


@dataclass(frozen=True)
class Gate:
    """One check.

    Args:
        law: what must hold, in words.
        figure: what was found.
        limit: what it is held to.
    """

    name: str
    law: str
    figure: float
    limit: float
    passed: bool


@dataclass(frozen=True)
class Audit:
    """The gates, and the verdicts under the heaviest attacks that were run, white-box ones in any case."""

    gates: tuple[Gate, ...]
    robustness: Robustness

    @property
    def alarms(self) -> tuple[str, ...]:
        return tuple(f"{gate.name}: {gate.law}" for gate in self.gates if not gate.passed)


def audit(target: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, *, seed: int) -> Audit:
    """Attack a model harder than a search does, and check that the attack itself can be believed.

    Args:
        target: a bare or defended classifier, logits_NK from images in [0, 1].
        seed: another one than the search's, so that the budget that selects is not the one that audits.
    """
    found = evaluate(SUITES["audit"], target, x_NCHW, y_N, threat, seed=seed, white_box=True)
    heavier, lost = _heavier(target, x_NCHW, y_N, threat, found, seed)
    gates = (
        *quick_gates(target, x_NCHW, y_N, seed=seed),
        _noise(target, x_NCHW, y_N, threat, heavier, seed),
        _at_most("convergence", "twice the steps find no more", lost, SLACK),
        _unbounded(target, x_NCHW, y_N, threat, seed),
    )
    return Audit(gates, heavier)


def quick_gates(target: nn.Module, x_NCHW: Tensor, y_N: Tensor, *, seed: int) -> tuple[Gate, ...]:
    """Return the gates that cost a few passes, for every candidate of a search."""
    x, y = x_NCHW[:32], y_N[:32]
    return _deterministic(target, x), _logits(target, x), _gradient(target, x, y, seed)


def _at_most(name: str, law: str, figure: float, limit: float) -> Gate:
    return Gate(name, law, figure, limit, figure <= limit)


@torch.no_grad()
def _deterministic(target: nn.Module, x_NCHW: Tensor) -> Gate:
    """Check 2: a defense that draws noise says so, since then the gradient must be averaged over it."""
    with reproducible(target, 0):
        first, *others = (target(x_NCHW) for _ in range(5))
    moved = max(float((other - first).abs().max()) for other in others)
    if stochastic(target):
        return Gate(
            "determinism", "the defense says that it draws noise, so gradients average draws", moved, moved, True
        )
    return _at_most("determinism", "five forwards agree, or the defense says that it draws noise", moved, 1e-4)


@torch.no_grad()
def _logits(target: nn.Module, x_NCHW: Tensor) -> Gate:
    """Check 3: on probabilities the cross-entropy saturates."""
    with reproducible(target, 0):
        logits_NK = target(x_NCHW)
    like = float(((logits_NK >= 0).all(1) & ((logits_NK.sum(1) - 1).abs() < 1e-3)).double().mean())
    return _at_most("logits", "the model returns logits, not probabilities", like, 0.5)


def _gradient(target: nn.Module, x_NCHW: Tensor, y_N: Tensor, seed: int) -> Gate:
    """Check 3: through some source each image gets a finite gradient that is not zero."""
    usable_N = torch.zeros(len(y_N), dtype=torch.bool, device=x_NCHW.device)
    for gradient in gradients(target):
        view = View(target, gradient)
        x = x_NCHW.clone().requires_grad_()
        with reproducible(view, seed), torch.enable_grad():
            loss = F.cross_entropy(view(x), y_N, reduction="sum")
            (slope,) = torch.autograd.grad(loss, x, allow_unused=True) if loss.requires_grad else (None,)
        if slope is not None:
            flat = slope.flatten(1)
            usable_N |= flat.isfinite().all(1) & (flat.abs().amax(1) > 0)
    without = 1 - float(usable_N.double().mean())
    return _at_most("gradient", "images have a finite gradient that is not zero", without, 0.1)


def _noise(target: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, found: Robustness, seed: int) -> Gate:
    """Check 4: an attack is at least as strong as noise of the same size."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, x_NCHW.shape, generator=generator).to(x_NCHW) * 2 - 1
    noisy_NCHW = (x_NCHW + threat.eps * sign).clamp(0, 1)
    verdict = Verdict.of(look(target, noisy_NCHW, y_N, seed), limits(target))
    lost = float((found.robust & verdict.wrong).double().mean())
    return _at_most("noise", "random signs of size eps break nothing that withstood the attacks", lost, SLACK)


def _heavier(
    target: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, found: Robustness, seed: int
) -> tuple[Robustness, float]:
    """Check 5: attack what is left with twice the steps and another start; return also what the attack took.

    What another draw of the noise gets wrong on the clean image is not the attack's work.
    """
    left = found.survivors.nonzero().flatten()
    if len(left) == 0:
        return found, 0.0
    base = SUITES["audit"]
    twice = Suite(
        name="audit-twice",
        oblivious=(),
        white_box=(replace(PGD_40, name="pgd-80", steps=80, pace=0.05),),
        draws=base.draws,
    )
    again = evaluate(twice, target, x_NCHW[left], y_N[left], threat, oblivious={}, seed=seed + 1, white_box=True)
    right, wrong = found.strongest.right.clone(), found.strongest.wrong.clone()
    right[left] &= again.strongest.right
    wrong[left] |= again.strongest.wrong
    white_box = Verdict(right, wrong)
    trail = {**found.trail, "white-box/pgd-80 (all)": white_box.accuracy}
    lost = int((again.clean.right & ~again.survivors).sum()) / len(y_N)
    return replace(found, white_box=white_box, trail=trail), lost


def _unbounded(target: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, seed: int) -> Gate:
    """Check 6: with any image allowed, accuracy is at most about chance, what would be rejected included."""
    free = Suite(name="unbounded", oblivious=(), white_box=(replace(PGD_10, steps=20, pace=0.1),), draws=1)
    x, y = x_NCHW[:64], y_N[:64]
    seen = observe(free, target, x, y, replace(threat, eps=1.0), oblivious={}, seed=seed, white_box=True)
    found = seen.judge(torch.full_like(seen.limits_S, torch.inf))
    with torch.no_grad():
        chance = 1 / target(x[:1]).shape[1]
    return _at_most("unbounded", "an unbounded attack leaves at most chance", found.strongest.accuracy, chance + SLACK)
