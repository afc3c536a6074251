"""Reproducible random numbers and model modes that leave models and global generators unchanged.

Shapes: N images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run with every submodule in eval mode, and restore the mode of each."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def seeded(seed: int | None = None) -> Iterator[None]:
    """Run with torch's generators seeded (None: not seeded), and restore their state."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            # torch.manual_seed records the stack, 0.3 ms a call, wherever CUDA is not in use.
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
        yield


@contextmanager
def reproducible(model: nn.Module, seed: int) -> Iterator[None]:
    """Run with every submodule in eval mode and the generators seeded; restore modes and generators."""
    with seeded(seed), evaluating(model):
        yield


class KnownNoise(nn.Module):
    """A model that meets the same noise at every call: what torch's generators would give next when this was made."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.states = [torch.get_rng_state()]
        if torch.cuda.is_initialized():
            self.states.append(torch.cuda.get_rng_state())

    def forward(self, x_NCHW: Tensor) -> Tensor:
        with seeded():
            torch.set_rng_state(self.states[0])
            for state in self.states[1:]:
                torch.cuda.set_rng_state(state)
            return self.model(x_NCHW)


class Draws:
    """Random numbers of each image, determined only by the image's id and the seed.

    They do not depend on the rest of the batch or on the device, and torch's generators are not used. Each call returns
    new numbers.

    Args:
        ids_N: ids of the images.

    Source: the mixing function is that of SplitMix64 (Steele, Lea and Flood, 2014), on a counter.
    """

    def __init__(self, seed: int, ids_N: Tensor) -> None:
        self.keys_N = _mixed(ids_N.long() + _mixed(torch.tensor(seed, device=ids_N.device)))
        self.calls = 0

    def uniform(self, *shape: int) -> Tensor:
        """Return uniform numbers in [0, 1), (N, *shape)."""
        self.calls += 1
        cells = torch.arange(math.prod(shape), device=self.keys_N.device) + (self.calls << 32)
        bits = _mixed(self.keys_N[:, None] + cells * _GOLDEN)
        return (((bits >> 40) & 0xFFFFFF).float() / 2**24).view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers, (N, *shape)."""
        return math.sqrt(2) * torch.erfinv(2 * self.uniform(*shape) - 1 + 2**-24)

    def sign(self, *shape: int) -> Tensor:
        """Return random signs, -1 or 1, (N, *shape)."""
        return torch.where(self.uniform(*shape) < 0.5, -1.0, 1.0)

    def below(self, high: int, *shape: int) -> Tensor:
        """Return uniform integers in [0, high), (N, *shape)."""
        return (self.uniform(*shape) * high).long()


_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _mixed(bits: Tensor) -> Tensor:
    """Return 64-bit hashes in which each input bit changes about half of the bits."""
    bits = bits + _GOLDEN
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * _FIRST
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)
