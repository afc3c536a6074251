"""No defense: the bare classifier, searched, attacked and exported like a defense, as the baseline of every winner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from optuna.distributions import IntDistribution
from torch import Tensor, nn

from attacks.gradient_view import Gradient
from defenses.base import Batches, Defense, Knobs, Metrics
from spaces.space import knob


@dataclass(frozen=True)
class Train(Knobs):
    batch_size: int = knob(128, IntDistribution(1, 4096), "images a step, of which there is none")
    epochs: int = knob(1, IntDistribution(1, 1000), "how often the untouched classifier is scored")


class Identity(Defense):
    """Return the input unchanged."""

    Train = Train

    @property
    def gradients(self) -> tuple[Gradient, ...]:
        return ("exact",)  # BPDA's identity gradient is the exact one here

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        for _ in batches:
            yield {"loss": 0.0}

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW
