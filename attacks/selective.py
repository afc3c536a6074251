"""Attacks on defenses that reject: be wrong and be accepted.

Shapes: N images, C channels, H x W pixels, S columns of suspicion, K classes; images lie in [0, 1].
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from attacks.corrected import PGD
from attacks.tidy import Draws, Tidy, evaluating, project, slope, steepest
from attacks.view import Guarded, limits

NEVER = 1e9
"""What an infinite limit counts as: far above every suspicion, and small enough for float64 to tell two apart."""
A, B = 2, 2
"""The exponents of Eq. 10 and 11, a and b (inferred: section 4 has them above 1)."""


class SelectivePGD(PGD):
    """Projected gradient descent that fools the detectors too, in either norm.

    Of an image that is still right it raises the cross-entropy; of one that is wrong it lowers the margin by which it
    is rejected, also where it is accepted already: one attack so serves stricter thresholds. No weight lies between
    the two. Where lowering the margin would lower the cross-entropy it goes at right angles to that: behind a MagNet
    74 of 100 digits are wrong and accepted at eps 0.2 without, and 85 with it. Where no gradient flows from the
    detectors the cross-entropy goes on rising. The margin is the greatest of (suspicion - limit) / (1 + |limit|) over
    the columns. Of each image the wrong iterate of the least margin is returned, else the last one. What is found wrong
    may be rejected: `stops` is ignored.

    Mends PGD, which knows no detector: what it makes wrong is rejected.

    Args: those of `PGD`; the model is a View of a defended classifier.

    Source: Bryniarski et al., Evading Adversarial Example Detection Defenses with Orthogonal Projected Gradient
    Descent, 2022, section 4, selective and orthogonal steps; which iterate is returned is ours.
    """

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, aim_N = self._given(x_NCHW, y_N)
        moved_NCHW = self._start(x_NCHW) if self.random_start else x_NCHW.clone()
        limits_S = limits(self.model.target).to(x_NCHW.device, torch.float64).clamp(-NEVER, NEVER)
        best_NCHW, least_N = moved_NCHW, limits_S.new_full((len(x_NCHW),), torch.inf)
        self.gains = []
        for step in range(self.steps + 1):
            with torch.set_grad_enabled(step < self.steps):  # the last iterate is looked at alone
                slope_NCHW, gain_N, margin_N = self._choose(moved_NCHW, aim_N, limits_S)
            better_N = margin_N < least_N
            least_N = torch.where(better_N, margin_N, least_N)
            best_NCHW = torch.where(better_N[:, None, None, None], moved_NCHW, best_NCHW)
            if step < self.steps:
                self.gains.append(gain_N.mean())
                step_NCHW = self.alpha * steepest(slope_NCHW, self.norm)
                moved_NCHW = project(moved_NCHW + step_NCHW, x_NCHW, self.eps, self.norm)
        return torch.where(least_N.isfinite()[:, None, None, None], best_NCHW, moved_NCHW)

    def _choose(self, moved_NCHW: Tensor, aim_N: Tensor, limits_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return where each image is to go, the gain, and the margin of the wrong ones, infinite for the others."""
        slope_NCHW, gain_N, wrong_N = self._look(moved_NCHW, aim_N)
        margin_N, wrong = limits_S.new_full((len(aim_N),), torch.inf), wrong_N.nonzero().flatten()
        if len(wrong):
            wrong_NCHW = moved_NCHW[wrong].requires_grad_()
            over_NS = (self.model.suspicion(wrong_NCHW) - limits_S) / (1 + limits_S.abs())
            margin_N[wrong] = over_NS.detach().amax(dim=1)
            aside_NCHW = _aside(slope(-over_NS.amax(dim=1), wrong_NCHW), slope_NCHW[wrong])
            slope_NCHW = slope_NCHW.index_copy(0, wrong, aside_NCHW.to(slope_NCHW))
        return slope_NCHW, gain_N, margin_N


