"""The four parts of AutoAttack, each usable alone: APGD (cross-entropy, and targeted), FAB-T and Square.

Source: Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks, 2020. Its standard version runs APGD with the cross-entropy, APGD targeted, FAB-T and Square in turn.
Shapes: N images, A of them still attacked, C channels, H x W pixels, D = CHW, K classes, J rival classes, U random
numbers, S x S pixels of a window. Of the papers' symbols x_..., d and d_orig are NCHW, f_... is N, alpha is N111.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache
from typing import Literal, get_args

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.threat import Norm
from attacks.tidy import Draws, Tidy, lengths, project, slope, steepest
from spaces.space import choose

Loss = Literal["ce", "dlr", "targeted"]
HALVINGS = 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000
"""After which queries Square halves the share of the pixels in its window; not rescaled to the queries that it has."""


class APGD(Tidy, torchattacks.APGD):  # type: ignore[misc]  # torchattacks is not typed
    """Auto-PGD: gradient ascent with momentum that halves an image's step size where its loss stalls.

    Mends the stock APGD and APGDT: (1) they take 10 steps where AutoAttack takes 100; (2) they reset the global
    generators at each call, which replays a stochastic defense's noise, and an image's start depends on who still
    stands; (3) a fooled image takes part to the end; (4) APGDT raises an IndexError below four classes, and with nine
    targets below ten; (5) in L2 all images take APGDT's step size of the first. Checkpoints and conditions are the
    paper's: the stock ones round otherwise, and compare the first loss with 0.

    Of each image the iterate with the highest lead of a wrong logit over the label's comes back, so that a wrong one
    goes before a right one, whatever the loss; with `stops` the first that is wrong, be it the given one.

    Args:
        eps: bound of the perturbation, in pixel units of [0, 1].
        loss: `ce`, cross-entropy; `dlr`, the difference of logits ratio, which scaling the logits leaves as it is;
            `targeted`, the targeted one, against the classes next to the label by the given image's logits. With
            three classes its denominator is that of `dlr`. With two none is left and it is the plain margin:
            signs, unit steps and comparisons of an image's losses ignore the scale as well.
        restarts: random starts, of each target.
        targets: how many classes `targeted` takes in turn.
        rho: the share of steps between two checkpoints that must have raised the loss.

    Raises:
        InputError: the norm or the loss is none of those.

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
            logits_NK = self.get_logits(x_NCHW)
        best, draws = _Best(x_NCHW, lead(logits_NK, y_N)), self._random(x_NCHW)
        for rival_N in _rivals(logits_NK, y_N, self.targets if self.loss == "targeted" else 1).unbind(1):
            for _ in range(self.n_restarts):
                self._climb(x_NCHW, y_N, rival_N, self._start(x_NCHW, draws), best)
        return best.x_NCHW

    def _start(self, x_NCHW: Tensor, draws: Draws) -> Tensor:
        """Return random images at the distance eps, as the authors' code, but where clipped to [0, 1]."""
        shape = x_NCHW.shape[1:]
        way_NCHW = 2 * draws.uniform(*shape) - 1 if self.norm == "Linf" else draws.normal(*shape)
        return (x_NCHW + self.eps * way_NCHW / _sizes(way_NCHW, self.norm)).clamp(0, 1)

    def _climb(self, x_NCHW: Tensor, y_N: Tensor, rival_N: Tensor, x_k: Tensor, best: _Best) -> None:
        """Climb once from `x_k`, and offer every iterate to `best`."""
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
            x_max, slope_max = _where(higher_N, x_k, x_max), _where(higher_N, slope_k, slope_max)
            f_max = torch.where(higher_N, f_k, f_max)
            if k in checkpoints:
                halved_N = (rises_N < self.thr_decr * (k - last)) | (~halved_N & (f_max == f_checked))
                eta_N, f_k = torch.where(halved_N, eta_N / 2, eta_N), torch.where(halved_N, f_max, f_k)
                x_k, slope_k = _where(halved_N, x_max, x_k), _where(halved_N, slope_max, slope_k)
                rises_N, f_checked, last = torch.zeros_like(f_k), f_max, k
            z_NCHW = project(x_k + _wide(eta_N) * steepest(slope_k, self.norm), x_NCHW, self.eps, self.norm)
            alpha = 0.75 if k else 1.0
            moved_NCHW = x_k + alpha * (z_NCHW - x_k) + (1 - alpha) * (x_k - x_before)
            x_before, x_k = x_k, project(moved_NCHW, x_NCHW, self.eps, self.norm)

    def _ask(self, x_NCHW: Tensor, y_N: Tensor, rival_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss's gradient, the loss, and the lead."""
        x_NCHW = x_NCHW.detach().requires_grad_()
        logits_NK = self.get_logits(x_NCHW)
        f_N = self._loss(logits_NK, y_N, rival_N)
        return slope(f_N, x_NCHW), f_N.detach(), lead(logits_NK.detach(), y_N)

    def _loss(self, logits_NK: Tensor, y_N: Tensor, rival_N: Tensor) -> Tensor:
        if self.loss == "ce":
            return F.cross_entropy(logits_NK, y_N, reduction="none")
        ahead_N = lead(logits_NK, y_N) if self.loss == "dlr" else _ahead(logits_NK, y_N, rival_N)
        ranked_NJ = logits_NK.topk(min(4, logits_NK.shape[1])).values
        if ranked_NJ.shape[1] == 2:
            return ahead_N
        low_N = ranked_NJ[:, 2 : 3 if self.loss == "dlr" else 4].mean(1)
        return ahead_N / (ranked_NJ[:, 0] - low_N + 1e-12)


class FAB(Tidy, torchattacks.FAB):  # type: ignore[misc]  # torchattacks is not typed
    """FAB-T: the least perturbation towards each rival class, along the linearised boundary.

    Mends the stock FAB: (1) it takes 10 steps where AutoAttack takes 100; (2) it resets the global generators at each
    call, and adds to the `grad` of the model's parameters; (3) it raises an IndexError below ten classes; (4) it goes
    on with an image that is within eps already; (5) in L2 it takes partial derivatives below 1e-8 for zero, so that
    logits divided by 1e9 look robust. Here a step depends on the gradient's direction alone.

    Of each image the nearest wrong one comes back if it is within eps, else the given one.

    Args:
        eps: what counts as found, in pixel units of [0, 1].
        targets: how many classes are taken in turn: those next to the label by the given image's logits.

    Raises:
        InputError: the norm is none of those.

    Source: Croce and Hein, Minimally distorted adversarial examples with a fast adaptive boundary attack, 2020,
    Algorithm 1, with one start and without the final search, as AutoAttack has it.
    """

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, steps: int = 100, norm: Norm = "Linf", targets: int = 9
    ) -> None:
        choose("the norm", norm, get_args(Norm))
        super().__init__(model, norm, eps, steps, multi_targeted=True, n_classes=targets + 1)
        self.supported_mode = ["default"]

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, y_N = self._given(x_NCHW, y_N)
        with torch.no_grad():
            logits_NK = self.get_logits(x_NCHW)
        # The rank is what is left of eps.
        best = _Best(x_NCHW, torch.where(lead(logits_NK, y_N) > 0, self.eps, x_NCHW.new_tensor(-torch.inf)))
        for rival_N in _rivals(logits_NK, y_N, self.n_target_classes).unbind(1):
            self._approach(x_NCHW, y_N, rival_N, best)
        return _where(best.rank_N >= 0, best.x_NCHW, x_NCHW)

    def _approach(self, x_NCHW: Tensor, y_N: Tensor, rival_N: Tensor, best: _Best) -> None:
        """Go to the boundary with the rivals, and offer every wrong iterate to `best`."""
        moved_NCHW = x_NCHW.clone()
        for _ in range(self.steps):
            going = best.left(self.stops)
            if len(going) == 0:
                break
            x_orig, x_i = x_NCHW[going], moved_NCHW[going].requires_grad_()
            f_N = _ahead(self.get_logits(x_i), y_N[going], rival_N[going])
            w_NCHW = slope(f_N, x_i)
            with torch.no_grad():
                off_N = (w_NCHW * (x_orig - x_i)).flatten(1).sum(1)
                # Both projections, of the iterate and of the given image, are one batch.
                both_NCHW, gap_N = torch.cat((x_i, x_orig)), torch.cat((-f_N, -f_N - off_N))
                d_NCHW = to_plane(both_NCHW, gap_N, w_NCHW.repeat(2, 1, 1, 1), self.norm)
                (d, d_orig), (size, size_orig) = d_NCHW.chunk(2), _sizes(d_NCHW, self.norm).chunk(2)
                alpha = (size / (size + size_orig).clamp(min=1e-12)).clamp(max=self.alpha_max)
                x_i = ((1 - alpha) * (x_i + self.eta * d) + alpha * (x_orig + self.eta * d_orig)).clamp(0, 1)
                wrong_N = lead(self.get_logits(x_i), y_N[going]) > 0
                spare_N = self.eps - _sizes(x_i - x_orig, self.norm).flatten()
                best.offer(going, x_i, torch.where(wrong_N, spare_N, -torch.inf))
                moved_NCHW[going] = _where(wrong_N, x_orig + self.beta * (x_i - x_orig), x_i)


