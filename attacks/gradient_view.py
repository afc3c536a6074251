"""What an attacker sees of a defended classifier: behaviour by wrapping a model, not by a flag in every attack.

Shapes: N images, C channels, H x W pixels, K classes, R draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

Gradient = Literal["exact", "bpda", "surrogate"]
Opening = Literal["rejection", "choice", "latent", "mixture"]
"""What an attack made for a defense aims at: its detectors; the choice between its candidates; the latent space that it
decodes images from; a mixture of Gaussians in which it classifies."""


class Purifier(Protocol):
    """What a view needs of a defense."""

    @property
    def gradients(self) -> tuple[Gradient, ...]: ...
    @property
    def openings(self) -> tuple[Opening, ...]: ...
    @property
    def stochastic(self) -> bool: ...
    @property
    def candidates_each(self) -> int: ...
    def purify(self, x_NCHW: Tensor) -> Tensor: ...
    def surrogate(self, x_NCHW: Tensor) -> Tensor: ...
    def suspicion(self, x_NCHW: Tensor) -> Tensor: ...
    def limits(self) -> Tensor: ...
    def strain(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor: ...
    def latent(self, x_NCHW: Tensor) -> Tensor: ...
    def generate(self, z_NZ: Tensor) -> Tensor: ...
    def deepened(self, factor: int) -> AbstractContextManager[bool]: ...


class Guarded(Protocol):
    """What a view needs of a defended classifier."""

    defense: Purifier
    classifier: nn.Module


class View(nn.Module):
    """A model whose forward is the defended one and whose gradient is the chosen one.

    Args:
        target: a bare classifier, or a defended one.
        gradient: `exact` differentiates through everything; `bpda` takes the identity for the purifier's gradient
            (Athalye et al., Obfuscated Gradients, 2018, section 4.1); `surrogate` uses the defense's stand-in
            forward and backward.
        draws: how many draws of the noise are averaged, as one batch (expectation over transformation, ibid., 4.2).
            Logits are averaged, so the loss is that of the mean prediction.
    """

    def __init__(self, target: nn.Module, gradient: Gradient = "exact", draws: int = 1) -> None:
        super().__init__()
        self.target = target
        self.gradient = gradient
        self.draws = draws

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits_NK."""
        return self._drawn(self._once, x_NCHW)

    def suspicion(self, x_NCHW: Tensor) -> Tensor:
        """Return the mean over the draws of what the defense holds against each image, NS."""
        return self._drawn(cast(Guarded, self.target).defense.suspicion, x_NCHW)

    def strain(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        """Return the mean over the draws of the defense's `strain`, N."""
        defense = cast(Guarded, self.target).defense
        return self._drawn(lambda x: defense.strain(x, y_N.repeat(len(x) // len(y_N))), x_NCHW)

    def _once(self, x_NCHW: Tensor) -> Tensor:
        if self.gradient == "exact":
            return self.target(x_NCHW)
        guarded = cast(Guarded, self.target)
        if self.gradient == "surrogate":
            return guarded.classifier(guarded.defense.surrogate(x_NCHW))
        moved_NCHW = guarded.defense.purify(x_NCHW.detach()) - x_NCHW.detach()
        return guarded.classifier(x_NCHW + moved_NCHW.detach())

    def _drawn(self, ask: Callable[[Tensor], Tensor], x_NCHW: Tensor) -> Tensor:
        """Return the mean answer over the draws, asked for as one batch."""
        if self.draws == 1:
            return ask(x_NCHW)
        return ask(x_NCHW.repeat(self.draws, 1, 1, 1)).unflatten(0, (self.draws, -1)).mean(dim=0)


def bare(target: nn.Module) -> nn.Module:
    """Return the classifier that a target defends, or the target where nothing defends it."""
    return cast(Guarded, target).classifier if hasattr(target, "defense") else target


def gradients(target: nn.Module) -> tuple[Gradient, ...]:
    """Return the gradient sources that an attacker of `target` has."""
    return cast(Guarded, target).defense.gradients if hasattr(target, "defense") else ("exact",)


def rows(model: nn.Module) -> int:
    """Return how many images one image becomes on its way through a model."""
    target = getattr(model, "target", model)
    each = cast(Guarded, target).defense.candidates_each if hasattr(target, "defense") else 1
    return int(getattr(model, "draws", 1)) * each


def openings(target: nn.Module) -> tuple[Opening, ...]:
    """Return what attacks made for the target's defense aim at."""
    return cast(Guarded, target).defense.openings if hasattr(target, "defense") else ()


@contextmanager
def deepened(target: nn.Module, factor: int) -> Iterator[Purifier | None]:
    """Run with so many times the steps of the optimisation that purifies; yield the defense, None where it has none."""
    if not hasattr(target, "defense"):
        yield None
        return
    defense = cast(Guarded, target).defense
    with defense.deepened(factor) as there:
        yield defense if there else None


def stochastic(target: nn.Module) -> bool:
    """Say whether the target draws noise at inference."""
    return hasattr(target, "defense") and cast(Guarded, target).defense.stochastic


def limits(target: nn.Module) -> Tensor:
    """Return the thresholds of the target's suspicion, S: none where it rejects nothing."""
    return cast(Guarded, target).defense.limits() if hasattr(target, "defense") else torch.zeros(0)
