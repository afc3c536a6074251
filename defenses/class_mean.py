"""The mean of each class as its only projection: what a PuVAE whose posterior collapsed purifies to, as a baseline.

Shapes: N images, K classes, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from optuna.distributions import IntDistribution
from torch import Tensor, nn

from attacks.gradient_view import Gradient
from defenses.base import Batches, Knobs, Metrics
from defenses.puvae import PuVAE, rmse
from spaces.space import knob


@dataclass(frozen=True)
class Train(Knobs):
    batch_size: int = knob(1024, IntDistribution(1, 4096), "images a step; the means do not depend on it")
    epochs: int = knob(1, IntDistribution(1, 1000), "how often the means are computed, and scored")


class ClassMean(PuVAE):
    """Purify to the nearest class mean, by PuVAE's distance (its Eq. 21 and 22)."""

    Train = Train
    Inference = Knobs
    consults: ClassVar[Literal["target", "partner"]] = "target"

    @property
    def stochastic(self) -> bool:
        return False

    @property
    def gradients(self) -> tuple[Gradient, ...]:
        return ("bpda", "surrogate")  # the means do not depend on the image, only the choice among them does

    def build(self) -> None:
        s = self.shape
        self.mean_KCHW = nn.Buffer(torch.zeros(s.classes, s.channels, s.height, s.width))

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        for epoch in batches:
            sums_KCHW, images_K = torch.zeros_like(self.mean_KCHW), self.mean_KCHW.new_zeros(self.shape.classes)
            for x_NCHW, y_N in epoch:
                sums_KCHW.index_add_(0, y_N, x_NCHW)
                images_K.index_add_(0, y_N, torch.ones_like(y_N, dtype=images_K.dtype))
            self.mean_KCHW.copy_(sums_KCHW / images_K.clamp(min=1)[:, None, None, None])
            distance_NK = rmse(batches.x_NCHW[:1000], self.candidates(batches.x_NCHW[:1000]))
            yield {"loss": float(distance_NK.amin(dim=1).mean())}

    def remarks(self, x_NCHW: Tensor, y_N: Tensor) -> tuple[str, ...]:
        return ()

    def candidates(self, x_NCHW: Tensor, noise_NKL: Tensor | None = None) -> Tensor:
        """Return the class means for each image, x_NKCHW."""
        return self.mean_KCHW.expand(len(x_NCHW), *self.mean_KCHW.shape)
