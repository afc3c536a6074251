"""Defenses that are known to be broken, each in its own way, on 8 x 8 digits. None may pass an audit.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from optuna.distributions import FloatDistribution
from torch import Tensor, nn

from defenses.base import Defense, Knobs, Shape
from spaces.space import knob

LABELS: list[Tensor] = []
"""Where the peeking defense finds the labels of the images in their order."""
DIGITS = Shape(1, 8, 8, 10)


class Rounding(Defense):
    """Pixels in eighths: the gradient is zero everywhere, and the defense says that it has one."""

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return (8 * x_NCHW).round() / 8


class NoOp(Defense):
    """It changes nothing."""

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW


class Saturated(Defense):
    """Logits a thousand times as large: the softmax has no gradient in float32."""

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        return 1000 * classifier(x_NCHW)


class HugeNoise(Defense):
    """Noise of many times eps, and it says so."""

    @dataclass(frozen=True)
    class Inference(Knobs):
        sigma: float = knob(0.5, FloatDistribution(0.0, 10.0), "of the noise, in pixel units of [0, 1]")

    @property
    def stochastic(self) -> bool:
        return True

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW + self.inference_knobs.sigma * torch.randn_like(x_NCHW)


class SilentNoise(HugeNoise):
    """Noise, and it does not say so."""

    @property
    def stochastic(self) -> bool:
        return False


class Detached(Defense):
    """It classifies by what it cut off from the graph."""

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW.detach()

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        return classifier(self.purify(x_NCHW)) + 0 * x_NCHW.flatten(1).sum(1, keepdim=True)


class BatchStatistics(Defense):
    """It normalises each pixel by the batch that it happens to see."""

    def purify(self, x_NCHW: Tensor) -> Tensor:
        flat = (x_NCHW - x_NCHW.mean(0)) / (x_NCHW.std(0, unbiased=False) + 0.1)
        return (0.3 + 0.2 * flat + 0.3 * x_NCHW).clamp(0, 1)


class ArgminWithoutStandIn(Defense):
    """The nearest of a few stored images: it says that it is not differentiable, and brings no stand-in."""

    differentiable = False

    def build(self) -> None:
        self.register_buffer("stored_MCHW", torch.zeros(200, 1, 8, 8))

    def purify(self, x_NCHW: Tensor) -> Tensor:
        nearest_N = torch.cdist(x_NCHW.flatten(1), self.stored_MCHW.flatten(1)).argmin(1)
        return self.stored_MCHW[nearest_N]


class Peeks(Defense):
    """It adds to the logits of the label that a global holds for the image's place."""

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        logits_NK = classifier(x_NCHW)
        if not LABELS:
            return logits_NK
        places = torch.arange(len(x_NCHW)) % len(LABELS[0])
        return logits_NK + 30 * nn.functional.one_hot(LABELS[0][places], logits_NK.shape[1])


class Remembers(Defense):
    """It has seen the very images that it is judged by, and looks up the label of the nearest."""

    def build(self) -> None:
        self.register_buffer("stored_MCHW", torch.zeros(200, 1, 8, 8))
        self.register_buffer("labels_M", torch.zeros(200, dtype=torch.long))

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        nearest_N = torch.cdist(x_NCHW.flatten(1), self.stored_MCHW.flatten(1)).argmin(1)
        logits_NK = classifier(x_NCHW)
        return logits_NK + 30 * nn.functional.one_hot(self.labels_M[nearest_N], logits_NK.shape[1])
