"""The momentum iterative method.

Shapes: N images, C channels, H x W pixels, K classes; images lie in [0, 1].
"""

from __future__ import annotations

import torch
import torchattacks
from torch import Tensor, nn

from attacks.algorithms.base import CorrectedAttack


class MIM(CorrectedAttack, torchattacks.MIFGSM):  # type: ignore[misc]  # torchattacks is not typed
    """The momentum iterative method.

    Corrects torchattacks' MIFGSM, which divides by the mean absolute gradient (the paper's L1 norm up to a factor that
    the sign ignores): after a single zero gradient the momentum is NaN, whose sign is 0, and the image never moves
    again. Here a zero gradient adds nothing and the momentum is kept.

    Args:
        eps: bound of the perturbation, L-inf, in pixel units of [0, 1].
        alpha: step size, in the same units.
        decay: decay factor of the momentum, mu.

    Source: Dong et al., Boosting Adversarial Attacks with Momentum, 2018, Algorithm 1.
    """

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10, decay: float = 1.0
    ) -> None:
        super().__init__(model, eps, alpha, steps, decay)
        self.attack = "MIM"

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, aim_N = self._given(x_NCHW, y_N)
        moved_NCHW, momentum_NCHW = x_NCHW.clone(), torch.zeros_like(x_NCHW)
        for _ in range(self.steps):
            slope_NCHW = self._look(moved_NCHW, aim_N)[0]
            size_N111 = slope_NCHW.abs().mean((1, 2, 3), keepdim=True)
            unit_NCHW = torch.where(size_N111 > 0, slope_NCHW / size_N111, 0)
            momentum_NCHW = self.decay * momentum_NCHW + unit_NCHW
            moved_NCHW = moved_NCHW + self.alpha * momentum_NCHW.sign()
            moved_NCHW = (x_NCHW + (moved_NCHW - x_NCHW).clamp(-self.eps, self.eps)).clamp(0, 1)
        return moved_NCHW
