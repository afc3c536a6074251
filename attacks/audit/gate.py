"""A gate: one check of the audit, with its measured figure and its limit. Shapes: D draws, N images, K classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SLACK = 0.05
"""Tolerance for chance in a share of a few dozen images."""

SQUARE_GAIN = 0.002
"""Largest share of images that a weaker attack may break. Source: AutoAttack's flag for Square, 0.2 %."""


LEADS = 4
"""Largest deviation of logits over the classes, in leads of the first over the second. It is 2.3 for ten random logits,
and 1 for classifiers of digits."""


@dataclass(frozen=True)
class Gate:
    """One check.

    Args:
        check: its number in docs/honest-numbers.md.
        law: the requirement, in words.
        figure: the measured value.
        limit: the largest value that passes.
        images: number of images that the figure was measured on; 0 for a gate that asks about no image.
    """

    check: int
    name: str
    law: str
    figure: float
    limit: float
    passed: bool
    images: int = 0

    @property
    def alarm(self) -> str:
        return f"{self.name}: it does not hold that {self.law}"


def unit(logits_NK: Tensor) -> float:
    """Return the logits' own spread, in which changes of logits are measured: the median deviation over the classes.

    It is at most `LEADS` medians of the lead of the first class over the second: a class far from all others, which is
    never answered, must not hide what changes the answer.
    """
    z_NK = logits_NK.detach().double()
    top_N2 = z_NK.topk(min(2, z_NK.shape[1]), dim=1).values
    lead = LEADS * float((top_N2[:, 0] - top_N2[:, -1]).median())
    return max(min(float(z_NK.std(dim=1, correction=0).median()), lead or torch.inf), 1e-300)


def broken(standing_DN: Tensor, left_DN: Tensor) -> tuple[float, float]:
    """Return the share of images that stood and that another attack breaks, and the share that it may break by chance.

    That is one image, or 0.2 %. With noise every further attack is another try; so the images that it breaks more often
    in the first half of the draws are judged in the second half, and three standard errors are added. What a defense
    says about its noise does not count.
    """
    draws, images = min(len(standing_DN), len(left_DN)), standing_DN.shape[1]
    least = max(SQUARE_GAIN, 1 / images)
    lost_DN = standing_DN[:draws].double() - left_DN[:draws].double()
    if draws == 1:
        return float(lost_DN.clamp(min=0).mean()), least
    chosen_N, judged_DN = lost_DN[: draws // 2].mean(dim=0) > 0, lost_DN[draws // 2 :]
    error = math.sqrt(float((judged_DN.var(dim=0) * chosen_N).sum()) / len(judged_DN)) / images
    return float((judged_DN * chosen_N).mean()), least + 3 * error


def at_most(check: int, name: str, law: str, figure: float, limit: float, images: int = 0) -> Gate:
    """Return the gate that passes if the figure is at most the limit; NaN fails."""
    return Gate(check, name, law, figure, limit, figure <= limit, images)
