"""Projected gradient descent among images that look untouched: on the grid of their levels, with their zeros and ones.

Shapes: N images, C channels, H x W pixels; images lie in [0, 1].
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from attacks.algorithms.base import project, steepest
from attacks.algorithms.pgd import PGD
from attacks.threat import Norm
from spaces.exceptions import choose

Kept = Literal["levels", "extremes", "both"]
LEVELS = 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 100, 127, 128, 255, 256, 511, 512, 1023, 1024, 4095, 4096, 65535
"""Numbers of steps between black and white that stored images have."""
OFF = 1e-3
"""Largest distance of a pixel from its level, in steps (of 65535: times 65), that float32 explains."""
ROUNDED = 1.2e-7
"""Twice the rounding error of a pixel in float32."""


class RegularPGD(PGD):
    """Projected gradient ascent on the cross-entropy over images that keep regularities of the given ones.

    Attacks move every pixel off the levels that images are stored in (k / 255), and zeros off zero. A model that
    answers otherwise on such images is attacked by none of their kind; here every image that the model sees is regular.
    The gradient is taken at the regular image, and moves an unrestricted one that is made regular anew (the
    straight-through estimate of Bengio et al., 2013). With `stops`, the first misclassified image is returned.

    Args:
        kept: `levels`: each perturbation is rounded towards zero to levels of the images, if they have any;
            `extremes`: a pixel at its image's least or greatest value keeps it, and no other reaches them; `both`.
        eps, alpha, steps, norm: those of `PGD`; it starts from the image.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        norm: Norm = "Linf",
        kept: Kept = "both",
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start=False, norm=norm)
        choose("kept", kept, get_args(Kept))
        self.kept = kept

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, aim_N = self._given(x_NCHW, y_N)
        free_NCHW, shown_NCHW = x_NCHW.clone(), x_NCHW.clone()
        going = torch.arange(len(x_NCHW), device=x_NCHW.device)
        for _ in range(self.steps):
            slope_NCHW, _, found_N = self._look(shown_NCHW[going], aim_N[going])
            if self.stops:
                left = (~found_N).nonzero().flatten()
                going, slope_NCHW = going[left], slope_NCHW[left]
                if len(going) == 0:
                    break
            step_NCHW, x = self.alpha * steepest(slope_NCHW, self.norm), x_NCHW[going]
            free_NCHW[going] = project(free_NCHW[going] + step_NCHW, x, self.eps, self.norm)
            shown_NCHW[going] = regular(free_NCHW[going], x, self.kept)
        return shown_NCHW


def regular(moved_NCHW: Tensor, x_NCHW: Tensor, kept: Kept) -> Tensor:
    """Return the moved images with regularities of the given ones; none is farther from them than it was."""
    step_NCHW = moved_NCHW - x_NCHW
    if kept != "extremes":
        levels_N111 = levels(x_NCHW)
        whole_NCHW = (x_NCHW * levels_N111).round() + ((step_NCHW + ROUNDED * step_NCHW.sign()) * levels_N111).trunc()
        moved_NCHW = torch.where(levels_N111 > 0, whole_NCHW / levels_N111.clamp(min=1), moved_NCHW)
    if kept != "levels":
        low_N111, high_N111 = x_NCHW.amin((1, 2, 3), keepdim=True), x_NCHW.amax((1, 2, 3), keepdim=True)
        ends_NCHW = (x_NCHW == low_N111) | (x_NCHW == high_N111)
        reaches_NCHW = (moved_NCHW <= low_N111) | (moved_NCHW >= high_N111)
        moved_NCHW = torch.where(ends_NCHW | reaches_NCHW, x_NCHW, moved_NCHW)
    return moved_NCHW


def levels(x_NCHW: Tensor) -> Tensor:
    """Return the number of steps from black to white in which each image is stored, N111; 0 where there is none."""
    found_N111 = x_NCHW.new_zeros(len(x_NCHW), 1, 1, 1)
    for steps in LEVELS[::-1]:
        off_N111 = ((x_NCHW * steps).round() - x_NCHW * steps).abs().amax((1, 2, 3), keepdim=True)
        found_N111 = torch.where(off_N111 < OFF * max(1, steps / 1000), steps, found_N111)
    return found_N111
