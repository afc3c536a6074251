"""AdvAE: an autoencoder in front of a frozen classifier, adversarially trained through both.

Source: Li et al., Purifying Adversarial Perturbation with Adversarially Trained Auto-encoders, 2019.
Shapes: N images, C channels, H x W pixels; I base models, whose adversarial examples are a list of x_NCHW.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.seeding import evaluating, reproducible
from defenses.base import Batches, Defended, Defense, Knobs, Metrics
from spaces.exceptions import InputError
from spaces.space import knob

HELD_OUT, MOST_HELD_OUT = 0.1, 512
"""Share of the training images held out (section 4.1), and how many of them at most are attacked after each epoch."""

HALVE_AFTER, STOP_AFTER = 4, 10
"""Epochs without better validation loss before the learning rate is halved, and before the end. Source: section 4.1."""

BASES = ("task", "advae-X", "advae-X+advae-A+advae-B")


@dataclass(frozen=True)
class Train(Knobs):
    lambda_rec: float = knob(0.0, FloatDistribution(0.0, 1e3), "weight lambda of the reconstruction D, Eq. 7")
    eps: float = knob(0.3, FloatDistribution(0.0, 1.0), "L-inf bound of PGD in training, in pixel units of [0, 1]")
    pgd_steps: int = knob(40, IntDistribution(1, 1000), "steps of PGD in training")
    pgd_step_size: float = knob(0.01, FloatDistribution(1e-4, 1.0), "step of PGD in training, in pixel units")
    bases: str = knob("task", CategoricalDistribution(BASES), "base models F_i, Eq. 8: the protected one, or Table 2's")
    attack_statistics: str = knob(
        "batch",
        CategoricalDistribution(("batch", "running")),
        "BatchNorm's under PGD in training (inferred): the batch's, as in the authors' code, or those of inference",
    )
    architecture: str = knob(
        "cnn", CategoricalDistribution(("cnn", "unet")), "the paper's for MNIST, or for CIFAR-10", latency=True
    )
    maps: int = knob(32, IntDistribution(1, 256), "maps of the cnn, or of the first level of the unet", latency=True)
    levels: int = knob(2, IntDistribution(1, 7), "blocks of the cnn, or levels of the unet (paper: 5)", latency=True)
    learning_rate: float = knob(1e-3, FloatDistribution(1e-5, 1e-1, log=True), "Adam's, at the start")
    batch_size: int = knob(32, IntDistribution(1, 4096), "images a step (the authors' code)")
    epochs: int = knob(100, IntDistribution(1, 1000), "passes over the training images at most")


class AdvAE(Defense):
    """Purify by an autoencoder trained on white-box adversarial examples that are crafted anew in every step."""

    Train = Train

    def build(self) -> None:
        k, s = self.train_knobs, self.shape
        network = UNet if k.architecture == "unet" else AutoEncoder
        network.check(k.levels, s.height, s.width)
        self.network: nn.Module = network(s.channels, k.maps, k.levels)

    def bases(self) -> tuple[str, ...]:
        named = self.train_knobs.bases
        return () if named == "task" else tuple(named.split("+"))

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return self.network(x_NCHW).sigmoid()

    def adversarial(self, x_NCHW: Tensor, y_N: Tensor, base: nn.Module) -> Tensor:
        """Return the inner maximum of Eq. 7: PGD with a random start, through the autoencoder and its base model.

        Running statistics lag behind the weights: with them, the cnn collapsed to constant images on MNIST at the
        paper's learning rate; with batch statistics it trained.
        """
        import torchattacks  # only a training needs it

        k = self.train_knobs
        pgd = torchattacks.PGD(Defended(self, base), eps=k.eps, alpha=k.pgd_step_size, steps=k.pgd_steps)
        with evaluating(self) if k.attack_statistics == "running" else _unrecorded(self):
            return pgd.forward(x_NCHW, y_N)  # calling `pgd` itself would change the parts' modes

    def losses(
        self, adversarial: Sequence[Tensor], x_NCHW: Tensor, y_N: Tensor, bases: Sequence[nn.Module]
    ) -> tuple[Tensor, Tensor]:
        """Return the adversarial cross-entropy and D, each summed over base models, Eq. 8; for one model this is Eq. 7.

        D is the mean sigmoid cross-entropy. All images of the step share one forward pass, so that BatchNorm also
        learns from clean images where lambda is 0.
        """
        *raw_INCHW, raw_NCHW = self.network(torch.cat((*adversarial, x_NCHW))).split(len(x_NCHW))
        ce_I = [F.cross_entropy(base(raw.sigmoid()), y_N) for base, raw in zip(bases, raw_INCHW, strict=True)]
        return torch.stack(ce_I).sum(), len(bases) * F.binary_cross_entropy_with_logits(raw_NCHW, x_NCHW)

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        k = self.train_knobs
        bases = list(classifier) if isinstance(classifier, nn.ModuleList) else [classifier]
        kept, (x_held_NCHW, y_held_N) = batches.split(HELD_OUT)
        held_out = x_held_NCHW[:MOST_HELD_OUT], y_held_N[:MOST_HELD_OUT]
        adam = torch.optim.Adam(self.parameters(), lr=k.learning_rate, fused=True)
        best = Best(self.network)
        self.track(adam=adam, best=best)
        for epoch in kept:
            if best.waited >= STOP_AFTER:
                break
            self.train()
            sums_2, images = torch.zeros(2, device=batches.x_NCHW.device), 0
            for x_NCHW, y_N in epoch:
                adversarial = [self.adversarial(x_NCHW, y_N, base) for base in bases]
                ce, d = self.losses(adversarial, x_NCHW, y_N, bases)
                adam.zero_grad(set_to_none=True)
                (ce + k.lambda_rec * d).backward()
                adam.step()
                sums_2 += torch.stack((ce, d)).detach() * len(x_NCHW)
                images += len(x_NCHW)
            ce, d, validation = (*(sums_2 / images).tolist(), self.validation(*held_out, bases))
            best.see(validation)
            if best.waited and best.waited % HALVE_AFTER == 0:
                for group in adam.param_groups:
                    group["lr"] *= 0.5
            yield {"loss": ce + k.lambda_rec * d, "ce": ce, "d": d, "validation": validation}
        best.restore()

    def validation(self, x_NCHW: Tensor, y_N: Tensor, bases: Sequence[nn.Module]) -> float:
        """Return the objective on held-out images, attacked in the same way after every epoch."""
        k, total = self.train_knobs, torch.zeros((), device=x_NCHW.device)
        with reproducible(self, seed=0):
            for x, y in zip(x_NCHW.split(k.batch_size), y_N.split(k.batch_size), strict=True):
                adversarial = [self.adversarial(x, y, base) for base in bases]
                with torch.no_grad():
                    ce, d = self.losses(adversarial, x, y, bases)
                total += (ce + k.lambda_rec * d) * len(x)
        return float(total) / len(x_NCHW)


class Best:
    """The weights with the lowest validation loss so far, and the number of epochs since."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.loss, self.waited = math.inf, 0
        self.weights = self._copied()

    def see(self, loss: float) -> None:
        if loss < self.loss:
            self.loss, self.waited, self.weights = loss, 0, self._copied()
        else:
            self.waited += 1

    def restore(self) -> None:
        self.network.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "waited": self.waited, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss, self.waited, self.weights = state["loss"], state["waited"], state["weights"]

    def _copied(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.network.state_dict().items()}


