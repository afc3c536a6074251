"""The GMVAE paper's attack on a classifier in a Gaussian mixture, and its fooling images."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from attacks.algorithms.base import CorrectedAttack, slope
from attacks.gradient_view import Guarded
from attacks.seeding import Draws, evaluating

A, B = 2, 2
"""Exponents a and b of Eq. 10 and 11 (inferred: section 4 only states that they exceed 1)."""


class Mixture(Protocol):
    """Interface that the attack needs of a defense that classifies in a Gaussian mixture."""

    means_KL: Tensor

    def ratios(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor: ...


class MixtureAttack(CorrectedAttack):
    """White-box attack of the GMVAE paper: finds a near image that is encoded and decoded as another class.

    No eps bounds it: the squared length of the perturbation is a term of the loss. Pixels are clipped to [0, 1] after
    each step. The target class is a random wrong one, or the label given if targeted. Returns each image's iterate of
    least loss; a misclassified one may still be rejected, so `stops` is ignored.

    torchattacks has no such attack.

    Args:
        model: a View of a classifier behind a defense with `ratios`.
        lr: Adam's learning rate, in pixel units of [0, 1].

    Source: Ghosh et al., Resisting Adversarial Attacks Using Gaussian Mixture Variational Autoencoders, 2019, Eq. 10,
    where Sigma_t is read as its inverse; Adam, its learning rate and the number of steps are inferred.
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
    """Return fooling images, x_NCHW: uniform noise optimised until it is accepted as the given classes.

    Args:
        model: as for `MixtureAttack`.
        shape: channels, height and width.
        draws: random numbers of the initial noise images.
        lr: Adam's learning rate, in pixel units of [0, 1].

    Source: Ghosh et al. 2019, Eq. 11, with Sigma_t read as in Eq. 10.
    """
    with evaluating(model), torch.enable_grad():
        defense = cast(Mixture, cast(Guarded, model.target).defense)
        return _descend(defense, draws.uniform(*shape), target_N, steps, lr)


def objective(defense: Mixture, x_NCHW: Tensor, target_N: Tensor, origin_NCHW: Tensor | None = None) -> Tensor:
    """Return the loss of each image, N. Source: Eq. 10, or Eq. 11 without an original image."""
    error_N, distance_N = defense.ratios(x_NCHW, target_N).T
    loss_N = error_N**A + distance_N**B
    return loss_N if origin_NCHW is None else loss_N + (x_NCHW - origin_NCHW).square().flatten(1).sum(1)


def _descend(
    defense: Mixture, x_NCHW: Tensor, target_N: Tensor, steps: int, lr: float, origin_NCHW: Tensor | None = None
) -> Tensor:
    """Return each image's iterate of least loss."""
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
