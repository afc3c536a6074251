"""Audit check 3, `prediction`: short steps in the ball change what a model answers as its gradient predicts.

They do not where the gradient is that of another function: passed straight through a choice, a look-up or quantisation,
of a smooth remainder, or of something that was put there for the attacker. Signs and directions alone do not tell.
Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from attacks.algorithms.base import excess, gradient_of, lead, project, steepest
from attacks.audit.gate import Gate, at_most, unit
from attacks.gradient_view import Gradient, View, limits, openings, stochastic
from attacks.seeding import Draws, reproducible
from attacks.threat import ThreatModel

STEP, SAMPLES, OFF = 1 / 64, 8, 0.3
"""Step as a fraction of eps; starts for each image, eight times as many with noise; and the largest share of the change
that may be mispredicted. An adversarially trained network, full of kinks, was off by 0.19 (Fashion-MNIST, eps 0.3)."""
JUMP, JUMPS = 0.25, 0.05
"""Misprediction of one step that is a jump if it exceeds what was predicted, in units of the logits' spread; and the
largest share of the change that may come from jumps: there is next to none without a choice or a look-up inside."""
STEPS, STARTS, DRAWS, APART = (1 / 32, 1 / 8, 1 / 2), 4, 4, 0.5
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
        figure = 1 / OFF
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
    draws = DRAWS if gradient == "surrogate" and stochastic(target) else 1
    with torch.no_grad(), reproducible(target, seed):
        scale = unit(target(x_NCHW))

    def asked(gradient: Gradient, seed: int) -> Ask:
        view = View(target, gradient, draws)

        def ask(moved_NCHW: Tensor) -> Tensor:
            with reproducible(target, seed), torch.set_grad_enabled(moved_NCHW.requires_grad):
                return lead(view.unscaled(moved_NCHW), y_N) / scale

        return ask

    if gradient == "surrogate":
        return _apart(asked("exact", seed), asked(gradient, seed), x_NCHW, threat, seed) / APART
    samples = islice(_starts(x_NCHW, threat, seed), 8 * SAMPLES if stochastic(target) else SAMPLES)
    change, predicted = torch.cat(
        [
            torch.stack(_changes(asked("exact", seed + i), asked(gradient, seed + i), start_NCHW, threat, STEP))
            for i, start_NCHW in enumerate(samples)
        ],
        dim=1,
    )
    size, missed = torch.maximum(change.abs().sum(), predicted.abs().sum()), (change - predicted).abs()
    jumps = missed[(missed > JUMP) & (missed > predicted.abs())].sum()
    return float(max(missed.sum() / OFF, jumps / JUMPS) / size) if size else 1 / OFF  # nothing changes


def _detectors(target: nn.Module, x_NCHW: Tensor, threat: ThreatModel, seed: int) -> float:
    """Return the figure of the rejection margins; 0 where nothing is rejected."""
    view = View(target, "exact", DRAWS if stochastic(target) else 1)
    if not bool(limits(target).isfinite().any()):
        return 0.0

    def ask(moved_NCHW: Tensor) -> Tensor:
        with reproducible(target, seed), torch.set_grad_enabled(moved_NCHW.requires_grad):
            return excess(view.suspicion(moved_NCHW), limits(target))

    return _apart(ask, ask, x_NCHW, threat, seed) / APART


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
        slope_NCHW = gradient_of(foreseen(x_NCHW), x_NCHW)
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