class AutoEncoder(nn.Module):
    """Autoencoder that returns raw_NCHW, the logits of the pixels. Source: section 4.1, MNIST.

    The decoder up-samples (nearest neighbour) to the encoder's sizes, so that odd sizes are restored.
    """

    def __init__(self, channels: int, maps: int, levels: int) -> None:
        super().__init__()
        wide = [channels, *[maps] * levels]
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(wide)
        )
        self.decoder = nn.ModuleList(
            nn.Sequential(nn.Conv2d(maps, maps, 3, padding=1), nn.ReLU()) for _ in range(levels)
        )
        self.last = nn.Conv2d(maps, channels, 3, padding=1)

    @staticmethod
    def check(levels: int, height: int, width: int) -> None:
        """Raise an InputError if an image is too small to be halved after each block."""
        _check_side(f"an auto-encoder of {levels} blocks", 2**levels, height, width)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        maps, sizes = x_NCHW, []
        for block in self.encoder:
            sizes.append(maps.shape[2:])
            maps = F.max_pool2d(block(maps), 2)
        for block in self.decoder:
            maps = F.interpolate(block(maps), sizes.pop())
        return self.last(maps)


class UNet(nn.Module):
    """U-Net that returns raw_NCHW, the logits of the pixels. Source: sections 3.1 and 4.1; Ronneberger et al. 2015.

    All kernels are 3 x 3, the last one too (section 4.1) unless `last` is 1, as Ronneberger's and HGD's. Each level has
    twice the maps of the one above. 2 x 2 max pooling leads down; nearest-neighbour up-sampling to the exact size of
    the lateral maps, which are then concatenated, leads up.
    """

    def __init__(self, channels: int, maps: int, levels: int, last: int = 3) -> None:
        super().__init__()
        widths = [maps * 2**i for i in range(levels)]
        self.down = nn.ModuleList(_level(above, here) for above, here in pairwise((channels, *widths)))
        self.up = nn.ModuleList(_level(below + here, here) for below, here in pairwise(widths[::-1]))
        self.last = nn.Conv2d(maps, channels, last, padding=last // 2)

    @staticmethod
    def check(levels: int, height: int, width: int) -> None:
        """Raise an InputError if an image is too small to be halved between all levels."""
        _check_side(f"a U-Net of {levels} levels", 2 ** (levels - 1), height, width)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        maps, laterals = self.down[0](x_NCHW), []
        for level in self.down[1:]:
            laterals.append(maps)
            maps = level(F.max_pool2d(maps, 2))
        for level in self.up:
            lateral = laterals.pop()
            maps = level(torch.cat((F.interpolate(maps, lateral.shape[2:]), lateral), dim=1))
        return self.last(maps)


@contextmanager
def _unrecorded(network: nn.Module) -> Iterator[None]:
    """Run without updating BatchNorm's running statistics; the mode of each part is unchanged."""
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class _Norm(nn.BatchNorm2d):
    """BatchNorm that uses its running statistics if a batch has only one value per channel."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if x_NCHW.numel() > x_NCHW.shape[1]:
            return super().forward(x_NCHW)
        return F.batch_norm(x_NCHW, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def _level(inputs: int, outputs: int) -> nn.Sequential:
    """Return two 3 x 3 convolutions with BatchNorm and ReLU.

    Without BatchNorm (not stated in the paper; absent in the authors' code) short training ends in constant images.
    """
    first, second = (nn.Conv2d(maps, outputs, 3, padding=1, bias=False) for maps in (inputs, outputs))
    return nn.Sequential(first, _Norm(outputs), nn.ReLU(), second, _Norm(outputs), nn.ReLU())


def _check_side(what: str, least: int, height: int, width: int) -> None:
    if (side := min(height, width)) < least:
        raise InputError(
            f"{what} needs images of at least {least} pixels a side, but they have {side}; fewer levels (knob levels)"
        )
