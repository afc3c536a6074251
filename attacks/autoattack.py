"""AutoAttack's parts that descend, each usable alone: APGD (cross-entropy, and targeted) and FAB-T.

Source: Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks, 2020. Its standard version runs APGD with the cross-entropy, APGD targeted, FAB-T and Square in turn.
Shapes: N images, A of them still attacked, C channels, H x W pixels, D = CHW, K classes, J rival classes.
Of the papers' symbols x_..., d and d_orig are NCHW, f_... is N, alpha is N111.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.best import Best, lead, where, wide
from attacks.threat import Norm
from attacks.tidy import Draws, Tidy, lengths, project, slope, steepest
from spaces.exceptions import choose

Loss = Literal["ce", "dlr", "targeted"]


class APGD(Tidy, torchattacks.APGD):  # type: ignore[misc]  # torchattacks is not typed
    """Auto-PGD: gradient ascent with momentum that halves an image's step size where its loss stalls.

    Mends the stock APGD and APGDT: (1) they take 10 steps where AutoAttack takes 100; (2) they reset the global
    generators at each call, which replays a stochastic defense's noise, and an image's start depends on who still
    stands; (3) a fooled image takes part to the end; (4) APGDT raises an IndexError below four classes, and with nine
    targets below ten; (5) in L2 all images take APGDT's step size of the first. Checkpoints and conditions are the
    paper's: the stock ones round otherwise, and compare the first loss with 0.

    Of each image the iterate with the highest lead of a wrong logit over the label's comes back, so that a wrong one
    goes before a right one, whatever the loss; with `stops` the first that is wrong, be it the given one.

    Args:
        eps: bound of the perturbation, in pixel units of [0, 1].
        loss: `ce`, cross-entropy; `dlr`, the difference of logits ratio, which scaling the logits leaves as it is;
            `targeted`, the targeted one, against the classes next to the label by the given image's logits. With
            three classes its denominator is that of `dlr`. With two none is left and it is the plain margin:
            signs, unit steps and comparisons of an image's losses ignore the scale as well.
        restarts: random starts, of each target.
        targets: how many classes `targeted` takes in turn.
        rho: the share of steps between two checkpoints that must have raised the loss.

    Raises:
        InputError: the norm or the loss is none of those.

    Source: section 3, Algorithm 1, and section 4 for the losses.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        steps: int = 100,
        norm: Norm = "Linf",
        loss: Loss = "ce",
        restarts: int = 1,
        targets: int = 9,
        rho: float = 0.75,
    ) -> None:
        choose("the norm", norm, get_args(Norm))
        choose("the loss", loss, get_args(Loss))
        super().__init__(model, norm, eps, steps, restarts, loss=loss, rho=rho)
        self.targets = targets

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, y_N = self._given(x_NCHW, y_N)
        with torch.no_grad():
            logits_NK = self.get_logits(x_NCHW)
        best, draws = Best(x_NCHW, lead(logits_NK, y_N)), self._random(x_NCHW)
        for rival_N in _rivals(logits_NK, y_N, self.targets if self.loss == "targeted" else 1).unbind(1):
            for _ in range(self.n_restarts):
                self._climb(x_NCHW, y_N, rival_N, self._start(x_NCHW, draws), best)
        return best.x_NCHW

    def _start(self, x_NCHW: Tensor, draws: Draws) -> Tensor:
        """Return random images at the distance eps, as the authors' code, but where clipped to [0, 1]."""
        shape = x_NCHW.shape[1:]
        way_NCHW = 2 * draws.uniform(*shape) - 1 if self.norm == "Linf" else draws.normal(*shape)
        return (x_NCHW + self.eps * way_NCHW / _sizes(way_NCHW, self.norm)).clamp(0, 1)

    def _climb(self, x_NCHW: Tensor, y_N: Tensor, rival_N: Tensor, x_k: Tensor, best: Best) -> None:
        """Climb once from `x_k`, and offer every iterate to `best`."""
        left = best.left(self.stops)
        x_NCHW, y_N, rival_N, x_k = (t_N[left] for t_N in (x_NCHW, y_N, rival_N, x_k))
        going, checkpoints, last = torch.arange(len(left), device=left.device), _checkpoints(self.steps), 0
        x_before, x_max, slope_k, slope_max = x_k, x_k, torch.zeros_like(x_k), torch.zeros_like(x_k)
        f_new, f_k = x_k.new_zeros(len(left)), x_k.new_full((len(left),), torch.inf)
        f_max = f_checked = -f_k
        eta_N, rises_N, halved_N = torch.full_like(f_k, 2 * self.eps), torch.zeros_like(f_k), f_k < 0
        for k in range(self.steps + 1):
            if len(going) == 0:
                break
            slope_k[going], f_new[going], lead_A = self._ask(x_k[going], y_N[going], rival_N[going])
            best.offer(left[going], x_k[going], lead_A)
            if self.stops:
                going = going[lead_A <= 0]
            rises_N, f_k, higher_N = rises_N + (f_new > f_k), f_new.clone(), f_new > f_max
            x_max, slope_max = where(higher_N, x_k, x_max), where(higher_N, slope_k, slope_max)
            f_max = torch.where(higher_N, f_k, f_max)
            if k in checkpoints:
                halved_N = (rises_N < self.thr_decr * (k - last)) | (~halved_N & (f_max == f_checked))
                eta_N, f_k = torch.where(halved_N, eta_N / 2, eta_N), torch.where(halved_N, f_max, f_k)
                x_k, slope_k = where(halved_N, x_max, x_k), where(halved_N, slope_max, slope_k)
                rises_N, f_checked, last = torch.zeros_like(f_k), f_max, k
            z_NCHW = project(x_k + wide(eta_N) * steepest(slope_k, self.norm), x_NCHW, self.eps, self.norm)
            alpha = 0.75 if k else 1.0
            moved_NCHW = x_k + alpha * (z_NCHW - x_k) + (1 - alpha) * (x_k - x_before)
            x_before, x_k = x_k, project(moved_NCHW, x_NCHW, self.eps, self.norm)

    def _ask(self, x_NCHW: Tensor, y_N: Tensor, rival_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss's gradient, the loss, and the lead."""
        x_NCHW = x_NCHW.detach().requires_grad_()
        logits_NK = self.get_logits(x_NCHW)
        f_N = self._loss(logits_NK, y_N, rival_N)
        return slope(f_N, x_NCHW), f_N.detach(), lead(logits_NK.detach(), y_N)

    def _loss(self, logits_NK: Tensor, y_N: Tensor, rival_N: Tensor) -> Tensor:
        if self.loss == "ce":
            return F.cross_entropy(logits_NK, y_N, reduction="none")
        ahead_N = lead(logits_NK, y_N) if self.loss == "dlr" else _ahead(logits_NK, y_N, rival_N)
        ranked_NJ = logits_NK.topk(min(4, logits_NK.shape[1])).values
        if ranked_NJ.shape[1] == 2:
            return ahead_N
        low_N = ranked_NJ[:, 2 : 3 if self.loss == "dlr" else 4].mean(1)
        return ahead_N / (ranked_NJ[:, 0] - low_N + 1e-12)


class FAB(Tidy, torchattacks.FAB):  # type: ignore[misc]  # torchattacks is not typed
    """FAB-T: the least perturbation towards each rival class, along the linearised boundary.

    Mends the stock FAB: (1) it takes 10 steps where AutoAttack takes 100; (2) it resets the global generators at each
    call, and adds to the `grad` of the model's parameters; (3) it raises an IndexError below ten classes; (4) it goes
    on with an image that is within eps already; (5) in L2 it takes partial derivatives below 1e-8 for zero, so that
    logits divided by 1e9 look robust. Here a step depends on the gradient's direction alone.

    Of each image the nearest wrong one comes back if it is within eps, else the given one.

    Args:
        eps: what counts as found, in pixel units of [0, 1].
        targets: how many classes are taken in turn: those next to the label by the given image's logits.

    Raises:
        InputError: the norm is none of those.

    Source: Croce and Hein, Minimally distorted adversarial examples with a fast adaptive boundary attack, 2020,
    Algorithm 1, with one start and without the final search, as AutoAttack has it.
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
        # The rank is what is left of eps.
        best = Best(x_NCHW, torch.where(lead(logits_NK, y_N) > 0, self.eps, x_NCHW.new_tensor(-torch.inf)))
        for rival_N in _rivals(logits_NK, y_N, self.n_target_classes).unbind(1):
            self._approach(x_NCHW, y_N, rival_N, best)
        return where(best.rank_N >= 0, best.x_NCHW, x_NCHW)

    def _approach(self, x_NCHW: Tensor, y_N: Tensor, rival_N: Tensor, best: Best) -> None:
        """Go to the boundary with the rivals, and offer every wrong iterate to `best`."""
        moved_NCHW = x_NCHW.clone()
        for _ in range(self.steps):
            going = best.left(self.stops)
            if len(going) == 0:
                break
            x_orig, x_i = x_NCHW[going], moved_NCHW[going].requires_grad_()
            f_N = _ahead(self.get_logits(x_i), y_N[going], rival_N[going])
            w_NCHW = slope(f_N, x_i)
            with torch.no_grad():
                off_N = (w_NCHW * (x_orig - x_i)).flatten(1).sum(1)
                # Both projections, of the iterate and of the given image, are one batch.
                both_NCHW, gap_N = torch.cat((x_i, x_orig)), torch.cat((-f_N, -f_N - off_N))
                d_NCHW = to_plane(both_NCHW, gap_N, w_NCHW.repeat(2, 1, 1, 1), self.norm)
                (d, d_orig), (size, size_orig) = d_NCHW.chunk(2), _sizes(d_NCHW, self.norm).chunk(2)
                alpha = (size / (size + size_orig).clamp(min=1e-12)).clamp(max=self.alpha_max)
                x_i = ((1 - alpha) * (x_i + self.eta * d) + alpha * (x_orig + self.eta * d_orig)).clamp(0, 1)
                wrong_N = lead(self.get_logits(x_i), y_N[going]) > 0
                spare_N = self.eps - _sizes(x_i - x_orig, self.norm).flatten()
                best.offer(going, x_i, torch.where(wrong_N, spare_N, -torch.inf))
                moved_NCHW[going] = where(wrong_N, x_orig + self.beta * (x_i - x_orig), x_i)


def to_plane(x_NCHW: Tensor, gap_N: Tensor, w_NCHW: Tensor, norm: Norm) -> Tensor:
    """Return the least step d, in the norm, with <w, d> = gap and x + d in [0, 1]; if none, the one that comes nearest.

    That is d = sign(w) min(t |v|, room) with v = sign(w) in L-inf and w in L2: <w, d> rises with t, linearly between
    the values of t at which a pixel reaches 0 or 1. Where w is zero or not finite d is zero.

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


def _checkpoints(steps: int) -> set[int]:
    """Return w_j = ceil(p_j steps), where p_0 = 0, p_1 = 0.22 and p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06)."""
    found, percent, stride = {0}, 22, 22
    while percent <= 100:
        found.add(math.ceil(percent * steps / 100))
        stride = max(stride - 3, 6)
        percent += stride
    return found


def _rivals(logits_NK: Tensor, y_N: Tensor, count: int) -> Tensor:
    """Return the classes next to the label, NJ, the likeliest first."""
    return logits_NK.scatter(1, y_N[:, None], -torch.inf).topk(min(count, logits_NK.shape[1] - 1)).indices


def _ahead(logits_NK: Tensor, y_N: Tensor, rival_N: Tensor) -> Tensor:
    return (logits_NK.gather(1, rival_N[:, None]) - logits_NK.gather(1, y_N[:, None]))[:, 0]


def _sizes(step_NCHW: Tensor, norm: Norm) -> Tensor:
    return step_NCHW.abs().amax((1, 2, 3), keepdim=True) if norm == "Linf" else lengths(step_NCHW)
