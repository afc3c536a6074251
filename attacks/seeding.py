"""Random numbers and modes that leave no trace: an attack is reproducible, and changes neither model nor generators.

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
    """Run with every submodule in eval mode, and leave each in the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def seeded(seed: int | None = None) -> Iterator[None]:
    """Run with torch's generators seeded, and leave them as they were; None: as they are."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            # torch.manual_seed writes down the whole stack, 0.3 ms a time, wherever CUDA is not in use.
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
        yield


@contextmanager
def reproducible(model: nn.Module, seed: int) -> Iterator[None]:
    """Run with every submodule in eval mode and the generators seeded; leave modes and generators as they were."""
    with seeded(seed), evaluating(model):
        yield


class Draws:
    """Random numbers of each image, by its number and the seed alone.

    They depend neither on the images beside it nor on the device; torch's generators are not touched. Each call gives
    new ones.

    Args:
        ids_N: the images' numbers.

    Source: the mixing function is that of SplitMix64 (Steele, Lea and Flood, 2014), on a counter.
    """

    def __init__(self, seed: int, ids_N: Tensor) -> None:
        self.keys_N = _mixed(ids_N.long() + _mixed(torch.tensor(seed, device=ids_N.device)))
        self.calls = 0

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers from 0 to below 1, (N, *shape)."""
        self.calls += 1
        cells = torch.arange(math.prod(shape), device=self.keys_N.device) + (self.calls << 32)
        bits = _mixed(self.keys_N[:, None] + cells * _GOLDEN)
        return (((bits >> 40) & 0xFFFFFF).float() / 2**24).view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers, (N, *shape)."""
        return math.sqrt(2) * torch.erfinv(2 * self.uniform(*shape) - 1 + 2**-24)

    def sign(self, *shape: int) -> Tensor:
        """Return -1 or 1, (N, *shape)."""
        return torch.where(self.uniform(*shape) < 0.5, -1.0, 1.0)

    def below(self, high: int, *shape: int) -> Tensor:
        """Return integers from 0 to below `high`, (N, *shape)."""
        return (self.uniform(*shape) * high).long()


_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _mixed(bits: Tensor) -> Tensor:
    """Return 64 bits in which each given bit has changed about half."""
    bits = bits + _GOLDEN
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * _FIRST
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)
