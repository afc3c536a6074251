"""The U-Net of diffusion models, which predicts the noise of an image at a time of the process.

Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, appendix B and the authors' code.
Shapes: N images, C channels, H x W pixels, M maps, E dimensions of the embedded time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spaces.exceptions import InputError

LONGEST_PERIOD = 10_000.0
"""Longest wavelength of the embedded time."""


class TimeUNet(nn.Module):
    """U-Net with residual blocks and self-attention that returns an image from an image x_NCHW and its time t_N.

    Args:
        side: smaller side of the images, in pixels.
        maps: maps of the first level; the others have twice as many.
        levels: levels, each of half the side of the one above, rounded up.
        blocks: residual blocks of each level going down; going up there is one more.
        attention: largest side of maps with self-attention; 0: none, in the middle neither.
        embedding: dimensions E of the embedded time.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        *,
        maps: int,
        levels: int,
        blocks: int,
        attention: int,
        embedding: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [maps if level == 0 else 2 * maps for level in range(levels)]
        sides = [-(-side // 2**level) for level in range(levels)]

        def block(inputs: int, level: int, attends: bool) -> nn.ModuleList:
            width = widths[level]
            tail = [Attention(width)] if attends and attention > 0 else []
            return nn.ModuleList([Residual(inputs, width, embedding, dropout), *tail])

        self.time = TimeEmbedding(embedding)
        self.first = nn.Conv2d(channels, maps, 3, padding=1)
        self.down, self.up, laterals = nn.ModuleList(), nn.ModuleList(), [maps]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(block(laterals[-1], level, sides[level] <= attention))
                laterals.append(width)
            if level < levels - 1:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                laterals.append(width)
        self.middle = nn.ModuleList([block(widths[-1], levels - 1, True), block(widths[-1], levels - 1, False)])
        width = widths[-1]
        for level in reversed(range(levels)):
            for _ in range(blocks + 1):
                self.up.append(block(width + laterals.pop(), level, sides[level] <= attention))
                width = widths[level]
            if level:
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
        self.last = nn.Sequential(_norm(maps), nn.SiLU(), _zero(nn.Conv2d(maps, channels, 3, padding=1)))

    @staticmethod
    def check(levels: int, height: int, width: int) -> None:
        """Raise an InputError if an image is too small to be halved between all levels."""
        least, side = 2 ** (levels - 1), min(height, width)
        if side < least:
            raise InputError(
                f"a U-Net of {levels} levels needs images of at least {least} pixels a side, but they have {side}; "
                "fewer levels (knob levels)"
            )

    def graph_bytes(self, x_NCHW: Tensor) -> int:
        """Return the bytes that are kept for the gradient of these images, measured; weights are not counted."""
        weights = {part.untyped_storage().data_ptr() for part in self.parameters()}
        kept = dict[int, int]()

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            x_NCHW = x_NCHW.detach().requires_grad_()
            graph = self(x_NCHW, torch.ones(len(x_NCHW), dtype=torch.int64, device=x_NCHW.device))
        del graph  # until here it holds what is counted
        return sum(kept.values())

    def forward(self, x_NCHW: Tensor, t_N: Tensor) -> Tensor:
        """Return an image for each image and its time, x_NCHW."""
        time_NE = self.time(t_N, x_NCHW.dtype)
        maps = self.first(x_NCHW)
        laterals = [maps]
        for part in self.down:
            maps = part(maps) if isinstance(part, nn.Conv2d) else _through(part, maps, time_NE)
            laterals.append(maps)
        for part in self.middle:
            maps = _through(part, maps, time_NE)
        for part in self.up:
            if isinstance(part, nn.Conv2d):
                maps = part(F.interpolate(maps, laterals[-1].shape[2:]))
            else:
                maps = _through(part, torch.cat((maps, laterals.pop()), dim=1), time_NE)
        return self.last(maps)


class TimeEmbedding(nn.Module):
    """Sines and cosines of the time through two dense layers, NE."""

    def __init__(self, embedding: int) -> None:
        super().__init__()
        frequencies = embedding // 2
        turns = [math.exp(-math.log(LONGEST_PERIOD) * i / max(1, frequencies - 1)) for i in range(frequencies)]
        self.turn_F = nn.Buffer(torch.tensor(turns, dtype=torch.float64), persistent=False)
        self.dense = nn.Sequential(
            nn.Linear(2 * frequencies, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )

    def forward(self, t_N: Tensor, dtype: torch.dtype) -> Tensor:
        angle_NF = t_N[:, None].to(dtype) * self.turn_F.to(dtype)
        return self.dense(torch.cat((angle_NF.sin(), angle_NF.cos()), dim=1))


class Residual(nn.Module):
    """Two 3 x 3 convolutions, the embedded time added between them, beside a skip connection."""

    def __init__(self, inputs: int, maps: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.before = nn.Sequential(_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, maps, 3, padding=1))
        self.time = nn.Linear(embedding, maps)
        last = _zero(nn.Conv2d(maps, maps, 3, padding=1))
        self.after = nn.Sequential(_norm(maps), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip = nn.Identity() if inputs == maps else nn.Conv2d(inputs, maps, 1)

    def forward(self, x_NMHW: Tensor, time_NE: Tensor) -> Tensor:
        return self.skip(x_NMHW) + self.after(self.before(x_NMHW) + self.time(time_NE)[:, :, None, None])


class Attention(nn.Module):
    """Self-attention between the pixels, one head, beside a skip connection."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.norm = _norm(maps)
        self.queries = nn.Conv2d(maps, 3 * maps, 1)
        self.last = _zero(nn.Conv2d(maps, maps, 1))

    def forward(self, x_NMHW: Tensor) -> Tensor:
        q, k, v = self.queries(self.norm(x_NMHW)).flatten(2).mT.chunk(3, dim=-1)
        seen = F.scaled_dot_product_attention(q, k, v)
        return x_NMHW + self.last(seen.mT.unflatten(2, x_NMHW.shape[2:]))


def _through(block: nn.Module, maps: Tensor, time_NE: Tensor) -> Tensor:
    residual, *attention = block.children()
    maps = residual(maps, time_NE)
    return attention[0](maps) if attention else maps


def _norm(maps: int) -> nn.GroupNorm:
    """Return a group normalisation of up to 32 groups, of at least 4 maps each where there are as many."""
    return nn.GroupNorm(math.gcd(32, max(1, maps // 4), maps), maps)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Return the layer with weights of zero, so that a block begins as its skip connection."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
