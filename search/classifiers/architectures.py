"""The architectures of the protected classifiers, layer by layer as in the papers' tables.

Sources: PuVAE (IEEE Access 2019), Table 1 (D is garbled there, docs/decisions.md explains our reading); Defense-GAN's
five architectures from Defense-VAE, Appendix A, Table 5; AdvAE, Table 2 and section 4.1. Shapes: images x_NCHW of C
channels, H x W pixels, in K classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from defenses.base import Shape
from defenses.layers.channels_last import channels_last
from spaces.exceptions import InputError

PAPER_SIZE = 20
"""Below this side, a convolution whose table gives no padding is padded by half its kernel, or digits would vanish."""


class Conv(NamedTuple):
    """A convolution and its ReLU; padding None: the table gives none, and none is used (except below PAPER_SIZE)."""

    maps: int
    size: int
    stride: int = 1
    padding: int | None = None


class Pool(NamedTuple):
    """Max pooling."""

    size: int = 2


class FC(NamedTuple):
    """A dense layer and its ReLU."""

    units: int


class Drop(NamedTuple):
    """Dropout; `rate` is the fraction that is dropped."""

    rate: float


@dataclass(frozen=True)
class Stack:
    """A sequence of layers, followed by a dense layer to the K logits."""

    layers: Sequence[Conv | Pool | FC | Drop]

    def build(self, shape: Shape) -> nn.Sequential:
        """Return the network, which maps x_NCHW to logits_NK.

        Raises:
            InputError: the images are too small.
        """
        height, width = self._sides(shape)
        if not self.fits(shape):
            law = "an image must be large enough for the classifier's layers"
            raise InputError(f"{law}, but {shape.height} x {shape.width} vanishes in them")
        modules: list[nn.Module] = []
        maps, units = shape.channels, 0
        for layer in (*self.layers, FC(shape.classes)):
            match layer:
                case Conv(wide, size, stride, _):
                    modules += [nn.Conv2d(maps, wide, size, stride, _padding(layer, shape)), nn.ReLU()]
                    maps = wide
                case Pool(size):
                    modules.append(nn.MaxPool2d(size))
                case Drop(rate):
                    modules.append(nn.Dropout(rate))
                case FC(wide):
                    if not units:
                        modules.append(nn.Flatten())
                    modules += [nn.Linear(units or maps * height * width, wide), nn.ReLU()]
                    units = wide
        return channels_last(nn.Sequential(*modules[:-1]))

    def fits(self, shape: Shape) -> bool:
        """Return whether the feature maps have at least one pixel before the first dense layer."""
        return min(self._sides(shape)) > 0

    def _sides(self, shape: Shape) -> list[int]:
        """Return the height and width of the last feature maps, or 0 and 0 if nothing is left."""
        sides = [shape.height, shape.width]
        for layer in self.layers:
            match layer:
                case Conv(_, size, stride, _):
                    sides = [(n + 2 * _padding(layer, shape) - size) // stride + 1 for n in sides]
                case Pool(size):
                    sides = [n // size for n in sides]
            if min(sides) < 1:
                return [0, 0]
        return sides


def _padding(layer: Conv, shape: Shape) -> int:
    unsaid = layer.size // 2 if min(shape.height, shape.width) < PAPER_SIZE else 0
    return unsaid if layer.padding is None else layer.padding


@dataclass(frozen=True)
class ResNetV2:
    """The ResNet v2 of Keras' CIFAR-10 example, 9 n + 2 layers deep, which AdvAE protects.

    Three stages of n bottlenecks (1 x 1, 3 x 3 and 1 x 1, each after BatchNorm and ReLU), then the mean over all
    pixels, which on CIFAR-10 equals Keras' 8 x 8 pooling. BatchNorm has PyTorch's momentum of 0.1: Keras' 0.01 needs
    a thousand batches. Source: He, Zhang, Ren, Sun, Identity Mappings (2016).
    """

    n: int

    def build(self, shape: Shape) -> nn.Sequential:
        modules: list[nn.Module] = [nn.Conv2d(shape.channels, 16, 3, padding=1), _norm(16), nn.ReLU()]
        maps = 16
        for stage, (narrow, wide) in enumerate(((16, 64), (64, 128), (128, 256))):
            for block in range(self.n):
                stride = 2 if stage and not block else 1
                modules.append(Bottleneck(maps, narrow, wide, stride, activated=not stage and not block))
                maps = wide
        modules += [_norm(maps), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(maps, shape.classes)]
        return channels_last(nn.Sequential(*modules))

    def fits(self, shape: Shape) -> bool:
        return True


class Bottleneck(nn.Module):
    """A residual unit with full pre-activation; its first BatchNorm and ReLU are omitted if x is `activated`."""

    def __init__(self, maps: int, narrow: int, wide: int, stride: int, *, activated: bool) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *(() if activated else (_norm(maps), nn.ReLU())),
            nn.Conv2d(maps, narrow, 1, stride),
            *(_norm(narrow), nn.ReLU(), nn.Conv2d(narrow, narrow, 3, padding=1)),
            *(_norm(narrow), nn.ReLU(), nn.Conv2d(narrow, wide, 1)),
        )
        self.shortcut = nn.Identity() if maps == wide else nn.Conv2d(maps, wide, 1, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.shortcut(x_NCHW) + self.residual(x_NCHW)


def _norm(maps: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(maps, eps=1e-3)


ARCHITECTURES: dict[str, Stack | ResNetV2] = {
    # PuVAE.
    "A": Stack([Conv(64, 5), Conv(64, 5, 2), Drop(0.25), FC(128), Drop(0.5)]),
    "B": Stack([Conv(128, 3), Conv(64, 3, 2), Drop(0.25), FC(128), Drop(0.5)]),
    "C": Stack([Conv(64, 5), Conv(128, 5), Conv(256, 5, 2), Drop(0.25), FC(512), Drop(0.5), FC(256)]),
    "D": Stack([Conv(128, 3), Conv(256, 3), Conv(512, 3, 2), Drop(0.25), FC(512), Drop(0.5)]),
    # Defense-GAN. Its code passed the drop rates as TensorFlow 1's keep probabilities, so that B kept 20 % of the
    # pixels; these are the rates that the table means.
    "defensegan-A": Stack([Conv(64, 5, 1, 2), Conv(64, 5, 2, 0), Drop(0.25), FC(128), Drop(0.5)]),
    "defensegan-B": Stack([Drop(0.2), Conv(64, 8, 2, 5), Conv(128, 6, 2, 0), Conv(128, 5, 1, 0), Drop(0.5)]),
    "defensegan-C": Stack([Conv(128, 3, 1, 1), Conv(64, 5, 2, 0), Drop(0.25), FC(128), Drop(0.5)]),
    "defensegan-D": Stack([FC(200), Drop(0.5), FC(200), Drop(0.25)]),
    "defensegan-E": Stack([FC(200), FC(200)]),
    # AdvAE. Its table gives no padding; its code (lihebi/AdvAE) uses "same" in the first convolution of A, B and C,
    # which is 2, 3 and 1, and "valid" elsewhere. X's "FC(200,10)" is one layer of 200 and the logits in that code.
    "advae-X": Stack([Conv(32, 3), Conv(32, 3), Pool(), Conv(64, 3), Conv(64, 3), Pool(), FC(200), Drop(0.5), FC(200)]),
    "advae-A": Stack([Conv(64, 5, 1, 2), Conv(64, 5, 2), Drop(0.25), FC(128), Drop(0.5)]),
    "advae-B": Stack([Drop(0.2), Conv(64, 8, 2, 3), Conv(128, 6, 2), Conv(128, 5), Drop(0.5)]),
    "advae-C": Stack([Conv(128, 3, 1, 1), Conv(64, 3, 2), Drop(0.25), FC(128), Drop(0.5)]),
    "advae-D": Stack([FC(200), Drop(0.5), FC(200), Drop(0.5)]),
    "resnet29": ResNetV2(n=3),
}
"""A letter that several papers use has the paper as a prefix; a letter without a prefix is PuVAE's."""

PARTNERS = {
    "A": "B",
    "B": "A",
    "C": "D",
    "D": "C",
    "defensegan-A": "defensegan-C",
    "defensegan-B": "defensegan-A",
    "defensegan-C": "defensegan-A",
    "defensegan-D": "defensegan-E",
    "defensegan-E": "defensegan-D",
    "advae-X": "advae-A",
    "advae-A": "advae-C",
    "advae-B": "advae-A",
    "advae-C": "advae-A",
    "advae-D": "advae-A",
    "resnet29": "C",
}
"""PuVAE is trained on a source classifier that is not the attacked one (section V-B). Except for PuVAE's own four, it
is a similar one of the same paper, and never a B, which needs larger images than the others."""


def least(architecture: str, shape: Shape) -> int:
    """Return the side of the smallest square image, at least the given one's, that an architecture can be built for."""
    sides = itertools.count(min(shape.height, shape.width))
    return next(n for n in sides if ARCHITECTURES[architecture].fits(replace(shape, height=n, width=n)))
