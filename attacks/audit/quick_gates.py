"""Audit checks that need no attack or a few steps of one, cheap enough for every candidate of a search.

Source: the check numbers are those of docs/honest-numbers.md; Carlini et al., On Evaluating Adversarial Robustness,
2019; Athalye et al., Obfuscated Gradients, 2018; Croce and Hein, AutoAttack, 2020, flags of its checks.py; Pintor et
al., Indicators of Attack Failure, 2022. Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.algorithms.base import gradient_of, project, steepest
from attacks.audit.gate import SLACK, Gate, at_most, unit
from attacks.audit.prediction import prediction
from attacks.evaluation import look, probabilities
from attacks.gradient_view import Gradient, View, deepened, gradients, openings, stochastic
from attacks.seeding import Draws, reproducible
from attacks.threat import ThreatModel
from attacks.verdicts import Robustness, Seen, Verdict

WAY = 16
"""Number of points on a path at which gradients are summed."""
COMPLETE = "along a way to another class the gradient adds up to the change of the logits"
ADDS_UP = 0.5
"""Largest share of this change that may be missing."""
LONGER = 8
"""Factor on the steps of an inner optimisation. On digits it lowers Defense-GAN's error by 35 to 50 % from 1 to 5 of
its own steps, and by 6 to 18 % from 100 or 200 of them; with a factor of two these ranges overlap."""
WIGGLES = 1e-4, 1e-3, 1 / 255
"""Sizes of random signs that must not change what a model answers, in pixel units of [0, 1]."""
JUMP = 0.25
"""Change of an image's logits that is a jump, in units of the logits' own spread."""
UNDERFLOW = 88.0
"""Logit margin beyond which exp(-margin) is not a normal float32 and the softmax has no gradient."""


def quick_gates(target: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, *, seed: int) -> tuple[Gate, ...]:
    """Return the gates that cost a few passes over 32 images, for every candidate of a search.

    A purifier that optimises is run once with its own number of steps and once with `LONGER` times as many.

    Args:
        target: a bare or defended classifier, logits_NK from images in [0, 1].
    """
    x, y = x_NCHW[:32], y_N[:32]
    off = _incomplete(target, x[:8], y[:8], seed)
    gates = (
        _determinism(target, x),
        _logits(target, x),
        _saturation(target, x, seed),
        _gradient(target, x, y, seed),
        at_most(3, "completeness", COMPLETE, min(off.values()), ADDS_UP),
        prediction(target, x, y, threat, seed, [source for source in off if off[source] <= ADDS_UP] or [*off]),
        _stand_in(target),
        _inner_loop(target, x, seed),
        _batch(target, x, seed),
        _order(target, x, seed),
        _jump(target, x, seed),
    )
    return tuple(replace(gate, images=8 if gate.name == "completeness" else len(x)) for gate in gates)


def noisy(target: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, seed: int, looks: int = 1) -> Seen:
    """Return the model's outputs on the images under random signs of size eps."""
    sign_NCHW = Draws(seed, torch.arange(len(y_N), device=x_NCHW.device)).sign(*x_NCHW.shape[1:])
    noisy_NCHW = project(x_NCHW + threat.eps * steepest(sign_NCHW, threat.norm), x_NCHW, threat.eps, threat.norm)
    return look(target, noisy_NCHW, y_N, seed, looks)


def noise_gate(noise: Seen, found: Robustness, limits_S: Tensor) -> Gate:
    """Check 4: the attacks are at least as strong as noise of the same size."""
    lost = float((found.robust & Verdict.of(noise, limits_S).wrong).double().mean())
    return at_most(4, "noise", "random signs of size eps break nothing that withstood the attacks", lost, SLACK)


@torch.no_grad()
def _determinism(target: nn.Module, x_NCHW: Tensor) -> Gate:
    """Check 2: a defense that draws noise declares it, since gradients must then be averaged over draws."""
    with reproducible(target, 0):
        first, *others = (target(x_NCHW) for _ in range(5))
    moved = max(float((other - first).abs().max()) for other in others) / unit(first)
    if stochastic(target):
        return Gate(
            2, "determinism", "the defense says that it draws noise: gradients average draws", moved, moved, True
        )
    return at_most(2, "determinism", "five forwards agree, or the defense says that it draws noise", moved, 1e-4)


