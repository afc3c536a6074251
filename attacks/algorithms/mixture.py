"""The attack of the GMVAE paper on a classifier in a mixture of Gaussians, and its fooling images."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from attacks.algorithms.base import CorrectedAttack, slope
from attacks.gradient_view import Guarded
from attacks.seeding import Draws, evaluating

A, B = 2, 2
"""The exponents of Eq. 10 and 11, a and b (inferred: section 4 has them above 1)."""


class Mixture(Protocol):
    """What an attack needs of a defense that classifies in a mixture of Gaussians."""

    means_KL: Tensor

    def ratios(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor: ...


class MixtureAttack(CorrectedAttack):
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
