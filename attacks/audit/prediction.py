"""Audit check 3, `prediction`: short steps in the ball change what a model answers as its gradient predicts.

They do not where the gradient is that of another function: passed straight through a choice, a look-up or quantisation,
of a smooth remainder, or of something that was put there for the attacker. Signs and directions alone do not tell.
Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from attacks.algorithms.base import margin, project, slope, steepest
from attacks.audit.gate import Gate, at_most
from attacks.gradient_view import Gradient, View, limits, openings, stochastic
from attacks.seeding import Draws, reproducible
from attacks.threat import ThreatModel

STEP, STARTS, OFF = 1 / 64, 4, 0.08
"""Step as a fraction of eps, starts for each image, and the largest share of the change that may be mispredicted.
Exact gradients of honest defenses, without a choice inside, were off by 0.07 at most (digits, eps 0.3)."""
DRAWS = 8
"""Draws of the noise in each answer."""
STEPS, FEWER_DRAWS, APART = (1 / 32, 1 / 8, 1 / 2), 4, 0.5
"""The same for a stand-in, which is smoother than what it stands for, and for rejection margins, which may be piecewise
linear: only the sums over the images are compared, and the best step counts."""
Ask = Callable[[Tensor], Tensor]


def prediction(
    target: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, seed: int, sources: Sequence[Gradient]
) -> Gate:
    """Return the gate. Its figure is in units of the largest allowed one; the best source counts, then the detectors.

    Args:
        sources: the gradient sources that may count.
    """
    law = "short steps in the ball change the logits, and rejection margins, as the gradient predicts"
    figure = 0.0
    if threat.eps:
        figure = math.inf
        for gradient in sources:  # a stand-in first: the others may be slow behind it
            if figure > 1:
                figure = min(figure, _source(target, gradient, x_NCHW, y_N, threat, seed))
        if "rejection" in openings(target):
            figure = max(figure, _detectors(target, x_NCHW, threat, seed))
    return at_most(3, "prediction", law, figure, 1.0, len(y_N))


def _source(
    target: nn.Module, gradient: Gradient, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, seed: int
) -> float:
    """Return the figure of the logit margins through a source."""

    def asked(gradient: Gradient, draws: int) -> Ask:
        view = View(target, gradient, draws if stochastic(target) else 1)

        def ask(moved_NCHW: Tensor) -> Tensor:
            with reproducible(target, seed), torch.set_grad_enabled(moved_NCHW.requires_grad):
                return margin(view.unscaled(moved_NCHW), y_N)

        return ask

    if gradient == "surrogate":
        return _apart(asked("exact", FEWER_DRAWS), asked(gradient, FEWER_DRAWS), x_NCHW, threat, seed) / APART
    return _off(asked("exact", DRAWS), asked(gradient, DRAWS), x_NCHW, threat, seed) / OFF


def _detectors(target: nn.Module, x_NCHW: Tensor, threat: ThreatModel, seed: int) -> float:
    """Return the figure of the rejection margins, the largest over the detectors of (score - limit)."""
    view = View(target, "exact", DRAWS if stochastic(target) else 1)
    limits_S = limits(target).to(x_NCHW.device, torch.float64)

    def ask(moved_NCHW: Tensor) -> Tensor:
        with reproducible(target, seed), torch.set_grad_enabled(moved_NCHW.requires_grad):
            over_NS = (view.suspicion(moved_NCHW).double() - limits_S)[:, limits_S.isfinite()]
            return over_NS.amax(dim=1) if over_NS.shape[1] else 0 * moved_NCHW.flatten(1).sum(1)

    return _apart(ask, ask, x_NCHW, threat, seed) / APART


def _off(answer: Ask, foreseen: Ask, x_NCHW: Tensor, threat: ThreatModel, seed: int) -> float:
    """Return the share of the change that is mispredicted, image by image; 1 where nothing changes."""
    starts = islice(_starts(x_NCHW, threat, seed), STARTS)
    change, predicted = torch.cat(
        [torch.stack(_changes(answer, foreseen, start_NCHW, threat, STEP)) for start_NCHW in starts], dim=1
    )
    size = float(torch.maximum(change.abs().sum(), predicted.abs().sum()))
    return float((change - predicted).abs().sum()) / size if size else 1.0


def _apart(answer: Ask, foreseen: Ask, x_NCHW: Tensor, threat: ThreatModel, seed: int) -> float:
    """Return by how much the sums of the changes and of their predictions differ, relative to the larger one.

    Starts are added until they are near enough: few images may be at an edge.
    """
    sums_S2, apart = torch.zeros(len(STEPS), 2, dtype=torch.double, device=x_NCHW.device), 1.0
    for start_NCHW in islice(_starts(x_NCHW, threat, seed), STARTS):
        pairs = [_changes(answer, foreseen, start_NCHW, threat, step) for step in STEPS]
        sums_S2 += torch.stack([torch.stack(pair).sum(dim=1) for pair in pairs])
        apart = 1 - float((sums_S2.amin(dim=1) / sums_S2.amax(dim=1)).nan_to_num(0.0).clamp(0, 1).max())
        if apart <= APART:
            break
    return apart


def _changes(answer: Ask, foreseen: Ask, x_NCHW: Tensor, threat: ThreatModel, step: float) -> tuple[Tensor, Tensor]:
    """Return how steps along the gradient, down and up, change each image's answer, and how the gradient says, N, N."""
    x_NCHW = x_NCHW.clone().requires_grad_()
    with torch.enable_grad():
        slope_NCHW = slope(foreseen(x_NCHW), x_NCHW)
    x_NCHW = x_NCHW.detach()
    step_NCHW = step * threat.eps * steepest(slope_NCHW, threat.norm)
    low_NCHW, high_NCHW = ((x_NCHW + side * step_NCHW).clamp(0, 1) for side in (-1, 1))
    predicted_N = (slope_NCHW.double() * (high_NCHW - low_NCHW)).flatten(1).sum(1)
    return answer(high_NCHW).double() - answer(low_NCHW).double(), predicted_N


def _starts(x_NCHW: Tensor, threat: ThreatModel, seed: int) -> Iterator[Tensor]:
    """Yield random images half way to the edge of the ball."""
    draws = Draws(seed, torch.arange(len(x_NCHW), device=x_NCHW.device))
    while True:
        way_NCHW = threat.eps / 2 * steepest(draws.sign(*x_NCHW.shape[1:]), threat.norm)
        yield project(x_NCHW + way_NCHW, x_NCHW, threat.eps, threat.norm)
