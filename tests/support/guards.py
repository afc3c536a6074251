"""A defended classifier without the product's own classes: what the attack layer needs of one, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attacks.gradient_view import Gradient, Opening


class Smooth(nn.Module):
    """A purifier for tests: a known map, with noise, a rounding and a rejection of dark images where asked for."""

    gradients: tuple[Gradient, ...] = ("surrogate", "bpda", "exact")

    def __init__(self, noise: float = 0.0, steps: int = 0, darkest: float | None = None) -> None:
        super().__init__()
        self.noise, self.steps, self.darkest = noise, steps, darkest

    @property
    def openings(self) -> tuple[Opening, ...]:
        return () if self.darkest is None else ("rejection",)

    candidates_each = 1

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    def purify(self, x: Tensor) -> Tensor:
        x = x + self.noise * torch.randn_like(x)
        return (x * self.steps).round() / self.steps if self.steps else x

    def surrogate(self, x: Tensor) -> Tensor:
        return x

    def suspicion(self, x: Tensor) -> Tensor:
        return -x.flatten(1).mean(1, keepdim=True) if self.darkest is not None else x.new_zeros((len(x), 0))

    def limits(self) -> Tensor:
        return torch.tensor([] if self.darkest is None else [-self.darkest])

    @contextmanager
    def deepened(self, factor: int) -> Iterator[bool]:
        yield False


class Guard(nn.Module):
    """A classifier behind a defense."""

    def __init__(self, defense: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.defense, self.classifier = defense, classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.defense.purify(x))  # type: ignore[operator]
