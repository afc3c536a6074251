"""Square: random search, without gradients.

Shapes: N images, C channels, H x W pixels, K classes, U random numbers, S x S pixels of a window.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache
from typing import get_args

import torch
import torchattacks
from torch import Tensor, nn

from attacks.algorithms.base import Best, CorrectedAttack, Rank, lengths, project
from attacks.seeding import Draws
from attacks.threat import Norm
from spaces.exceptions import choose

HALVINGS = 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000
"""Query counts after which Square halves the share of pixels in its window; not rescaled to the number of queries."""


class Square(CorrectedAttack, torchattacks.Square):  # type: ignore[misc]  # torchattacks is not typed
    """Square attack: random search over windows, without gradients.

    Corrects torchattacks' Square: (1) a window's place, and in L-inf its signs, are shared by the batch, and an image's
    random numbers depend on which others are still attacked; (2) it resets the global generators at each call; (3) it
    rescales the schedule of window sizes to the number of queries, unlike AutoAttack; (4) no window reaches the last
    row or column; (5) in L2, images below 5 x 5 and windows wider than the image raise an error.

    Returns each image's query with the highest logit margin; with `stops`, the first misclassified one. After a call,
    `queries_N` holds the number of queries of each image.

    Args:
        eps: bound of the perturbation, in pixel units of [0, 1].
        queries: most queries per image.
        p_init: initial share of the image's pixels in the window.
        rank: what is maximised; `evading` needs a View of a model that rejects.

    Raises:
        InputError: the norm is not a legal one.

    Source: Andriushchenko et al., Square Attack, 2020, Algorithms 1 to 3 and Eq. 2.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        queries: int = 5000,
        norm: Norm = "Linf",
        p_init: float = 0.8,
        rank: Rank = "lead",
    ) -> None:
        choose("the norm", norm, get_args(Norm))
        super().__init__(model, norm, eps, queries, p_init=p_init, resc_schedule=False)
        self.supported_mode = ["default"]
        self.queries_N = torch.zeros(0)
        self.rank = rank

    @torch.no_grad()
    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, y_N = self._given(x_NCHW, y_N)
        draws, channels = self._random(x_NCHW), x_NCHW.shape[1]
        start_NCHW = self._start(x_NCHW, draws)
        best = Best(x_NCHW, torch.full_like(y_N, -torch.inf, dtype=x_NCHW.dtype))
        self.queries_N = torch.zeros_like(y_N)
        for i in range(self.n_queries):
            going = best.left(self.stops)
            if len(going) == 0:
                break
            u_NU = draws.uniform(5 + channels)[going]
            moved_NCHW = self._jump(i, x_NCHW[going], best.x_NCHW[going], u_NU) if i else start_NCHW
            best.offer(going, moved_NCHW, self._rank(moved_NCHW, y_N[going], best.rank_N[going]))
            self.queries_N[going] += 1
        return best.x_NCHW

    def _start(self, x_NCHW: Tensor, draws: Draws) -> Tensor:
        """Return images perturbed by vertical stripes or, in L2, tiles, of random signs."""
        _, C, H, W = x_NCHW.shape
        if self.norm == "Linf":
            return (x_NCHW + self.eps * draws.sign(C, 1, W)).clamp(0, 1)
        side = max(1, min(H, W) // 5)
        signs_NCHW = draws.sign(C, H // side + 1, W // side + 1).repeat_interleave(side, 2).repeat_interleave(side, 3)
        tiles_HW = _eta(side, x_NCHW.device).repeat(H // side + 1, W // side + 1)
        nu_NCHW = (signs_NCHW * tiles_HW)[..., :H, :W]
        return (x_NCHW + self.eps * nu_NCHW / lengths(nu_NCHW)).clamp(0, 1)

    def _jump(self, i: int, x_NCHW: Tensor, best_NCHW: Tensor, u_NU: Tensor) -> Tensor:
        """Return the best images with one window changed."""
        _, C, H, W = x_NCHW.shape
        side = self._side(i, H, W)
        rows_NH1, cols_N1W, in_N1HW = _window(u_NU[:, 0:2], side, H, W)
        rho_NC11 = torch.where(u_NU[:, 5:] < 0.5, -1.0, 1.0)[:, :, None, None]
        if self.norm == "Linf":
            return project(best_NCHW + 2 * self.eps * rho_NC11 * in_N1HW, x_NCHW, self.eps, self.norm)
        nu_NCHW, second_N1HW = best_NCHW - x_NCHW, _window(u_NU[:, 2:4], side, H, W)[2]
        eta_SS, (rows_NH1, cols_N1W) = _eta(side, x_NCHW.device), (t.clamp(0, side - 1) for t in (rows_NH1, cols_N1W))
        turned_N11 = u_NU[:, 4, None, None] < 0.5
        eta_N1HW = torch.where(turned_N11, eta_SS[cols_N1W, rows_NH1], eta_SS[rows_NH1, cols_N1W])[:, None]
        unused_N111 = (self.eps**2 - lengths(nu_NCHW) ** 2).clamp(min=0)
        available_NC11 = (_norms(nu_NCHW * (in_N1HW | second_N1HW)) ** 2 + unused_N111 / C).sqrt()
        new_NCHW = (rho_NC11 * eta_N1HW + nu_NCHW / _norms(nu_NCHW * in_N1HW)) * in_N1HW
        nu_NCHW = torch.where(in_N1HW, new_NCHW / _norms(new_NCHW) * available_NC11, nu_NCHW * ~second_N1HW)
        return project(x_NCHW + nu_NCHW, x_NCHW, self.eps, self.norm)

    def _side(self, i: int, height: int, width: int) -> int:
        """Return the side h of the window of query i; odd in L2."""
        p = self.p_init / 2 ** bisect_left(HALVINGS, i)
        side, most = round(math.sqrt(p * height * width)), min(height, width)
        return min(max(side, 3) | 1, (most - 1) | 1) if self.norm == "L2" else min(max(side, 1), most)


def _window(u_N2: Tensor, side: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each pixel's row, NH1, and column, N1W, in a randomly placed window, and whether it lies inside, N1HW."""
    top_N, left_N = (u_N2[:, 0] * (height - side + 1)).long(), (u_N2[:, 1] * (width - side + 1)).long()
    rows_NH1 = torch.arange(height, device=u_N2.device)[:, None] - top_N[:, None, None]
    cols_N1W = torch.arange(width, device=u_N2.device) - left_N[:, None, None]
    in_NHW = (rows_NH1 >= 0) & (rows_NH1 < side) & (cols_N1W >= 0) & (cols_N1W < side)
    return rows_NH1, cols_N1W, in_NHW[:, None]


@lru_cache
def _eta(side: int, device: torch.device) -> Tensor:
    """Return the L2 step's window of norm 1, SS: nested squares, positive in one half, negative in the other."""
    n = side // 2
    tails = torch.arange(1, n + 2).float().pow(-2).flip(0).cumsum(0).flip(0)
    cols = (torch.arange(side) - n).abs()
    halves = [tails[torch.maximum((torch.arange(rows) - rows // 2).abs()[:, None], cols)] for rows in (n, side - n)]
    eta = torch.cat((halves[0], -halves[1]))
    return (eta / eta.norm()).to(device)


def _norms(step_NCHW: Tensor) -> Tensor:
    """Return the L2 norm of each channel, NC11, at least 1e-12."""
    return torch.linalg.vector_norm(step_NCHW, dim=(2, 3), keepdim=True).clamp(min=1e-12)