def _logits(target: nn.Module, x_NCHW: Tensor) -> Gate:
    """Check 3: the model returns logits; on probabilities the cross-entropy saturates."""
    figure = probabilities(_answers(target, x_NCHW, 0))
    return at_most(3, "logits", "the model returns logits, not probabilities", figure, 0.5)


def _saturation(target: nn.Module, x_NCHW: Tensor, seed: int) -> Gate:
    """Check 3: the logits are close enough for the cross-entropy to have a gradient in float32."""
    top_N2 = _answers(target, x_NCHW, seed).topk(2).values
    figure = float((top_N2[:, 0] - top_N2[:, 1] > UNDERFLOW).double().mean())
    return at_most(3, "saturation", "no logit leads so far that the softmax has no gradient", figure, 0.1)


def _gradient(target: nn.Module, x_NCHW: Tensor, y_N: Tensor, seed: int) -> Gate:
    """Check 3: every gradient source of the defense gives each image a finite, non-zero gradient.

    A stand-in may do so in place of the defense itself, which it stands for.
    """
    without = dict[str, Tensor]()
    for gradient in gradients(target):
        view, x = View(target, gradient), x_NCHW.clone().requires_grad_()
        with reproducible(view, seed), torch.enable_grad():
            unusable_N = _unusable(gradient_of(F.cross_entropy(view(x), y_N, reduction="none"), x).flatten(1))
        source = "exact" if gradient == "surrogate" else gradient
        without[source] = unusable_N & without.get(source, unusable_N)
    if "rejection" in openings(target):
        view, x = View(target), x_NCHW.clone().requires_grad_()
        with reproducible(view, seed), torch.enable_grad():
            without["detectors"] = _unusable(gradient_of(view.suspicion(x).sum(1), x).flatten(1))
    law = "through every source that it names, and its detectors, images have a finite gradient that is not zero"
    figure = max((float(unusable_N.double().mean()) for unusable_N in without.values()), default=0.0)
    return at_most(3, "gradient", law, figure, 0.1)


def _unusable(slope_ND: Tensor) -> Tensor:
    """Return which gradients are zero or not finite, bool_N."""
    return ~(slope_ND.isfinite().all(1) & (slope_ND.abs().amax(1) > 0))


def _incomplete(target: nn.Module, x_NCHW: Tensor, y_N: Tensor, seed: int) -> dict[Gradient, float]:
    """Check 3: on a path from each image to one of another class, the gradient sums to the change of the logits.

    It does not where a vote, a look-up or quantisation decides: the gradient is only that of a smooth remainder. The
    best source counts; those that do not add up do not count in `prediction`. Source: the completeness of Sundararajan
    et al., Axiomatic Attribution, 2017.

    Returns:
        for each gradient source the share of the change that is missing.
    """
    far_NN = torch.cdist(x_NCHW.flatten(1), x_NCHW.flatten(1)) + 1e9 * (y_N[:, None] == y_N)
    there = far_NN.argmin(dim=1)
    way_NCHW, classes_N2 = x_NCHW[there] - x_NCHW, torch.stack((y_N, y_N[there]), dim=1)
    if bool((classes_N2[:, 0] == classes_N2[:, 1]).all()):
        return dict.fromkeys(gradients(target), 0.0)

    def gap(logits_NK: Tensor) -> Tensor:
        return logits_NK.gather(1, classes_N2).diff(dim=1)[:, 0]

    scale = 1 / unit(_answers(target, x_NCHW, seed))
    change_N = scale * (gap(_answers(target, x_NCHW[there], seed)) - gap(_answers(target, x_NCHW, seed)))
    off = dict[Gradient, float]()
    for gradient in gradients(target):
        view, sum_N = View(target, gradient), torch.zeros_like(change_N)
        for step in range(WAY):
            x = (x_NCHW + (step + 0.5) / WAY * way_NCHW).requires_grad_()
            with reproducible(view, seed), torch.enable_grad():
                sum_N += (gradient_of(scale * gap(view.unscaled(x)), x) * way_NCHW).flatten(1).sum(1) / WAY
        off[gradient] = float((sum_N - change_N).abs().sum() / change_N.abs().sum().clamp(min=1e-6))
    return off