def _aside(slope_NCHW: Tensor, climb_NCHW: Tensor) -> Tensor:
    """Return the slope without what of it runs against the climb; where there is no slope, the climb."""
    against_N, length_N = ((a * climb_NCHW).flatten(1).sum(1) for a in (slope_NCHW, climb_NCHW))
    share_N = against_N.clamp(max=0) / length_N.clamp(min=1e-30)
    there_N = slope_NCHW.flatten(1).any(dim=1)
    aside_NCHW = slope_NCHW - share_N[:, None, None, None] * climb_NCHW
    return torch.where(there_N[:, None, None, None], aside_NCHW, climb_NCHW)


class Mixture(Protocol):
    """What an attack needs of a defense that classifies in a mixture of Gaussians."""

    means_KL: Tensor

    def ratios(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor: ...


class MixtureAttack(Tidy):
    """The white-box attack of the GMVAE paper: an image near the given one that encoder and decoder take for a class.

    It is bounded by no eps: the squared length of the perturbation is a term of the loss. After each step pixels are
    cut off at 0 and 1. The class is a random wrong one, or the label where it is targeted. Of each image the iterate of
    the least loss is returned: what is found wrong may be rejected, and `stops` is ignored.

    Mends nothing: torchattacks has no such attack.

    Args:
        model: a View of a classifier behind a defense that has `ratios`.
        lr: of Adam, in pixel units of [0, 1].

    Source: Ghosh et al., Resisting Adversarial Attacks Using Gaussian Mixture Variational Autoencoders, 2019, Eq. 10,
    where Sigma_t is read as its inverse; Adam, its rate and the steps are inferred.
    """

    def __init__(self, model: nn.Module, steps: int = 1000, lr: float = 1e-2) -> None:
        super().__init__("MixtureAttack", model)
        self.steps = steps
        self.lr = lr
        self.supported_mode = ["default", "targeted"]

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, target_N = self._given(x_NCHW, y_N)
        defense = cast(Mixture, self.model.target.defense)
        if not self.targeted:
            classes = len(defense.means_KL)
            target_N = (target_N + 1 + self._random(x_NCHW).below(classes - 1)) % classes
        return _descend(defense, x_NCHW, target_N, self.steps, self.lr, x_NCHW)


def fool(
    model: nn.Module, target_N: Tensor, shape: tuple[int, int, int], draws: Draws, steps: int = 1000, lr: float = 1e-2
) -> Tensor:
    """Return fooling images, x_NCHW: uniform noise, changed until it is taken for the given classes and accepted.

    Args:
        model: as that of `MixtureAttack`.
        shape: channels, height and width.
        draws: of the uniform images.
        lr: of Adam, in pixel units of [0, 1].

    Source: Ghosh et al. 2019, Eq. 11, read as Eq. 10 is.
    """
    with evaluating(model), torch.enable_grad():
        defense = cast(Mixture, cast(Guarded, model.target).defense)
        return _descend(defense, draws.uniform(*shape), target_N, steps, lr)


def objective(defense: Mixture, x_NCHW: Tensor, target_N: Tensor, origin_NCHW: Tensor | None = None) -> Tensor:
    """Return the loss of each image, N. Source: Eq. 10; Eq. 11 where there is no original."""
    error_N, distance_N = defense.ratios(x_NCHW, target_N).T
    loss_N = error_N**A + distance_N**B
    return loss_N if origin_NCHW is None else loss_N + (x_NCHW - origin_NCHW).square().flatten(1).sum(1)


def _descend(
    defense: Mixture, x_NCHW: Tensor, target_N: Tensor, steps: int, lr: float, origin_NCHW: Tensor | None = None
) -> Tensor:
    """Return of each image the iterate of the least loss."""
    x_NCHW = x_NCHW.clone().requires_grad_()
    best_NCHW, least_N = x_NCHW.detach().clone(), x_NCHW.new_full((len(x_NCHW),), torch.inf)
    adam = torch.optim.Adam([x_NCHW], lr=lr)
    for step in range(steps + 1):
        loss_N = objective(defense, x_NCHW, target_N, origin_NCHW)
        better_N = loss_N < least_N
        least_N = torch.where(better_N, loss_N.detach(), least_N)
        best_NCHW = torch.where(better_N[:, None, None, None], x_NCHW.detach(), best_NCHW)
        if step < steps:
            x_NCHW.grad = slope(loss_N, x_NCHW)
            adam.step()
            with torch.no_grad():
                x_NCHW.clamp_(0, 1)
    return best_NCHW
