"""DeepFool.

Shapes: N images, C channels, H x W pixels, K classes, J target classes; images lie in [0, 1].
"""

from __future__ import annotations

import torch
import torchattacks
from torch import Tensor, nn

from attacks.algorithms.base import CorrectedAttack, slope

CROSSING = 1e-4
"""Distance by which each DeepFool step exceeds the linearised boundary, L2, in pixel units of [0, 1]."""


class DeepFool(CorrectedAttack, torchattacks.DeepFool):  # type: ignore[misc]  # torchattacks is not typed
    """DeepFool on all images at once; an image stops once it is misclassified.

    Corrects torchattacks' DeepFool: (1) it attacks one image at a time; (2) it divides by a gradient that may be zero:
    the image becomes NaN, whose predicted class 0 counts as a success; here such an image stays where it is; (3) where
    pixels are clipped at 0 or 1 its steps shrink towards the boundary without crossing it: of 64 digits 60 end within
    1e-6 of it, and rounding decides their class; here each step goes `CROSSING` beyond, as in CleverHans.

    Args:
        overshoot: relative length by which each step exceeds the distance to the linearised boundary.
        classes: number of classes considered: the label and those with the next highest logits on the input.

    Source: Moosavi-Dezfooli et al., DeepFool, 2016, Algorithm 2; overshoot and classes as in its authors' code.
    """

    def __init__(self, model: nn.Module, steps: int = 50, overshoot: float = 0.02, classes: int = 10) -> None:
        super().__init__(model, steps, overshoot)
        self.classes = classes

    def forward_return_target_labels(self, x_NCHW: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and their predicted classes."""
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
            # A forward pass without a graph finds finished images, which need no backward pass for each class.
            with torch.no_grad():
                found_N[going] = self.get_logits(x_NCHW[going]).argmax(1)
        return x_NCHW, found_N

    def _step(self, x_NCHW: Tensor, y_N: Tensor, rivals_NJ: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step across the nearest linearised boundary, or zero, and whether there is one."""
        x_NCHW = x_NCHW.requires_grad_()
        logits_NK = self.get_logits(x_NCHW)
        f_NJ = logits_NK.gather(1, rivals_NJ) - logits_NK.gather(1, y_N[:, None])
        r_NCHW, nearest_N = torch.zeros_like(x_NCHW), f_NJ.new_full((len(y_N),), torch.inf)
        for j, f_N in enumerate(f_NJ.unbind(1)):
            w_NCHW = slope(f_N, x_NCHW, again=j + 1 < f_NJ.shape[1])
            norm_N = w_NCHW.flatten(1).norm(dim=1)
            distance_N = f_N.detach().abs() / norm_N
            nearer_N = (distance_N < nearest_N) & norm_N.isfinite()  # excludes 0 / 0 = NaN and 1 / 0 = inf
            nearest_N = torch.where(nearer_N, distance_N, nearest_N)
            length_N111, norm_N111 = (t_N[:, None, None, None] for t_N in (distance_N + CROSSING, norm_N))
            r_NCHW = torch.where(nearer_N[:, None, None, None], length_N111 * (w_NCHW / norm_N111), r_NCHW)
        return r_NCHW, nearest_N.isfinite()
