"""What `--fraction` cuts: a smaller run shows the way of a paper's table and proves nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields

from optuna.distributions import IntDistribution

from defenses.base import Defense
from spaces.exceptions import InputError
from spaces.space import Params

LONGEST, SHORTEST = 40, 4
"""Epochs of a training that a fraction is taken of, at most: Defense-GAN's 926 would outlast all others; and that it
leaves, where there are so many."""
LEAST_BATCH, LEAST_IMAGES = 16, 50


@dataclass(frozen=True)
class Fraction:
    """A fraction F of a table's work.

    Of the training images F^(3/4) are taken, of the epochs F^(1/2) in batches of F^(1/2) of their size: so at most F of
    a training's arithmetic, in not so few steps. Of whatever is repeated in purifying it is F^(1/2) each, and F of the
    images that are attacked.

    Args:
        fraction: F, in (0, 1]; 1 cuts nothing.

    Raises:
        InputError: F is outside its law.
    """

    fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction must be above 0 and at most 1, but is {self.fraction:g}")

    @property
    def whole(self) -> bool:
        return self.fraction == 1

    def training_images(self, images: int) -> int:
        return max(1, round(self.fraction**0.75 * images))

    def epochs(self, epochs: int) -> int:
        return epochs if self.whole else max(min(epochs, SHORTEST), self.root(min(epochs, LONGEST)))

    def batch(self, size: int) -> int:
        return max(min(size, LEAST_BATCH), self.root(size))

    def attacked(self, images: int) -> int:
        """Return how many validation images are attacked."""
        return max(min(images, LEAST_IMAGES), round(self.fraction * images))

    def root(self, number: int) -> int:
        """Return F^(1/2) of a number of repetitions."""
        return max(1, round(self.fraction**0.5 * number))

    def params(self, defense: type[Defense], whole: Params) -> Params:
        """Return a setting with less of whatever costs time alone."""
        cuts = {"epochs": self.epochs, "batch_size": self.batch}
        train = {n: cuts[n](int(v)) if n in cuts else v for n, v in whole.train.items()}
        return Params(train, {**whole.inference, **{n: self.root(int(whole.inference[n])) for n in counted(defense)}})

    def __str__(self) -> str:
        if self.whole:
            return "all training images, all epochs, all validation images that the table asks for"
        images, root = (f"{100 * self.fraction**power:.0f} %" for power in (0.75, 0.5))
        return (
            f"a fraction of {self.fraction:g}: {images} of the training images, {root} of the epochs (at least "
            f"{SHORTEST}; of a long training {LONGEST} count) in batches of {root} of their size, {root} of "
            f"Defense-GAN's steps, of its restarts, of those of GMVAE's reclassification and of a black-box attacker's "
            f"rounds, {100 * self.fraction:g} % of the images that are attacked (at least {LEAST_IMAGES}). It shows "
            "the way and proves nothing"
        )


def counted(defense: type[Defense]) -> list[str]:
    """Return the knobs that say how often something is repeated in purifying: their number costs time, no training."""
    knobs = fields(defense.Inference)
    return [f.name for f in knobs if f.metadata["latency"] and isinstance(f.metadata["domain"], IntDistribution)]
