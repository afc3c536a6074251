"""Threat models: no robustness number stands without one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from spaces.space import InputError, choose

Norm = Literal["Linf"]
Knowledge = Literal["oblivious", "white-box"]


@dataclass(frozen=True)
class ThreatModel:
    """What an attacker may do and knows.

    Args:
        norm: the norm of the perturbation.
        eps: its bound, in pixel units of [0, 1].
        knowledge: `oblivious` sees the bare classifier; `white-box` sees classifier and defense. What PuVAE,
            Defense-VAE and Defense-GAN call white-box is oblivious.

    Raises:
        InputError: a value is outside its law.
    """

    norm: Norm
    eps: float
    knowledge: Knowledge

    def __post_init__(self) -> None:
        choose("the norm", self.norm, get_args(Norm))
        choose("the threat model", self.knowledge, get_args(Knowledge))
        if not (math.isfinite(self.eps) and 0 <= self.eps <= 1):
            raise InputError(f"eps must be from 0 to 1, in pixel units of [0, 1], but is {self.eps}")

    def __str__(self) -> str:
        return f"{self.knowledge}, {self.norm} eps {self.eps:g}"
