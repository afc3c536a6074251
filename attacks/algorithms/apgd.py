"""Auto-PGD with the cross-entropy, DLR or targeted DLR loss: the first two attacks of AutoAttack.

Source: Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks, 2020. Its standard version runs APGD with the cross-entropy, APGD targeted, FAB-T and Square in turn.
Shapes: N images, A of them still attacked, C channels, H x W pixels, D = CHW, K classes, J target classes.
Of the papers' symbols, x_..., d and d_orig are NCHW, f_... is N and alpha is N111.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.algorithms.base import (
    Best,
    CorrectedAttack,
    ahead,
    lead,
    project,
    rivals,
    sizes,
    slope,
    steepest,
    where,
    wide,
)
from attacks.seeding import Draws
from attacks.threat import Norm
from spaces.exceptions import choose

Loss = Literal["ce", "dlr", "targeted"]


class APGD(CorrectedAttack, torchattacks.APGD):  # type: ignore[misc]  # torchattacks is not typed
    """Auto-PGD: gradient ascent with momentum that halves an image's step size where its loss stops improving.

    Corrects torchattacks' APGD and APGDT: (1) they take 10 steps where AutoAttack takes 100; (2) they reset the global
    generators at each call, which replays a stochastic defense's noise, and an image's start depends on which others
    are still attacked; (3) a misclassified image is attacked to the end; (4) APGDT raises an IndexError below four
    classes, and with nine targets below ten; (5) in L2, APGDT uses the first image's step size for all. Checkpoints and
    conditions are the paper's; torchattacks rounds them differently and compares the first loss with 0.

    Returns each image's iterate with the highest logit margin, so that a misclassified one is preferred under any loss;
    with `stops`, the first misclassified one, which may be the input itself.

    Args:
        eps: bound of the perturbation, in pixel units of [0, 1].
        loss: `ce`, cross-entropy; `dlr`, difference of logits ratio, invariant to the scale of the logits; `targeted`,
            targeted DLR, against the classes with the highest logits on the input other than the label. With three
            classes its denominator is that of `dlr`. With two, each is the margin of the unscaled logits: signs, unit
            steps and comparisons of an image's losses do not depend on the scale either.
        restarts: random starts for each target class.
        targets: number of target classes that `targeted` tries in turn.
        rho: share of the steps between two checkpoints that must increase the loss to keep the step size.

    Raises:
        InputError: the norm or the loss is not a legal one.

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
            logits_NK = self._comparable(x_NCHW)
        best, draws = Best(x_NCHW, lead(logits_NK, y_N)), self._random(x_NCHW)
        for rival_N in rivals(logits_NK, y_N, self.targets if self.loss == "targeted" else 1).unbind(1):
            for _ in range(self.n_restarts):
                self._climb(x_NCHW, y_N, rival_N, self._start(x_NCHW, draws), best)
        return best.x_NCHW

    def _start(self, x_NCHW: Tensor, draws: Draws) -> Tensor:
        """Return random images at distance eps, as in the authors' code; nearer where clipped to [0, 1]."""
        shape = x_NCHW.shape[1:]
        way_NCHW = 2 * draws.uniform(*shape) - 1 if self.norm == "Linf" else draws.normal(*shape)
        return (x_NCHW + self.eps * way_NCHW / sizes(way_NCHW, self.norm)).clamp(0, 1)

    def _climb(self, x_NCHW: Tensor, y_N: Tensor, rival_N: Tensor, x_k: Tensor, best: Best) -> None:
        """Run the ascent once from `x_k`, and offer every iterate to `best`."""
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
        """Return the gradient of the loss, the loss, and the logit margin."""
        x_NCHW = x_NCHW.detach().requires_grad_()
        logits_NK = self._comparable(x_NCHW)
        f_N = self._loss(logits_NK, y_N, rival_N)
        return slope(f_N, x_NCHW), f_N.detach(), lead(logits_NK.detach(), y_N)

    def _loss(self, logits_NK: Tensor, y_N: Tensor, rival_N: Tensor) -> Tensor:
        if logits_NK.shape[1] == 2:
            return lead(logits_NK, y_N)
        if self.loss == "ce":
            return F.cross_entropy(logits_NK, y_N, reduction="none")
        ahead_N = lead(logits_NK, y_N) if self.loss == "dlr" else ahead(logits_NK, y_N, rival_N)
        ranked_NJ = logits_NK.topk(min(4, logits_NK.shape[1])).values
        low_N = ranked_NJ[:, 2 : 3 if self.loss == "dlr" else 4].mean(1)
        return ahead_N / (ranked_NJ[:, 0] - low_N + 1e-12)


def _checkpoints(steps: int) -> set[int]:
    """Return w_j = ceil(p_j steps), where p_0 = 0, p_1 = 0.22 and p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06)."""
    found, percent, stride = {0}, 22, 22
    while percent <= 100:
        found.add(math.ceil(percent * steps / 100))
        stride = max(stride - 3, 6)
        percent += stride
    return found
