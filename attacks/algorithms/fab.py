"""FAB-T, the third attack of AutoAttack.

Shapes: N images, C channels, H x W pixels, D = CHW, K classes; images lie in [0, 1]. Of the paper's symbols, x_..., d
and d_orig are NCHW and f_... is N.
"""

from __future__ import annotations

from typing import get_args

import torch
import torchattacks
from torch import Tensor, nn

from attacks.algorithms.base import (
    Best,
    CorrectedAttack,
    ahead,
    lead,
    rivals,
    sizes,
    slope,
    where,
    wide,
)
from attacks.threat import Norm
from spaces.exceptions import choose


class FAB(CorrectedAttack, torchattacks.FAB):  # type: ignore[misc]  # torchattacks is not typed
    """FAB-T: the smallest perturbation to each target class, by steps to the linearised boundary.

    Corrects torchattacks' FAB: (1) it takes 10 steps where AutoAttack takes 100; (2) it resets the global generators at
    each call, and adds to the `grad` of the model's parameters; (3) it raises an IndexError below ten classes; (4) it
    continues with an image that is already within eps; (5) in L2 it treats partial derivatives below 1e-8 as zero, so
    that logits divided by 1e9 look robust. Here a step depends only on the direction of the gradient.

    Returns each image's nearest misclassified iterate if it is within eps, else the given image.

    Args:
        eps: perturbation budget that a success must keep, in pixel units of [0, 1].
        targets: number of target classes tried in turn: those with the highest logits on the input, without the label.

    Raises:
        InputError: the norm is not a legal one.

    Source: Croce and Hein, Minimally distorted adversarial examples with a fast adaptive boundary attack, 2020,
    Algorithm 1, with one start and without the final search, as in AutoAttack.
    """

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, steps: int = 100, norm: Norm = "Linf", targets: int = 9
    ) -> None:
        choose("the norm", norm, get_args(Norm))
        super().__init__(model, norm, eps, steps, multi_targeted=True, n_classes=targets + 1)
        self.supported_mode = ["default"]

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, y_N = self._given(x_NCHW, y_N)
        with torch.no_grad():
            logits_NK = self.get_logits(x_NCHW)
        # The rank is the unused part of eps.
        best = Best(x_NCHW, torch.where(lead(logits_NK, y_N) > 0, self.eps, x_NCHW.new_tensor(-torch.inf)))
        for rival_N in rivals(logits_NK, y_N, self.n_target_classes).unbind(1):
            self._approach(x_NCHW, y_N, rival_N, best)
        return where(best.rank_N >= 0, best.x_NCHW, x_NCHW)

    def _approach(self, x_NCHW: Tensor, y_N: Tensor, rival_N: Tensor, best: Best) -> None:
        """Step towards the boundary to the target classes, and offer every misclassified iterate to `best`."""
        moved_NCHW = x_NCHW.clone()
        for _ in range(self.steps):
            going = best.left(self.stops)
            if len(going) == 0:
                break
            x_orig, x_i = x_NCHW[going], moved_NCHW[going].requires_grad_()
            f_N = ahead(self.get_logits(x_i), y_N[going], rival_N[going])
            w_NCHW = slope(f_N, x_i)
            with torch.no_grad():
                off_N = (w_NCHW * (x_orig - x_i)).flatten(1).sum(1)
                # The projections of the iterate and of the given image are computed as one batch.
                both_NCHW, gap_N = torch.cat((x_i, x_orig)), torch.cat((-f_N, -f_N - off_N))
                d_NCHW = to_plane(both_NCHW, gap_N, w_NCHW.repeat(2, 1, 1, 1), self.norm)
                (d, d_orig), (size, size_orig) = d_NCHW.chunk(2), sizes(d_NCHW, self.norm).chunk(2)
                alpha = (size / (size + size_orig).clamp(min=1e-12)).clamp(max=self.alpha_max)
                x_i = ((1 - alpha) * (x_i + self.eta * d) + alpha * (x_orig + self.eta * d_orig)).clamp(0, 1)
                wrong_N = lead(self.get_logits(x_i), y_N[going]) > 0
                spare_N = self.eps - sizes(x_i - x_orig, self.norm).flatten()
                best.offer(going, x_i, torch.where(wrong_N, spare_N, -torch.inf))
                moved_NCHW[going] = where(wrong_N, x_orig + self.beta * (x_i - x_orig), x_i)


def to_plane(x_NCHW: Tensor, gap_N: Tensor, w_NCHW: Tensor, norm: Norm) -> Tensor:
    """Return the smallest step d, in the norm, with <w, d> = gap and x + d in [0, 1]; if there is none, the closest.

    It is d = sign(w) min(t |v|, room) with v = sign(w) in L-inf and w in L2: <w, d> rises with t, linearly between
    the values of t at which a pixel reaches 0 or 1. Where w is zero or not finite, d is zero.

    Source: the projections of FAB, section 2, both solved by one sort.
    """
    x_ND, w_ND = x_NCHW.flatten(1), (w_NCHW * wide(gap_N.sign())).flatten(1)
    scale_N1 = w_ND.abs().amax(1, keepdim=True)
    usable_N1 = (scale_N1 > 0) & scale_N1.isfinite()
    w_ND = torch.where(usable_N1, w_ND / scale_N1, 0)
    gap_N1 = torch.where(usable_N1, gap_N[:, None].abs() / scale_N1, 0)
    v_ND = w_ND.abs() if norm == "L2" else w_ND.abs().sign()
    room_ND = torch.where(w_ND > 0, 1 - x_ND, x_ND)
    turns_ND, order_ND = torch.where(v_ND > 0, room_ND / v_ND, 0).clamp(max=1e30).sort(1)
    full_ND, rate_ND = ((w_ND.abs() * part_ND).gather(1, order_ND) for part_ND in (room_ND, v_ND))
    at_face_ND, rate_ND = full_ND.cumsum(1) - full_ND, rate_ND.flip(1).cumsum(1).flip(1)
    first_N1 = torch.searchsorted(at_face_ND + turns_ND * rate_ND, gap_N1).clamp(max=x_ND.shape[1] - 1)
    at_face_N1, rate_N1, turn_N1 = (t_ND.gather(1, first_N1) for t_ND in (at_face_ND, rate_ND, turns_ND))
    t_N1 = torch.where(rate_N1 > 0, (gap_N1 - at_face_N1) / rate_N1, turn_N1).clamp(min=0).minimum(turn_N1)
    return (w_ND.sign() * (t_N1 * v_ND).minimum(room_ND)).view_as(x_NCHW)
