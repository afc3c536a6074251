"""RAND+FGSM.

Shapes: N images, C channels, H x W pixels, K classes; images lie in [0, 1].
"""

from __future__ import annotations

from torch import Tensor, nn

from attacks.algorithms.base import CorrectedAttack
from spaces.exceptions import InputError


class RandFGSM(CorrectedAttack):
    """RAND+FGSM: a random sign step of alpha, then FGSM with the remaining eps - alpha.

    torchattacks' RFGSM uses alpha for the noise and for each step: with eps 0.3, alpha 0.05 and one step it moves a
    pixel by at most 0.1.

    Args:
        eps: bound of the perturbation, L-inf, in pixel units of [0, 1].
        alpha: size of the random step, in the same units; a part of eps.

    Raises:
        InputError: alpha is not in [0, eps).

    Source: Tramer et al., Ensemble Adversarial Training, 2018, section 3.3: x' = x + alpha sign(N(0, I)),
    x_adv = x' + (eps - alpha) sign(grad J(x', y)).
    """

    def __init__(self, model: nn.Module, eps: float = 0.3, alpha: float = 0.05) -> None:
        if not (0 <= alpha < eps or alpha == eps == 0):
            raise InputError(f"alpha must be from 0 to below eps, {eps:g}, since it is a part of it, but is {alpha:g}")
        super().__init__("RandFGSM", model)
        self.eps = eps
        self.alpha = alpha
        self.supported_mode = ["default", "targeted"]

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, aim_N = self._given(x_NCHW, y_N)
        noisy_NCHW = (x_NCHW + self.alpha * self._random(x_NCHW).sign(*x_NCHW.shape[1:])).clamp(0, 1)
        step_NCHW = (self.eps - self.alpha) * self._look(noisy_NCHW, aim_N)[0].sign()
        return (noisy_NCHW + step_NCHW).clamp(0, 1)
