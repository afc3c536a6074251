"""Attacks and the named suites of them. Every attack runs through torchattacks; what it returns is verified.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn

from attacks.corrected import CW, evaluating
from attacks.threat import ThreatModel

BATCH = 256
ROUNDING = 1e-6
"""How far a pixel may lie outside its bounds before it is a fault: float32 rounds x + eps."""


class AttackError(RuntimeError):
    """An attack returned images outside its threat model."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack of a suite.

    Args:
        name: what tables call it.
        family: the torchattacks class.
        source: the paper.
        steps: gradient steps; 1 for single-step attacks.
        pace: the step size as a fraction of eps.
        targeted: towards a random wrong label, drawn from the seed.
        settings: further arguments of the class, by name.
        unbounded: it keeps to no eps, but seeks the least perturbation in the L2 norm.
    """

    name: str
    family: type[torchattacks.attack.Attack]
    source: str
    steps: int = 1
    pace: float = 1.0
    targeted: bool = False
    settings: tuple[tuple[str, float], ...] = ()
    unbounded: bool = False

    def options(self, eps: float) -> dict[str, float]:
        """Return what the torchattacks class is made with."""
        bound = {} if self.unbounded else {"eps": eps}
        many = {"steps": self.steps} if self.steps > 1 else {}
        pace = {"alpha": self.pace * eps} if many and bound else {}
        return {**bound, **pace, **many, **dict(self.settings)}

    def budget(self, eps: float) -> dict[str, Any]:
        """Return all that a number under this attack needs beside it, as JSON."""
        family = f"{self.family.__module__.partition('.')[0]}.{self.family.__name__}"
        norm = "L2, least, not bounded by eps" if self.unbounded else "Linf"
        return {"attack": self.name, "class": family, "norm": norm, **self.options(eps), "targeted": self.targeted}

    def craft(self, model: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        """Return adversarial images of `x_NCHW`, each within the threat model.

        Args:
            model: what the attacker sees, logits out.
            seed: of random starts, targets and the defense's noise.

        Raises:
            AttackError: torchattacks left the eps-ball or [0, 1].
        """
        attack = self.family(model, **self.options(threat.eps))
        if self.targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        with reproducible(model, seed + zlib.crc32(self.name.encode())), torch.enable_grad():
            labels_N = wrong_labels(y_N, _classes(model, x_NCHW)) if self.targeted else y_N
            pairs = zip(x_NCHW.split(BATCH), labels_N.split(BATCH), strict=True)
            adversarial = [attack(x, labels).detach() for x, labels in pairs]
        return self._verified(torch.cat(adversarial) if adversarial else x_NCHW, x_NCHW, threat)

    def _verified(self, adversarial_NCHW: Tensor, x_NCHW: Tensor, threat: ThreatModel) -> Tensor:
        if len(x_NCHW) == 0:
            return adversarial_NCHW
        moved = float((adversarial_NCHW - x_NCHW).abs().max())
        low, high = (float(edge) for edge in adversarial_NCHW.aminmax())
        # Written so that a NaN is a fault too.
        reach = 1.0 if self.unbounded else threat.eps
        if not (moved <= reach + ROUNDING and low >= -ROUNDING and high <= 1 + ROUNDING):
            raise AttackError(
                f"{self.name} must stay within {threat} and [0, 1], but moved a pixel by {moved:g} into "
                f"[{low:g}, {high:g}]"
            )
        return adversarial_NCHW


FGSM = Attack(name="fgsm", family=torchattacks.FGSM, source="Goodfellow et al. 2014")
FGSM_TARGETED = Attack(
    name="fgsm-targeted", family=torchattacks.FGSM, source="Kurakin et al. 2016; PuVAE Eq. 1", targeted=True
)
IFGSM = Attack(name="ifgsm", family=torchattacks.BIM, source="Kurakin et al. 2016", steps=10, pace=0.1)
IFGSM_TARGETED = Attack(
    name="ifgsm-targeted", family=torchattacks.BIM, source="PuVAE Eq. 2", steps=10, pace=0.1, targeted=True
)
PGD_5 = Attack(name="pgd-5", family=torchattacks.PGD, source="Madry et al. 2017", steps=5, pace=0.5)
PGD_10 = Attack(name="pgd-10", family=torchattacks.PGD, source="Madry et al. 2017", steps=10, pace=0.25)
PGD_40 = Attack(name="pgd-40", family=torchattacks.PGD, source="Madry et al. 2017", steps=40, pace=0.1)
CW_L2 = Attack(
    name="cw-l2",
    family=CW,
    source="Carlini and Wagner 2017; AdvAE's budget, section 4.1",
    steps=1000,
    settings=(("c", 10.0), ("lr", 0.2)),
    unbounded=True,
)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Attacks that are run together; a sample is robust when it withstands all.

    Args:
        oblivious: crafted on the bare classifier, and fed to whatever defends it.
        white_box: crafted on the whole, through each gradient source; they follow on the oblivious ones.
        draws: draws of a stochastic defense's noise in each gradient.
    """

    name: str
    oblivious: tuple[Attack, ...]
    white_box: tuple[Attack, ...]
    draws: int

    def with_rungs(self) -> Suite:
        """Return the suite with the oblivious attacks that score a training's rungs."""
        return replace(self, oblivious=tuple(dict.fromkeys((*self.oblivious, *SUITES["quick"].oblivious))))


SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(name="quick", oblivious=(IFGSM_TARGETED,), white_box=(PGD_5,), draws=1),
        Suite(name="puvae", oblivious=(FGSM_TARGETED, IFGSM_TARGETED), white_box=(PGD_10,), draws=2),
        Suite(
            name="search",
            oblivious=(FGSM_TARGETED, IFGSM_TARGETED, FGSM, IFGSM, PGD_10),
            white_box=(PGD_10,),
            draws=2,
        ),
        Suite(
            name="audit",
            oblivious=(FGSM_TARGETED, IFGSM_TARGETED, FGSM, IFGSM, PGD_40),
            white_box=(PGD_40,),
            draws=4,
        ),
    )
}


def wrong_labels(y_N: Tensor, classes: int) -> Tensor:
    """Return for each label another one, uniformly, from the global generator."""
    return (y_N + torch.randint(1, classes, y_N.shape).to(y_N.device)) % classes


@contextmanager
def reproducible(model: nn.Module, seed: int) -> Iterator[None]:
    """Run with every submodule in eval mode and the generators seeded; leave modes and generators as they were."""
    with seeded(seed), evaluating(model):
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's generators seeded, and leave them as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _classes(model: nn.Module, x_NCHW: Tensor) -> int:
    return int(model(x_NCHW[:1]).shape[1])
