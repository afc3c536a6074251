"""Common parts of the corrected attacks, which leave the model and the global generators unchanged and whose random
numbers depend on the image, not on the batch.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torchattacks
from torch import Tensor
from torch.nn import functional as F

from attacks.gradient_view import View, limits, within_spread
from attacks.seeding import Draws, evaluating, seeded
from attacks.threat import Norm

NEVER = 1e9
"""Value used for an infinite threshold: far above every score, small enough for float64 to distinguish margins."""
Rank = Literal["lead", "margin", "evading"]
"""What attacks that use answers alone maximise: the logit margin; the same in units of the logits' spread, for models
that scale them; or the lesser of that and of how far the image is from being rejected."""


class CorrectedAttack(torchattacks.attack.Attack):  # type: ignore[misc]  # torchattacks is not typed
    """An attack that leaves its model and torch's generators unchanged, even if it raises.

    torchattacks' `__call__` restores the mode of the top module only, with train(), so that a frozen submodule ends up
    in train mode, and restores nothing on an error. Some of its attacks add to the `grad` of the model's parameters,
    and some reset the global generators at each call, which replays a stochastic defense's noise. Attacks here
    differentiate with respect to the input only and draw from `draws`. Losses are summed over the batch, so that an
    image's gradient does not depend on the other images.

    Attributes:
        draws: random numbers of the images; None: at each call, those of seed 0 and the places in the batch.
        stops: whether a misclassified image is returned at once, without further steps. False where the model is
            stochastic or can reject, and where the images are meant to fool another model.
        rank: what attacks that use answers alone maximise.
    """

    draws: Draws | None = None
    stops: bool = False
    rank: Rank = "lead"

    def __call__(self, x_NCHW: Tensor, y_N: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        applied = self._normalization_applied
        try:
            with evaluating(self.model), seeded(), torch.enable_grad():
                return super().__call__(x_NCHW, y_N, *args, **kwargs)
        finally:
            self._set_normalization_applied(applied)

    def _given(self, x_NCHW: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images on the model's device, and the labels to move away from or, if targeted, to reach."""
        x_NCHW, y_N = x_NCHW.detach().to(self.device), y_N.detach().to(self.device)
        return x_NCHW, self.get_target_label(x_NCHW, y_N) if self.targeted else y_N

    def _random(self, x_NCHW: Tensor) -> Draws:
        """Return the random numbers of the images."""
        return self.draws or Draws(0, torch.arange(len(x_NCHW), device=x_NCHW.device))

    def _comparable(self, x_NCHW: Tensor) -> Tensor:
        """Return logits_NK by which images may be compared: the view's, and of two classes the unscaled ones.

        Two logits in units of their own spread are always as far apart.
        """
        if not isinstance(self.model, View):
            return self.get_logits(x_NCHW)
        logits_NK = self.model.unscaled(x_NCHW)
        return within_spread(logits_NK) if logits_NK.shape[1] > 2 else logits_NK

    def _rank(self, x_NCHW: Tensor, y_N: Tensor, floor_N: Tensor | None = None) -> Tensor:
        """Return how good adversarial images are, above 0 where they succeed, N; without a gradient. See `Rank`.

        Args:
            floor_N: ranks from which on they matter: detectors are not asked about images whose margin is no higher.
        """
        logits_NK = self._comparable(x_NCHW)
        rank_N = lead(logits_NK, y_N) if self.rank == "lead" else margin(logits_NK, y_N)
        if self.rank != "evading":
            return rank_N
        wanted_N = torch.ones_like(rank_N, dtype=torch.bool) if floor_N is None else rank_N > floor_N
        if len(asked := wanted_N.nonzero().flatten()):
            over_N = excess(self.model.suspicion(x_NCHW[asked]), limits(self.model.target)).to(rank_N)
            rank_N[asked] = torch.minimum(rank_N[asked], -over_N)
        return rank_N

    def _gain(self, x_NCHW: Tensor, aim_N: Tensor, logits_NK: Tensor) -> Tensor:
        """Return the objective that the attack maximises, N: the cross-entropy of `aim_N`, negated if targeted."""
        loss_N = F.cross_entropy(logits_NK, aim_N, reduction="none")
        return -loss_N if self.targeted else loss_N

    def _look(self, x_NCHW: Tensor, aim_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient of the gain, the gain, and whether the attack already succeeds, bool_N."""
        x_NCHW = x_NCHW.detach().requires_grad_()
        logits_NK = self.get_logits(x_NCHW)
        gain_N = self._gain(x_NCHW, aim_N, logits_NK)
        return slope(gain_N, x_NCHW), gain_N.detach(), (logits_NK.argmax(1) == aim_N) == self.targeted


def slope(gain_N: Tensor, x_NCHW: Tensor, *, again: bool = False) -> Tensor:
    """Return the gradient that an attack follows, that of `gradient_of` with zeros where it is not finite.

    One such pixel would end the step of all in L2, whose length it enters.
    """
    return gradient_of(gain_N, x_NCHW, again=again).nan_to_num(0.0, 0.0, 0.0)


def gradient_of(gain_N: Tensor, x_NCHW: Tensor, *, again: bool = False) -> Tensor:
    """Return the gradient of each image's gain with respect to the image; zero where there is none.

    torchattacks raises where a purifier has no gradient; here the audit reports it.

    Args:
        again: keep the graph for another gradient.
    """
    if not gain_N.requires_grad:
        return torch.zeros_like(x_NCHW)
    (slope_NCHW,) = torch.autograd.grad(gain_N.sum(), x_NCHW, allow_unused=True, retain_graph=again)
    return torch.zeros_like(x_NCHW) if slope_NCHW is None else slope_NCHW


def project(moved_NCHW: Tensor, x_NCHW: Tensor, eps: float, norm: Norm) -> Tensor:
    """Return the images nearest to the moved ones within eps of the given ones and in [0, 1].

    In L2, as in torchattacks, the projection onto the ball comes before the clip to [0, 1], which stays in the ball.
    """
    step_NCHW = moved_NCHW - x_NCHW
    if norm == "Linf":
        return (x_NCHW + step_NCHW.clamp(-eps, eps)).clamp(0, 1)
    length_N111 = lengths(step_NCHW)
    return (x_NCHW + step_NCHW * (eps / length_N111.clamp(min=1e-12)).clamp(max=1)).clamp(0, 1)


def steepest(slope_NCHW: Tensor, norm: Norm) -> Tensor:
    """Return the direction of steepest ascent, of length 1 in the norm: the signs, or the normalised gradient.

    It is zero where the gradient is zero; torchattacks' PGDL2 adds 1e-10 to the norm of a gradient of the batch's mean.
    """
    if norm == "Linf":
        return slope_NCHW.sign()
    length_N111 = lengths(slope_NCHW)
    return torch.where(length_N111 > 0, slope_NCHW / length_N111, 0)


def lengths(step_NCHW: Tensor) -> Tensor:
    """Return the L2 norm of each perturbation, N111."""
    return step_NCHW.flatten(1).norm(dim=1)[:, None, None, None]


class Best:
    """The best adversarial example of each image so far; a rank above 0 means that no better one is needed."""

    def __init__(self, x_NCHW: Tensor, rank_N: Tensor) -> None:
        self.x_NCHW, self.rank_N = x_NCHW.clone(), rank_N

    def left(self, stops: bool) -> Tensor:
        """Return the indices of the images still to attack: with `stops` those without a success, else all."""
        every = torch.arange(len(self.rank_N), device=self.rank_N.device)
        return every[self.rank_N <= 0] if stops else every

    def offer(self, going: Tensor, moved_NCHW: Tensor, rank_N: Tensor) -> None:
        better_N = rank_N > self.rank_N[going]
        self.rank_N[going] = torch.where(better_N, rank_N, self.rank_N[going])
        self.x_NCHW[going] = where(better_N, moved_NCHW, self.x_NCHW[going])


def lead(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """Return the logit margin, the best wrong logit minus the label's; NaN, which is no success, counts as -inf."""
    others_NK = logits_NK.scatter(1, y_N[:, None], -torch.inf)
    lead_N = others_NK.amax(1) - logits_NK.gather(1, y_N[:, None])[:, 0]
    return torch.where(lead_N.isnan(), -torch.inf, lead_N)


def margin(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """Return the logit margin in units of the image's own spread of logits, so that their scale decides nothing, N.

    Of two classes it would be 2 or -2 in these units, whatever the image: they are left out.
    """
    if logits_NK.shape[1] == 2:
        return lead(logits_NK, y_N)
    spread_N = logits_NK.std(dim=1, correction=0)
    return lead(logits_NK, y_N) / torch.where(spread_N > 0, spread_N, 1.0)


def excess(suspicion_NS: Tensor, limits_S: Tensor) -> Tensor:
    """Return the rejection margin, the largest (score - threshold) / (1 + |threshold|) over the detectors, N."""
    limits_S = limits_S.to(suspicion_NS.device, torch.float64).clamp(-NEVER, NEVER)
    return ((suspicion_NS - limits_S) / (1 + limits_S.abs())).amax(dim=1)


def wide(t_N: Tensor) -> Tensor:
    """Return one number per image, shaped to multiply the images, N111."""
    return t_N[:, None, None, None]


def where(take_N: Tensor, one_NCHW: Tensor, other_NCHW: Tensor) -> Tensor:
    """Return, per image, the first image where `take_N` is true, else the second."""
    return torch.where(wide(take_N), one_NCHW, other_NCHW)


def rivals(logits_NK: Tensor, y_N: Tensor, count: int) -> Tensor:
    """Return the classes with the highest logits other than the label, NJ, in descending order."""
    return logits_NK.scatter(1, y_N[:, None], -torch.inf).topk(min(count, logits_NK.shape[1] - 1)).indices


def ahead(logits_NK: Tensor, y_N: Tensor, rival_N: Tensor) -> Tensor:
    return (logits_NK.gather(1, rival_N[:, None]) - logits_NK.gather(1, y_N[:, None]))[:, 0]


def sizes(step_NCHW: Tensor, norm: Norm) -> Tensor:
    return step_NCHW.abs().amax((1, 2, 3), keepdim=True) if norm == "Linf" else lengths(step_NCHW)
