"""What every corrected attack has in common: it leaves model and generators as they were, and its random numbers belong
to the image, not to the batch.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torchattacks
from torch import Tensor
from torch.nn import functional as F

from attacks.seeding import Draws, evaluating, seeded
from attacks.threat import Norm


class CorrectedAttack(torchattacks.attack.Attack):  # type: ignore[misc]  # torchattacks is not typed
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


class Best:
    """The best image so far of each, by a rank that is above 0 where it needs no better one."""

    def __init__(self, x_NCHW: Tensor, rank_N: Tensor) -> None:
        self.x_NCHW, self.rank_N = x_NCHW.clone(), rank_N

    def left(self, stops: bool) -> Tensor:
        """Return the places of the images to attack on: with `stops` those that need a better one, else all."""
        every = torch.arange(len(self.rank_N), device=self.rank_N.device)
        return every[self.rank_N <= 0] if stops else every

    def offer(self, going: Tensor, moved_NCHW: Tensor, rank_N: Tensor) -> None:
        better_N = rank_N > self.rank_N[going]
        self.rank_N[going] = torch.where(better_N, rank_N, self.rank_N[going])
        self.x_NCHW[going] = where(better_N, moved_NCHW, self.x_NCHW[going])


def lead(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """Return by how much the best wrong logit exceeds the label's; NaN, which fools nobody, counts as least."""
    others_NK = logits_NK.scatter(1, y_N[:, None], -torch.inf)
    lead_N = others_NK.amax(1) - logits_NK.gather(1, y_N[:, None])[:, 0]
    return torch.where(lead_N.isnan(), -torch.inf, lead_N)


def wide(t_N: Tensor) -> Tensor:
    """Return a number of each image so that it multiplies the image, N111."""
    return t_N[:, None, None, None]


def where(take_N: Tensor, one_NCHW: Tensor, other_NCHW: Tensor) -> Tensor:
    """Return of each image the one or the other."""
    return torch.where(wide(take_N), one_NCHW, other_NCHW)


def rivals(logits_NK: Tensor, y_N: Tensor, count: int) -> Tensor:
    """Return the classes next to the label, NJ, the likeliest first."""
    return logits_NK.scatter(1, y_N[:, None], -torch.inf).topk(min(count, logits_NK.shape[1] - 1)).indices


def ahead(logits_NK: Tensor, y_N: Tensor, rival_N: Tensor) -> Tensor:
    return (logits_NK.gather(1, rival_N[:, None]) - logits_NK.gather(1, y_N[:, None]))[:, 0]


def sizes(step_NCHW: Tensor, norm: Norm) -> Tensor:
    return step_NCHW.abs().amax((1, 2, 3), keepdim=True) if norm == "Linf" else lengths(step_NCHW)
