"""The L2 attack of Carlini and Wagner.

Shapes: N images, C channels, H x W pixels, K classes; images lie in [0, 1].
"""

from __future__ import annotations

import torch
import torchattacks
from torch import Tensor, nn

from attacks.algorithms.base import CorrectedAttack, slope, where


class CW(CorrectedAttack, torchattacks.CW):  # type: ignore[misc]  # torchattacks is not typed
    """The Carlini-Wagner L2 attack, with independent images.

    Corrects torchattacks' CW: (1) pixels at 0 and 1 map to atanh(+-1), which is infinite, and never move; (2) the best
    other logit is taken as 0 where all are negative, since the label's is masked by a multiplication with 0; (3) early
    stopping uses the loss of the whole batch, so that an image's result depends on the others: here there is none;
    (4) a success does not require the confidence kappa, which so has no effect; (5) there is no search for c.

    The original is returned for an image without a success.

    Args:
        c: weight of the classification term; the first value tried if it is searched.
        kappa: confidence: the margin, in logits, by which the wrong class (or the target) must lead.
        lr: Adam's learning rate on w = atanh(2x - 1). Pixels at 0 and 1 start at w = -+7.25, where tanh is flat, and
            move only if lr * steps is about 10: on binarised digits, 50 steps succeed on 8 % at lr 0.1, on 94 % at 0.2.
        binary_search_steps: values of c tried for each image; 0 and 1: `c` alone.

    Source: Carlini and Wagner, Towards Evaluating the Robustness of Neural Networks, 2017, sections V.B, VI.A, and
    for (1) and the bounds of the search CleverHans 4.0, carlini_wagner_l2.
    """

    def __init__(
        self,
        model: nn.Module,
        c: float = 1.0,
        kappa: float = 0.0,
        steps: int = 50,
        lr: float = 0.01,
        binary_search_steps: int = 0,
    ) -> None:
        super().__init__(model, c, kappa, steps, lr)
        self.binary_search_steps = binary_search_steps

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, aim_N = self._given(x_NCHW, y_N)
        best_NCHW, best_N = x_NCHW.clone(), x_NCHW.new_full((len(x_NCHW),), torch.inf)
        c_N = torch.full_like(best_N, self.c)
        low_N, high_N = torch.zeros_like(c_N), torch.full_like(c_N, torch.inf)
        for _ in range(max(1, self.binary_search_steps)):
            found_N = self._minimise(x_NCHW, aim_N, c_N, best_NCHW, best_N)
            low_N, high_N = torch.where(found_N, low_N, c_N), torch.where(found_N, c_N, high_N)
            c_N = torch.where(high_N.isfinite(), (low_N + high_N) / 2, 10 * c_N)
        return best_NCHW

    def _minimise(self, x_NCHW: Tensor, aim_N: Tensor, c_N: Tensor, best_NCHW: Tensor, best_N: Tensor) -> Tensor:
        """Run one descent, improve `best_NCHW` and its squared distances `best_N` in place; return the successes, N."""
        w_NCHW = self.inverse_tanh_space(x_NCHW).requires_grad_()
        adam = torch.optim.Adam([w_NCHW], lr=self.lr)
        found_N = torch.zeros_like(aim_N, dtype=torch.bool)
        for _ in range(self.steps):
            moved_NCHW = self.tanh_space(w_NCHW)
            squared_N = (moved_NCHW - x_NCHW).square().flatten(1).sum(1)
            logits_NK = self.get_logits(moved_NCHW)
            f_N = self.f(logits_NK, aim_N)
            w_NCHW.grad = slope(squared_N + c_N * f_N, w_NCHW)
            adam.step()
            with torch.no_grad():
                hit_N = ((logits_NK.argmax(1) == aim_N) == self.targeted) & (f_N <= -self.kappa)
                better_N = hit_N & (squared_N < best_N)
                best_N.copy_(torch.where(better_N, squared_N, best_N))
                best_NCHW.copy_(where(better_N, moved_NCHW, best_NCHW))
                found_N |= hit_N
        return found_N

    def inverse_tanh_space(self, x_NCHW: Tensor) -> Tensor:
        return torch.atanh((2 * x_NCHW - 1) * 0.999999)

    def f(self, logits_NK: Tensor, aim_N: Tensor) -> Tensor:
        """Return the margin still to overcome, at least -kappa. Source: section V.A, f_6."""
        aim_N1 = aim_N[:, None]
        real_N = logits_NK.gather(1, aim_N1).squeeze(1)
        other_N = logits_NK.scatter(1, aim_N1, -torch.inf).max(1).values
        return (other_N - real_N if self.targeted else real_N - other_N).clamp(min=-self.kappa)
