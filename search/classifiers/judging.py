"""Checks that a user's classifier is one: logits for each image alone, of the data's classes, with a gradient.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from defenses.base import Shape
from spaces.exceptions import InputError

FEW = 8
BATCH = 128
ROUNDING = 1e-3
"""How far logits of an image alone may lie from those in a batch, relative to the largest logit."""


def check(network: nn.Module, x_NCHW: Tensor, shape: Shape, dataset: str) -> None:
    """Ask a network in eval mode about a few images.

    Raises:
        InputError: it is no classifier of these images; one line says why.
    """
    x_NCHW = x_NCHW[:FEW].clone().requires_grad_(True)
    images = f"{shape.channels} x {shape.height} x {shape.width} images of {dataset}"
    if not any(True for _ in network.parameters()):
        raise InputError("a classifier must have parameters, but has none")
    try:
        logits_NK = network(x_NCHW)
    except Exception as error:  # whatever a user's network raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"a classifier must take the {images}, but fails: {reason}") from None
    if not isinstance(logits_NK, Tensor):
        raise InputError(f"a classifier must return a tensor of logits, but returns a {type(logits_NK).__name__}")
    if logits_NK.shape != (len(x_NCHW), shape.classes) or logits_NK.dtype != torch.float32:
        law = f"a classifier must return float32 logits N x {shape.classes}, one for each class of {dataset}"
        raise InputError(f"{law}, but {len(x_NCHW)} images give {list(logits_NK.shape)}, {logits_NK.dtype}")
    if not logits_NK.isfinite().all():
        raise InputError("logits must be finite, but the classifier returns NaN or infinity")
    if (logits_NK >= 0).all() and ((logits_NK.sum(1) - 1).abs() < ROUNDING).all():
        raise InputError("a classifier must return logits, but returns probabilities, which sum to 1: omit its softmax")
    _repeatable(network, x_NCHW.detach(), logits_NK.detach())
    gradient = torch.autograd.grad(logits_NK.sum(), x_NCHW, allow_unused=True)[0] if logits_NK.requires_grad else None
    if gradient is None:
        raise InputError("logits must be differentiable with respect to the images, for attacks, but are not")


def _repeatable(network: nn.Module, x_NCHW: Tensor, logits_NK: Tensor) -> None:
    """Check that the logits of an image depend on nothing but the image."""
    scale = max(1.0, float(logits_NK.abs().max()))
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            law = "BatchNorm must use its running statistics in eval mode"
            raise InputError(f"{law}, but {name or type(module).__name__} uses those of the batch")
    with torch.no_grad():
        again_NK, alone_NK = network(x_NCHW), torch.cat([network(x[None]) for x in x_NCHW])
    if (again_NK - logits_NK).abs().max() > ROUNDING * scale:
        raise InputError("logits must be the same when asked again, but differ: is dropout on in eval mode?")
    if (alone_NK - logits_NK).abs().max() > ROUNDING * scale:
        law = "the logits of an image must not depend on the others of its batch"
        raise InputError(f"{law}, but do: does a BatchNorm use the statistics of the batch in eval mode?")


@torch.no_grad()
def clean_accuracy(network: nn.Module, x_NCHW: Tensor, y_N: Tensor) -> float:
    """Return the accuracy on images, a fraction; computed on a GPU if there is one.

    Raises:
        InputError: logits are not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    right = 0
    for x, y in zip(x_NCHW.split(BATCH), y_N.split(BATCH), strict=True):
        logits_NK = network(x.to(device)).cpu()
        if not logits_NK.isfinite().all():
            raise InputError("logits must be finite, but the classifier returns NaN or infinity")
        right += int((logits_NK.argmax(1) == y).sum())
    network.cpu()
    return right / len(y_N)
