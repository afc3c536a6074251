"""What every corrected attack has in common: it leaves model and generators as they were, and its random numbers belong
to the image, not to the batch.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.threat import Norm


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


class Tidy(torchattacks.attack.Attack):  # type: ignore[misc]  # torchattacks is not typed
    """An attack that leaves its model and torch's generators as they were, also where it raises.

    The stock `__call__` puts the top module alone back, with train(), so that a frozen submodule ends up in train
    mode; and restores nothing on an error. Some stock attacks add to the `grad` of the model's parameters, and some
    reset the global generators at each call, which replays a stochastic defense's noise: those here differentiate by
    their input alone, and draw from `draws`. Losses are summed over the batch, so that no image's gradient depends on
    who is attacked beside it.

    Attributes:
        draws: the images' random numbers; None: those of seed 0 and the places in the batch, at each call.
        stops: whether an image that is found wrong needs no further step, and is returned as it was found. Not so
            where the model draws noise or can reject, nor where the images are meant to fool another model.
    """

    draws: Draws | None = None
    stops: bool = False

    def __call__(self, x_NCHW: Tensor, y_N: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        applied = self._normalization_applied
        try:
            with evaluating(self.model), seeded(), torch.enable_grad():
                return super().__call__(x_NCHW, y_N, *args, **kwargs)
        finally:
            self._set_normalization_applied(applied)

    def _given(self, x_NCHW: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images on the model's device, and the labels to leave or, if targeted, to reach."""
        x_NCHW, y_N = x_NCHW.detach().to(self.device), y_N.detach().to(self.device)
        return x_NCHW, self.get_target_label(x_NCHW, y_N) if self.targeted else y_N

    def _random(self, x_NCHW: Tensor) -> Draws:
        """Return the images' random numbers."""
        return self.draws or Draws(0, torch.arange(len(x_NCHW), device=x_NCHW.device))

    def _gain(self, x_NCHW: Tensor, aim_N: Tensor, logits_NK: Tensor) -> Tensor:
        """Return what the attack raises of each image, N: the cross-entropy of `aim_N`, or minus it if targeted."""
        loss_N = F.cross_entropy(logits_NK, aim_N, reduction="none")
        return -loss_N if self.targeted else loss_N

    def _look(self, x_NCHW: Tensor, aim_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient of the gain, the gain, and whether the attack has succeeded already, bool_N."""
        x_NCHW = x_NCHW.detach().requires_grad_()
        logits_NK = self.get_logits(x_NCHW)
        gain_N = self._gain(x_NCHW, aim_N, logits_NK)
        return slope(gain_N, x_NCHW), gain_N.detach(), (logits_NK.argmax(1) == aim_N) == self.targeted


def slope(gain_N: Tensor, x_NCHW: Tensor, *, again: bool = False) -> Tensor:
    """Return the gradient of each image's gain, zero where none flows.

    The stock attacks raise where a purifier has none; here the audit says so.

    Args:
        again: keep the graph for another gradient.
    """
    if not gain_N.requires_grad:
        return torch.zeros_like(x_NCHW)
    (slope_NCHW,) = torch.autograd.grad(gain_N.sum(), x_NCHW, allow_unused=True, retain_graph=again)
    return torch.zeros_like(x_NCHW) if slope_NCHW is None else slope_NCHW


def project(moved_NCHW: Tensor, x_NCHW: Tensor, eps: float, norm: Norm) -> Tensor:
    """Return the images within eps of the given ones that are nearest to the moved ones, and in [0, 1].

    In L2 the ball comes first and the clip to [0, 1] second, which stays in the ball, as torchattacks does.
    """
    step_NCHW = moved_NCHW - x_NCHW
    if norm == "Linf":
        return (x_NCHW + step_NCHW.clamp(-eps, eps)).clamp(0, 1)
    length_N111 = lengths(step_NCHW)
    return (x_NCHW + step_NCHW * (eps / length_N111.clamp(min=1e-12)).clamp(max=1)).clamp(0, 1)


def steepest(slope_NCHW: Tensor, norm: Norm) -> Tensor:
    """Return the step of length 1 in the norm that climbs most: the signs, or the gradient over its length.

    Where the gradient is zero there is none; the stock PGDL2 adds 1e-10 to a length that the batch's mean shortens.
    """
    if norm == "Linf":
        return slope_NCHW.sign()
    length_N111 = lengths(slope_NCHW)
    return torch.where(length_N111 > 0, slope_NCHW / length_N111, 0)


def lengths(step_NCHW: Tensor) -> Tensor:
    """Return the L2 norm of each, N111."""
    return step_NCHW.flatten(1).norm(dim=1)[:, None, None, None]
