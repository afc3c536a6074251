"""What attacks keep of each image.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Best:
    """The best image so far of each, by a rank that is above 0 where it needs no better one."""

    def __init__(self, x_NCHW: Tensor, rank_N: Tensor) -> None:
        self.x_NCHW, self.rank_N = x_NCHW.clone(), rank_N

    def left(self, stops: bool) -> Tensor:
        """Return the places of the images to attack on: with `stops` those that need a better one, else all."""
        every = torch.arange(len(self.rank_N), device=self.rank_N.device)
        return every[self.rank_N <= 0] if stops else every

    def offer(self, going: Tensor, moved_NCHW: Tensor, rank_N: Tensor) -> None:
        better_N = rank_N > self.rank_N[going]
        self.rank_N[going] = torch.where(better_N, rank_N, self.rank_N[going])
        self.x_NCHW[going] = where(better_N, moved_NCHW, self.x_NCHW[going])


def lead(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """Return by how much the best wrong logit exceeds the label's; NaN, which fools nobody, counts as least."""
    others_NK = logits_NK.scatter(1, y_N[:, None], -torch.inf)
    lead_N = others_NK.amax(1) - logits_NK.gather(1, y_N[:, None])[:, 0]
    return torch.where(lead_N.isnan(), -torch.inf, lead_N)


def wide(t_N: Tensor) -> Tensor:
    """Return a number of each image so that it multiplies the image, N111."""
    return t_N[:, None, None, None]


def where(take_N: Tensor, one_NCHW: Tensor, other_NCHW: Tensor) -> Tensor:
    """Return of each image the one or the other."""
    return torch.where(wide(take_N), one_NCHW, other_NCHW)
