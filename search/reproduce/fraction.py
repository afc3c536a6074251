"""How `--fraction` reduces the work for a paper's table; a reduced run shows trends and proves nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields

from optuna.distributions import IntDistribution

from defenses.base import Defense
from spaces.exceptions import InputError
from spaces.space import Params

LONGEST, SHORTEST = 40, 4
"""Bounds on epochs: at most LONGEST are counted before reducing, because Defense-GAN's 926 would dominate the run; at
least SHORTEST remain, if the training has so many."""
LEAST_BATCH, LEAST_IMAGES = 16, 50


@dataclass(frozen=True)
class Fraction:
    """A fraction F of the work for a table.

    Training images are reduced by the factor F^(3/4), epochs and batch size by F^(1/2) each: a training then does at
    most F of the arithmetic, but more than F of the steps. Each number of repetitions in purifying is reduced by
    F^(1/2), and the number of attacked images by F.

    Args:
        fraction: F, in (0, 1]; 1 reduces nothing.

    Raises:
        InputError: F is out of range.
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
        """Return the number of validation images to attack."""
        return max(min(images, LEAST_IMAGES), round(self.fraction * images))

    def root(self, number: int) -> int:
        """Return a number of repetitions, reduced by F^(1/2)."""
        return max(1, round(self.fraction**0.5 * number))

    def params(self, defense: type[Defense], whole: Params) -> Params:
        """Return the params with reduced epochs, batch size and repetitions."""
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
    """Return the inference-time knobs that are numbers of repetitions in purifying; they affect only time."""
    knobs = fields(defense.Inference)
    return [f.name for f in knobs if f.metadata["latency"] and isinstance(f.metadata["domain"], IntDistribution)]
