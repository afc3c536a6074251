"""Audit check 13, `as-used`: a model answers a user as it answers an audit.

A user asks it plainly, with gradients recorded that nobody needs, in inference mode, on another thread, and images of
his own; an audit asks without gradients, or for them. Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from attacks.audit.consistency import copied
from attacks.audit.gate import Gate, at_most, unit
from attacks.seeding import reproducible

FEW = 32
"""Images that are asked about."""
MOVED = 0.01
"""Largest change of a logit, in units of the logits' own spread."""
Ask = Callable[[Tensor], Tensor]


def as_used(target: nn.Module, x_NCHW: Tensor, seed: int) -> Gate:
    """Check 13: images get the same answers in each way in which users ask.

    The model itself is called on another thread, so that nothing of ours stands above it. With noise, which is the same
    in each way, this holds as well.
    """
    law = "asked plainly with gradients on, in inference mode and on another thread, it answers as it does in the audit"
    x_NCHW, target = x_NCHW[:FEW].detach(), copied(target)  # what it keeps of inference mode has no gradient
    with reproducible(target, seed), torch.no_grad():
        here_NK = target(x_NCHW)
    differ_N = torch.zeros(len(x_NCHW), dtype=torch.bool, device=x_NCHW.device)
    model = getattr(getattr(target, "defense", None), "whole", None) or target
    for ask in (_plainly, _inferring, _elsewhere):
        with reproducible(target, seed):
            there_NK = ask(model, x_NCHW.clone())
        if there_NK is not None:
            differ_N |= ~((there_NK - here_NK).abs().amax(dim=1) <= MOVED * unit(here_NK))
    return at_most(13, "as-used", law, float(differ_N.double().mean()), 0.0, len(x_NCHW))


def _plainly(model: nn.Module, x_NCHW: Tensor) -> Tensor:
    with torch.enable_grad():
        return model(x_NCHW).detach()


def _inferring(model: nn.Module, x_NCHW: Tensor) -> Tensor | None:
    """Return the answers in inference mode; None if the model cannot answer there, since it needs gradients."""
    try:
        with torch.inference_mode():
            logits_NK = model(x_NCHW)
    except RuntimeError:
        return None
    return logits_NK.clone()


def _elsewhere(model: nn.Module, x_NCHW: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(model, x_NCHW).result().detach()
