"""DeepFool.

Shapes: N images, C channels, H x W pixels, K classes, J rival classes; images lie in [0, 1].
"""

from __future__ import annotations

import torch
import torchattacks
from torch import Tensor, nn

from attacks.algorithms.base import CorrectedAttack, slope

CROSSING = 1e-4
"""How far beyond the linearised boundary each of DeepFool's steps goes, L2, in pixel units of [0, 1]."""


class DeepFool(CorrectedAttack, torchattacks.DeepFool):  # type: ignore[misc]  # torchattacks is not typed
    """DeepFool of all images at once; an image stops where the model is wrong.

    Mends the stock DeepFool: (1) it goes image by image; (2) where a gradient is zero it divides by it: the image
    becomes NaN, whose predicted class is 0 and counts as a success. Here that image stops where it is; (3) where
    pixels are held at 0 or 1 its steps shrink towards the boundary without crossing it: of 64 digits 60 end
    within 1e-6 of it, right or wrong as rounding has it. Here each step goes `CROSSING` beyond, as in CleverHans.

    Args:
        overshoot: by what share each step is longer than to the linearised boundary.
        classes: how many classes are considered: the label, and those next to it by the given image's logits.

    Source: Moosavi-Dezfooli et al., DeepFool, 2016, Algorithm 2; overshoot and classes as in its authors' code.
    """

    def __init__(self, model: nn.Module, steps: int = 50, overshoot: float = 0.02, classes: int = 10) -> None:
        super().__init__(model, steps, overshoot)
        self.classes = classes

    def forward_return_target_labels(self, x_NCHW: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images, and the class that each is found in."""
        x_NCHW, y_N = self._given(x_NCHW, y_N)
        x_NCHW = x_NCHW.clone()
        with torch.no_grad():
            logits_NK = self.get_logits(x_NCHW)
        others_NK = logits_NK.scatter(1, y_N[:, None], -torch.inf)
        rivals_NJ = others_NK.topk(min(self.classes, others_NK.shape[1]) - 1).indices
        found_N, led_N = logits_NK.argmax(1), torch.ones_like(y_N, dtype=torch.bool)
        for _ in range(self.steps):
            going = ((found_N == y_N) & led_N).nonzero().flatten()
            if len(going) == 0:
                break
            r_NCHW, led_N[going] = self._step(x_NCHW[going], y_N[going], rivals_NJ[going])
            x_NCHW[going] = (x_NCHW[going] + (1 + self.overshoot) * r_NCHW).clamp(0, 1)
            # A pass without a graph tells who has arrived: they need no backward pass for each class.
            with torch.no_grad():
                found_N[going] = self.get_logits(x_NCHW[going]).argmax(1)
        return x_NCHW, found_N

    def _step(self, x_NCHW: Tensor, y_N: Tensor, rivals_NJ: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step over the nearest linearised boundary, or zero, and whether there is one."""
        x_NCHW = x_NCHW.requires_grad_()
        logits_NK = self.get_logits(x_NCHW)
        f_NJ = logits_NK.gather(1, rivals_NJ) - logits_NK.gather(1, y_N[:, None])
        r_NCHW, nearest_N = torch.zeros_like(x_NCHW), f_NJ.new_full((len(y_N),), torch.inf)
        for j, f_N in enumerate(f_NJ.unbind(1)):
            w_NCHW = slope(f_N, x_NCHW, again=j + 1 < f_NJ.shape[1])
            norm_N = w_NCHW.flatten(1).norm(dim=1)
            distance_N = f_N.detach().abs() / norm_N
            nearer_N = (distance_N < nearest_N) & norm_N.isfinite()  # not so for 0 / 0, that is NaN, nor for 1 / 0
            nearest_N = torch.where(nearer_N, distance_N, nearest_N)
            length_N111, norm_N111 = (t_N[:, None, None, None] for t_N in (distance_N + CROSSING, norm_N))
            r_NCHW = torch.where(nearer_N[:, None, None, None], length_N111 * (w_NCHW / norm_N111), r_NCHW)
        return r_NCHW, nearest_N.isfinite()
