"""MagNet: two autoencoders of clean images; one reforms the input, and each detects by its reconstruction error.

Source: Meng and Chen, MagNet: a Two-Pronged Defense against Adversarial Examples, CCS 2017; architectures, norms and
training as in the authors' Trevillie/MagNet (train_defense.py, test_defense.py, worker.py). Left out: the detectors
by the Jensen-Shannon divergence of the classifier's softmax at temperatures 10 and 40 (CIFAR-10 only), since
`suspicion` does not use the classifier, and the activity regularizer of 1e-9.
Shapes: N images, C channels, H x W pixels, 2 detectors, Q quantiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import Batches, Defense, Knobs, Metrics
from spaces.space import knob

HELD_OUT = 0.1
"""Share of the training images that is not trained on but sets the thresholds; the authors hold out 1/12."""
QUANTILES = 1001
"""Number of quantiles, a thousandth apart, in which held-out errors are stored, whatever the number of images."""
NEVER = 1e6
"""The largest detector score, so that as a threshold it never rejects."""
LIMIT = FloatDistribution(0.0, NEVER)


@dataclass(frozen=True)
class Train(Knobs):
    maps: int = knob(3, IntDistribution(1, 256), "maps of the hidden convolutions", latency=True)
    pooling: str = knob(
        "average", CategoricalDistribution(("average", "max")), "of autoencoder I (the authors list both)", latency=True
    )
    noise: float = knob(0.1, FloatDistribution(0.0, 1.0), "standard deviation of the training noise, in pixel units")
    learning_rate: float = knob(1e-3, FloatDistribution(1e-5, 1e-1, log=True), "Adam's")
    batch_size: int = knob(256, IntDistribution(1, 4096), "images a step")
    epochs: int = knob(100, IntDistribution(1, 1000), "passes over the training images")


@dataclass(frozen=True)
class Inference(Knobs):
    reformer: str = knob(
        "I",
        CategoricalDistribution(("I", "II")),
        "which autoencoder reforms: I on MNIST; II, which does not pool, on CIFAR-10",
        latency=True,
    )
    detector_1: float = knob(0.999, LIMIT, "1 - false-positive rate of detector I; 1e6 never rejects", threshold=True)
    detector_2: float = knob(0.999, LIMIT, "1 - false-positive rate of detector II; 1e6 never rejects", threshold=True)


class MagNet(Defense):
    """Purify by an autoencoder of clean images; reject what the autoencoders reconstruct worse than clean images."""

    Train = Train
    Inference = Inference
    quantiles_2Q: Tensor

    def build(self) -> None:
        k, channels = self.train_knobs, self.shape.channels
        self.autoencoder_1 = Autoencoder(channels, k.maps, k.pooling)
        self.autoencoder_2 = Autoencoder(channels, k.maps, None)
        self.register_buffer("quantiles_2Q", torch.linspace(0, 1, QUANTILES).repeat(2, 1))

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        k = self.train_knobs
        batches, (held_out_NCHW, _) = batches.split(HELD_OUT)
        adam = torch.optim.Adam(self.parameters(), lr=k.learning_rate, fused=True)
        self.track(adam=adam)
        for epoch in batches:
            self.train()
            sums_2, images = torch.zeros(2, device=batches.x_NCHW.device), 0
            for x_NCHW, _ in epoch:
                losses_2 = self.losses(x_NCHW)
                adam.zero_grad(set_to_none=True)
                losses_2.sum().backward()  # no shared weights: each trains independently
                adam.step()
                sums_2 += losses_2.detach() * len(x_NCHW)
                images += len(x_NCHW)
            self.calibrate(held_out_NCHW)
            first, second = (sums_2 / images).tolist()
            yield {"loss": first + second, "loss_1": first, "loss_2": second}

    def losses(self, x_NCHW: Tensor) -> Tensor:
        """Return the mean squared error of each autoencoder's reconstruction of the clean images from noisy ones, 2.

        The noise is drawn anew for each batch; the authors draw it once.
        """
        noisy_NCHW = (x_NCHW + self.train_knobs.noise * torch.randn_like(x_NCHW)).clamp(0, 1)
        return torch.stack([F.mse_loss(ae(noisy_NCHW), x_NCHW) for ae in (self.autoencoder_1, self.autoencoder_2)])

    @torch.no_grad()
    def calibrate(self, held_out_NCHW: Tensor) -> None:
        """Store the quantiles of the held-out images' errors, which determine every threshold."""
        self.eval()
        errors_N2 = torch.cat([self.errors(x_NCHW) for x_NCHW in held_out_NCHW.split(256)])
        levels_Q = torch.linspace(0, 1, QUANTILES, device=errors_N2.device)
        self.quantiles_2Q.copy_(errors_N2.quantile(levels_Q, dim=0).T)

    def errors(self, x_NCHW: Tensor) -> Tensor:
        """Return the mean of |x - AE(x)|^p over the pixels, p = 2 for detector I and 1 for II, N2."""
        first, second = ((x_NCHW - ae(x_NCHW)).abs().flatten(1) for ae in (self.autoencoder_1, self.autoencoder_2))
        return torch.stack((first.square().mean(1), second.mean(1)), dim=1)

    def purify(self, x_NCHW: Tensor) -> Tensor:
        reformer = self.autoencoder_1 if self.inference_knobs.reformer == "I" else self.autoencoder_2
        return reformer(x_NCHW)

    def suspicion(self, x_NCHW: Tensor) -> Tensor:
        """Return the detector scores, N2: for each error, the share of the held-out images' errors below it.

        It is interpolated between quantiles; beyond the largest, the score is the error divided by the largest.
        """
        columns = zip(self.errors(x_NCHW).T, self.quantiles_2Q, strict=True)
        return torch.stack([position(errors_N, quantiles_Q) for errors_N, quantiles_Q in columns], dim=1)


class Autoencoder(nn.Module):
    """3 x 3 convolutions with sigmoids: 3-pool-3 | 3-up-3 | 1, or without a pooling 3 | 3 | 1 (3 are the maps)."""

    def __init__(self, channels: int, maps: int, pooling: str | None) -> None:
        super().__init__()
        pool = nn.MaxPool2d if pooling == "max" else nn.AvgPool2d
        down = (pool(2, ceil_mode=True), *_convolution(maps, maps)) if pooling else ()
        up = (*_convolution(maps, maps), nn.Upsample(scale_factor=2)) if pooling else ()
        self.hidden = nn.Sequential(*_convolution(channels, maps), *down, *up, *_convolution(maps, maps))
        self.last = nn.Sequential(*_convolution(maps, channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        height, width = x_NCHW.shape[2:]  # an odd size is larger by one after up-sampling
        return self.last(self.hidden(x_NCHW))[:, :, :height, :width]


def position(errors_N: Tensor, quantiles_Q: Tensor) -> Tensor:
    """Return the share of the held-out errors below each error, N; beyond the largest, the error divided by it."""
    last = len(quantiles_Q) - 1
    above_N = torch.searchsorted(quantiles_Q, errors_N.detach().contiguous(), right=True).clamp(1, last)
    low_N, high_N = quantiles_Q[above_N - 1], quantiles_Q[above_N]
    within_N = ((errors_N - low_N) / (high_N - low_N).clamp(min=1 / NEVER**2)).clamp(0, 1)
    beyond_N = (errors_N / quantiles_Q[last].clamp(min=1 / NEVER)).clamp(min=1)
    return torch.where(errors_N > quantiles_Q[last], beyond_N, (above_N - 1 + within_N) / last)


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.xavier_uniform_(convolution.weight)  # Keras's default, which the authors used
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution, nn.Sigmoid()