class Square(Tidy, torchattacks.Square):  # type: ignore[misc]  # torchattacks is not typed
    """Square: random search over windows, without gradients.

    Mends the stock Square: (1) a window's place, and in L-inf its signs, are the same for the whole batch, and an
    image's draws depend on who still stands; (2) it resets the global generators at each call; (3) it rescales the
    schedule of the windows' sizes to the number of queries, as AutoAttack does not; (4) no window reaches the last row
    and the last column; (5) in L2, images below 5 x 5 and windows wider than the image raise.

    Of each image the query with the highest lead of a wrong logit over the label's comes back; with `stops` the first
    that is wrong. After a call `queries_N` holds how many each has cost.

    Args:
        eps: bound of the perturbation, in pixel units of [0, 1].
        queries: of each image at most.
        p_init: share of the image's pixels that lie in the window, at first.

    Raises:
        InputError: the norm is none of those.

    Source: Andriushchenko et al., Square Attack, 2020, Algorithms 1 to 3 and Eq. 2.
    """

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, queries: int = 5000, norm: Norm = "Linf", p_init: float = 0.8
    ) -> None:
        choose("the norm", norm, get_args(Norm))
        super().__init__(model, norm, eps, queries, p_init=p_init, resc_schedule=False)
        self.supported_mode = ["default"]
        self.queries_N = torch.zeros(0)

    @torch.no_grad()
    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, y_N = self._given(x_NCHW, y_N)
        draws, channels = self._random(x_NCHW), x_NCHW.shape[1]
        start_NCHW = self._start(x_NCHW, draws)
        best = _Best(x_NCHW, torch.full_like(y_N, -torch.inf, dtype=x_NCHW.dtype))
        self.queries_N = torch.zeros_like(y_N)
        for i in range(self.n_queries):
            going = best.left(self.stops)
            if len(going) == 0:
                break
            u_NU = draws.uniform(5 + channels)[going]
            moved_NCHW = self._jump(i, x_NCHW[going], best.x_NCHW[going], u_NU) if i else start_NCHW
            best.offer(going, moved_NCHW, lead(self.get_logits(moved_NCHW), y_N[going]))
            self.queries_N[going] += 1
        return best.x_NCHW

    def _start(self, x_NCHW: Tensor, draws: Draws) -> Tensor:
        """Return stripes, or in L2 a tiling, of random signs."""
        _, C, H, W = x_NCHW.shape
        if self.norm == "Linf":
            return (x_NCHW + self.eps * draws.sign(C, 1, W)).clamp(0, 1)
        side = max(1, min(H, W) // 5)
        signs_NCHW = draws.sign(C, H // side + 1, W // side + 1).repeat_interleave(side, 2).repeat_interleave(side, 3)
        tiles_HW = _eta(side, x_NCHW.device).repeat(H // side + 1, W // side + 1)
        nu_NCHW = (signs_NCHW * tiles_HW)[..., :H, :W]
        return (x_NCHW + self.eps * nu_NCHW / lengths(nu_NCHW)).clamp(0, 1)

    def _jump(self, i: int, x_NCHW: Tensor, best_NCHW: Tensor, u_NU: Tensor) -> Tensor:
        """Return the best images, changed in a window."""
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
        """Return the side of the i-th query's window, h: odd in L2."""
        p = self.p_init / 2 ** bisect_left(HALVINGS, i)
        side, most = round(math.sqrt(p * height * width)), min(height, width)
        return min(max(side, 3) | 1, (most - 1) | 1) if self.norm == "L2" else min(max(side, 1), most)


class _Best:
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
        self.x_NCHW[going] = _where(better_N, moved_NCHW, self.x_NCHW[going])


def lead(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """Return by how much the best wrong logit exceeds the label's; NaN, which fools nobody, counts as least."""
    others_NK = logits_NK.scatter(1, y_N[:, None], -torch.inf)
    lead_N = others_NK.amax(1) - logits_NK.gather(1, y_N[:, None])[:, 0]
    return torch.where(lead_N.isnan(), -torch.inf, lead_N)


def to_plane(x_NCHW: Tensor, gap_N: Tensor, w_NCHW: Tensor, norm: Norm) -> Tensor:
    """Return the least step d, in the norm, with <w, d> = gap and x + d in [0, 1]; if none, the one that comes nearest.

    That is d = sign(w) min(t |v|, room) with v = sign(w) in L-inf and w in L2: <w, d> rises with t, linearly between
    the values of t at which a pixel reaches 0 or 1. Where w is zero or not finite d is zero.

    Source: the projections of FAB, section 2, both solved by one sort.
    """
    x_ND, w_ND = x_NCHW.flatten(1), (w_NCHW * _wide(gap_N.sign())).flatten(1)
    scale_N1 = w_ND.abs().amax(1, keepdim=True)
    usable_N1 = (scale_N1 > 0) & scale_N1.isfinite()
    w_ND = torch.where(usable_N1, w_ND / scale_N1, 0)
    gap_N1 = torch.where(usable_N1, gap_N[:, None].abs() / scale_N1, 0)
    v_ND = w_ND.abs() if norm == "L2" else w_ND.abs().sign()
    room_ND = torch.where(w_ND > 0, 1 - x_ND, x_ND)
    turns_ND, order_ND = torch.where(v_ND > 0, room_ND / v_ND, 0).clamp(max=1e30).sort(1)
    full_ND, rate_ND = ((w_ND.abs() * part_ND).gather(1, order_ND) for part_ND in (room_ND, v_ND))
    at_face_ND, rate_ND = full_ND.cumsum(1) - full_ND, rate_ND.flip(1).cumsum(1).flip(1)
    first_N1 = torch.searchsorted(at_face_ND + turns_ND * rate_ND, gap_N1).clamp(max=x_ND.shape[1] - 1)
    at_face_N1, rate_N1, turn_N1 = (t_ND.gather(1, first_N1) for t_ND in (at_face_ND, rate_ND, turns_ND))
    t_N1 = torch.where(rate_N1 > 0, (gap_N1 - at_face_N1) / rate_N1, turn_N1).clamp(min=0).minimum(turn_N1)
    return (w_ND.sign() * (t_N1 * v_ND).minimum(room_ND)).view_as(x_NCHW)


def _checkpoints(steps: int) -> set[int]:
    """Return w_j = ceil(p_j steps), where p_0 = 0, p_1 = 0.22 and p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06)."""
    found, percent, stride = {0}, 22, 22
    while percent <= 100:
        found.add(math.ceil(percent * steps / 100))
        stride = max(stride - 3, 6)
        percent += stride
    return found


def _rivals(logits_NK: Tensor, y_N: Tensor, count: int) -> Tensor:
    """Return the classes next to the label, NJ, the likeliest first."""
    return logits_NK.scatter(1, y_N[:, None], -torch.inf).topk(min(count, logits_NK.shape[1] - 1)).indices


def _ahead(logits_NK: Tensor, y_N: Tensor, rival_N: Tensor) -> Tensor:
    return (logits_NK.gather(1, rival_N[:, None]) - logits_NK.gather(1, y_N[:, None]))[:, 0]


def _window(u_N2: Tensor, side: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each pixel's row, NH1, and column, N1W, in a window at a random place, and whether it lies in it, N1HW."""
    top_N, left_N = (u_N2[:, 0] * (height - side + 1)).long(), (u_N2[:, 1] * (width - side + 1)).long()
    rows_NH1 = torch.arange(height, device=u_N2.device)[:, None] - top_N[:, None, None]
    cols_N1W = torch.arange(width, device=u_N2.device) - left_N[:, None, None]
    in_NHW = (rows_NH1 >= 0) & (rows_NH1 < side) & (cols_N1W >= 0) & (cols_N1W < side)
    return rows_NH1, cols_N1W, in_NHW[:, None]


@lru_cache
def _eta(side: int, device: torch.device) -> Tensor:
    """Return the window of length 1 that an L2 step adds, SS: squares in squares, one half up, one down."""
    n = side // 2
    tails = torch.arange(1, n + 2).float().pow(-2).flip(0).cumsum(0).flip(0)
    cols = (torch.arange(side) - n).abs()
    halves = [tails[torch.maximum((torch.arange(rows) - rows // 2).abs()[:, None], cols)] for rows in (n, side - n)]
    eta = torch.cat((halves[0], -halves[1]))
    return (eta / eta.norm()).to(device)


def _sizes(step_NCHW: Tensor, norm: Norm) -> Tensor:
    return step_NCHW.abs().amax((1, 2, 3), keepdim=True) if norm == "Linf" else lengths(step_NCHW)


def _norms(step_NCHW: Tensor) -> Tensor:
    """Return the L2 norm of each channel, NC11, above 0."""
    return torch.linalg.vector_norm(step_NCHW, dim=(2, 3), keepdim=True).clamp(min=1e-12)


def _wide(t_N: Tensor) -> Tensor:
    return t_N[:, None, None, None]


def _where(take_N: Tensor, one_NCHW: Tensor, other_NCHW: Tensor) -> Tensor:
    return torch.where(_wide(take_N), one_NCHW, other_NCHW)
