"""Threat models; every robustness figure is stated under one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from spaces.exceptions import InputError, choose

Norm = Literal["Linf", "L2"]
Knowledge = Literal["oblivious", "black-box", "white-box"]


@dataclass(frozen=True)
class ThreatModel:
    """The attacker's perturbation budget and knowledge.

    Args:
        norm: norm of the perturbation.
        eps: bound of the perturbation, in pixel units of [0, 1].
        knowledge: `oblivious` sees the bare classifier; `black-box` sees neither model, but queries the classes of the
            defended classifier and trains a substitute (attacks/black_box.py); `white-box` sees classifier and defense.
            What PuVAE and Defense-VAE call white-box is oblivious; PuVAE's "strong white-box" is white-box.

    Raises:
        InputError: a value is not legal.
    """

    norm: Norm
    eps: float
    knowledge: Knowledge

    def __post_init__(self) -> None:
        choose("the norm", self.norm, get_args(Norm))
        choose("the threat model", self.knowledge, get_args(Knowledge))
        most = 1.0 if self.norm == "Linf" else math.inf
        if not (math.isfinite(self.eps) and 0 <= self.eps <= most):
            bound = "from 0 to 1" if self.norm == "Linf" else "at least 0 and finite"
            raise InputError(f"eps must be {bound} in {self.norm}, in pixel units of [0, 1], but is {self.eps}")

    def __str__(self) -> str:
        return f"{self.knowledge}, {self.norm} eps {self.eps:g}"
