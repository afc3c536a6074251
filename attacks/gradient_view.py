"""The attacker's view of a defended classifier, as a wrapper around the model rather than a flag in every attack.

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
"""Attack surface that an adaptive attack targets: the defense's detectors; the choice between its candidates; the
latent space that it decodes images from; the Gaussian mixture in which it classifies."""


BATCH = 256
"""Images that pass through a model at once where no gradient is taken."""
SPREAD = 0.5, 20.0
"""Range of the standard deviation of the logits over the classes; beyond it the cross-entropy is nearly linear, or
has no gradient in float32. An ordinary classifier lies within it."""


class Purifier(Protocol):
    """Interface that a view needs of a defense."""

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
    """Interface that a view needs of a defended classifier."""

    defense: Purifier
    classifier: nn.Module


class View(nn.Module):
    """A model with the forward pass of the defended classifier and the chosen gradient.

    Args:
        target: a bare or defended classifier.
        gradient: `exact` differentiates through everything; `bpda` replaces the purifier's gradient by the identity
            (Athalye et al., Obfuscated Gradients, 2018, section 4.1); `surrogate` uses the defense's differentiable
            surrogate, forward and backward.
        draws: noise draws to average, as one batch (expectation over transformation, ibid., 4.2). Logits are
            averaged, so the loss is that of the mean prediction.
    """

    def __init__(self, target: nn.Module, gradient: Gradient = "exact", draws: int = 1) -> None:
        super().__init__()
        self.target = target
        self.gradient = gradient
        self.draws = draws

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits_NK, scaled image by image into the range `SPREAD` where they lie beyond it."""
        return within_spread(self.unscaled(x_NCHW))

    def unscaled(self, x_NCHW: Tensor) -> Tensor:
        """Return logits_NK as the model gives them."""
        return self._drawn(self._once, x_NCHW)

    def suspicion(self, x_NCHW: Tensor) -> Tensor:
        """Return the detector scores of each image, averaged over the draws, NS."""
        return self._drawn(cast(Guarded, self.target).defense.suspicion, x_NCHW)

    def strain(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        """Return the defense's `strain`, averaged over the draws, N."""
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
        """Return the mean output over the draws, computed as one batch."""
        if self.draws == 1:
            return ask(x_NCHW)
        return ask(x_NCHW.repeat(self.draws, 1, 1, 1)).unflatten(0, (self.draws, -1)).mean(dim=0)


def within_spread(logits_NK: Tensor) -> Tensor:
    """Return each image's logits times a constant, without a gradient, that brings their spread into `SPREAD`.

    Classes and ranks stay, so that the scale of a model's logits neither hides it from an attack nor from a gate.
    """
    spread_N1 = logits_NK.detach().std(dim=1, correction=0, keepdim=True)
    scale_N1 = spread_N1.clamp(*SPREAD) / spread_N1
    return logits_NK * torch.where(scale_N1.isfinite(), scale_N1, 1.0)


def bare(target: nn.Module) -> nn.Module:
    """Return the classifier that a target defends, or the target itself if it has no defense."""
    return cast(Guarded, target).classifier if hasattr(target, "defense") else target


def gradients(target: nn.Module) -> tuple[Gradient, ...]:
    """Return the gradient sources available to an attacker of `target`."""
    return cast(Guarded, target).defense.gradients if hasattr(target, "defense") else ("exact",)


def rows(model: nn.Module) -> int:
    """Return the number of images that the model processes for each input image."""
    target = getattr(model, "target", model)
    each = cast(Guarded, target).defense.candidates_each if hasattr(target, "defense") else 1
    return int(getattr(model, "draws", 1)) * each


def openings(target: nn.Module) -> tuple[Opening, ...]:
    """Return the attack surfaces of the target's defense."""
    return cast(Guarded, target).defense.openings if hasattr(target, "defense") else ()


@contextmanager
def deepened(target: nn.Module, factor: int) -> Iterator[Purifier | None]:
    """Multiply the purifier's optimisation steps by `factor`; yield the defense, or None if it optimises nothing."""
    if not hasattr(target, "defense"):
        yield None
        return
    defense = cast(Guarded, target).defense
    with defense.deepened(factor) as there:
        yield defense if there else None


def stochastic(target: nn.Module) -> bool:
    """Return whether the target draws noise at inference."""
    return hasattr(target, "defense") and cast(Guarded, target).defense.stochastic


def limits(target: nn.Module) -> Tensor:
    """Return the thresholds of the target's detector scores, S; empty where it rejects nothing."""
    return cast(Guarded, target).defense.limits() if hasattr(target, "defense") else torch.zeros(0)