def _stand_in(target: nn.Module) -> Gate:
    """Check 3: a defense that is not differentiable provides a surrogate to attack through."""
    missing = float(not {"exact", "surrogate"} & set(gradients(target)))
    return at_most(3, "stand-in", "a defense that is not differentiable brings a stand-in that is", missing, 0.0)


@torch.no_grad()
def _inner_loop(target: nn.Module, x_NCHW: Tensor, seed: int) -> Gate:
    """Check 3: a purifier that optimises has converged; otherwise attackers differentiate a path, not a projection."""
    law = f"{LONGER} times the steps of an optimisation that purifies lower its error by little"
    errors = []
    for steps in (1, LONGER):
        with deepened(target, steps) as defense, reproducible(target, seed):
            if defense is None:
                return at_most(3, "inner-loop", "nothing is optimised to purify", 0.0, 0.0)
            errors.append(float((defense.purify(x_NCHW) - x_NCHW).square().mean()))
    return at_most(3, "inner-loop", law, 1 - errors[1] / errors[0] if errors[0] else 0.0, 0.2)


def _batch(target: nn.Module, x_NCHW: Tensor, seed: int) -> Gate:
    """Check 12: an image's logits do not depend on the rest of the batch (no batch statistics at test time)."""
    half = len(x_NCHW) // 2
    other_NCHW = torch.cat((x_NCHW[:half], 1 - x_NCHW[half:]))  # same size: a stochastic defense draws the same noise
    alone, beside = (_answers(target, x, seed)[:half] for x in (x_NCHW, other_NCHW))
    moved = float((alone - beside).abs().max()) / unit(alone) if half else 0.0
    return at_most(12, "batch", "the logits of an image do not depend on the images beside it", moved, 1e-2)


def _order(target: nn.Module, x_NCHW: Tensor, seed: int) -> Gate:
    """Check 12: an image's class does not depend on its place in the batch, from which a label could be looked up."""
    turned = torch.arange(len(x_NCHW), device=x_NCHW.device).roll(1)
    here, again, there = (
        _answers(target, x, s).argmax(1) for x, s in ((x_NCHW, seed), (x_NCHW, seed + 1), (x_NCHW[turned], seed))
    )
    moved = float((there != here[turned]).double().mean()) - float((again != here).double().mean())
    return at_most(12, "order", "the class of an image does not depend on its place in the batch", moved, 0.2)


def _jump(target: nn.Module, x_NCHW: Tensor, seed: int) -> Gate:
    """Check 13: a clean image's logits do not jump where it is moved by next to nothing.

    They do where a model answers otherwise on what only clean images have: levels of stored images, exact zeros and
    ones, a range. Any attack destroys these, and so would meet another model.
    """
    here_NK, sign_NCHW = _answers(target, x_NCHW, seed), Draws(seed, torch.arange(len(x_NCHW))).sign(*x_NCHW.shape[1:])
    jumps_N = torch.zeros(len(x_NCHW), dtype=torch.bool, device=x_NCHW.device)
    for size in WIGGLES:
        moved_NK = _answers(target, (x_NCHW + size * sign_NCHW.to(x_NCHW)).clamp(0, 1), seed)
        jumps_N |= (moved_NK - here_NK).double().square().mean(dim=1).sqrt() > JUMP * unit(here_NK)
    law = f"moving a clean image by up to {max(WIGGLES):.2g} changes its logits little"
    return at_most(13, "jump", law, float(jumps_N.double().mean()), 0.1)


@torch.no_grad()
def _answers(target: nn.Module, x_NCHW: Tensor, seed: int) -> Tensor:
    """Return logits_NK."""
    with reproducible(target, seed):
        return target(x_NCHW)
