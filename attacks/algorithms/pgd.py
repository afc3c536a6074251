"""Projected gradient descent, of which FGSM and iFGSM are special cases.

Shapes: N images, C channels, H x W pixels, K classes; images lie in [0, 1].
"""

from __future__ import annotations

import torch
import torchattacks
from torch import Tensor, nn

from attacks.algorithms.base import CorrectedAttack, lengths, project, steepest
from attacks.threat import Norm


class PGD(CorrectedAttack, torchattacks.PGD):  # type: ignore[misc]  # torchattacks is not typed
    """Projected gradient ascent on the cross-entropy, in either norm; FGSM and iFGSM are special cases.

    Corrects torchattacks' FGSM, BIM, PGD and PGDL2: (1) a random start comes from the global generator and so depends
    on the other images of the batch; (2) PGDL2 differentiates the batch's mean loss, so that the 1e-10 it adds to the
    norm matters for small gradients (its starts, at uniform radii in the ball, are kept); (3) the last iterate may be
    correct though an earlier one was not: with `stops`, the first misclassified one is returned without further steps.

    Args:
        eps: bound of the perturbation, in pixel units of [0, 1].
        alpha: step size, in the same units.
        random_start: start at a random point of the ball (L2: uniform direction and radius) instead of the image.

    After a call, `gains` holds the mean gain of the images still attacked, before each step.

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2017, section 2.1; FGSM,
    Goodfellow et al. 2014, is one step of eps without a random start, iFGSM, Kurakin et al. 2016, several.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        norm: Norm = "Linf",
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start)
        self.attack = type(self).__name__
        self.norm = norm
        self.gains: list[Tensor] = []

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, aim_N = self._given(x_NCHW, y_N)
        moved_NCHW = self._start(x_NCHW) if self.random_start else x_NCHW.clone()
        going = torch.arange(len(x_NCHW), device=x_NCHW.device)
        self.gains = []
        for _ in range(self.steps):
            slope_NCHW, gain_N, found_N = self._look(moved_NCHW[going], aim_N[going])
            self.gains.append(gain_N.mean())
            if self.stops:
                left = (~found_N).nonzero().flatten()
                going, slope_NCHW = going[left], slope_NCHW[left]
                if len(going) == 0:
                    break
            step_NCHW = self.alpha * steepest(slope_NCHW, self.norm)
            moved_NCHW[going] = project(moved_NCHW[going] + step_NCHW, x_NCHW[going], self.eps, self.norm)
        return moved_NCHW

    def _start(self, x_NCHW: Tensor) -> Tensor:
        draws, shape = self._random(x_NCHW), x_NCHW.shape[1:]
        if self.norm == "Linf":
            return (x_NCHW + self.eps * (2 * draws.uniform(*shape) - 1)).clamp(0, 1)
        direction_NCHW = draws.normal(*shape)
        radius_N111 = self.eps * draws.uniform(1, 1, 1)
        return (x_NCHW + radius_N111 * direction_NCHW / lengths(direction_NCHW)).clamp(0, 1)
