"""What an attacker sees of a defended classifier: behaviour by wrapping a model, not by a flag in every attack.

Shapes: N images, C channels, H x W pixels, K classes, R draws.
"""

from __future__ import annotations

from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

Gradient = Literal["exact", "bpda", "surrogate"]


class Purifier(Protocol):
    """What a view needs of a defense."""

    @property
    def gradients(self) -> tuple[Gradient, ...]: ...
    @property
    def stochastic(self) -> bool: ...
    def purify(self, x_NCHW: Tensor) -> Tensor: ...
    def surrogate(self, x_NCHW: Tensor) -> Tensor: ...
    def suspicion(self, x_NCHW: Tensor) -> Tensor: ...
    def limits(self) -> Tensor: ...


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
        if self.draws == 1:
            return self._once(x_NCHW)
        logits_RNK = self._once(x_NCHW.repeat(self.draws, 1, 1, 1)).unflatten(0, (self.draws, -1))
        return logits_RNK.mean(dim=0)

    def _once(self, x_NCHW: Tensor) -> Tensor:
        if self.gradient == "exact":
            return self.target(x_NCHW)
        guarded = cast(Guarded, self.target)
        if self.gradient == "surrogate":
            return guarded.classifier(guarded.defense.surrogate(x_NCHW))
        moved_NCHW = guarded.defense.purify(x_NCHW.detach()) - x_NCHW.detach()
        return guarded.classifier(x_NCHW + moved_NCHW.detach())


def gradients(target: nn.Module) -> tuple[Gradient, ...]:
    """Return the gradient sources that an attacker of `target` has."""
    return cast(Guarded, target).defense.gradients if hasattr(target, "defense") else ("exact",)


def stochastic(target: nn.Module) -> bool:
    """Say whether the target draws noise at inference."""
    return hasattr(target, "defense") and cast(Guarded, target).defense.stochastic


def limits(target: nn.Module) -> Tensor:
    """Return the thresholds of the target's suspicion, S: none where it rejects nothing."""
    return cast(Guarded, target).defense.limits() if hasattr(target, "defense") else torch.zeros(0)
