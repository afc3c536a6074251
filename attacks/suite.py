"""Attacks and the named suites of them. Every attack runs through torchattacks; what it returns is verified.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torchattacks
from torch import Tensor, nn

from attacks.autoattack import APGD, FAB
from attacks.corrected import CW, MIM, PGD, DeepFool, RandFGSM
from attacks.nes import NES
from attacks.selective import MixtureAttack, SelectivePGD
from attacks.square import Square
from attacks.tailored import ChoicePGD, LatentPGD
from attacks.threat import Norm, ThreatModel
from attacks.tidy import Draws, evaluating, lengths, seeded
from attacks.view import Opening, rows
from spaces.exceptions import InputError

BATCH = 256
ROWS = 2560
"""How many images pass through a network at once with their gradients: an image's draws and candidates each count."""
ROUNDING = 1e-6
"""How far a pixel may lie outside its bounds before it is a fault: float32 rounds x + eps."""
BOTH: tuple[Norm, ...] = get_args(Norm)


class AttackError(RuntimeError):
    """An attack returned images outside its threat model."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack of a suite.

    Args:
        name: what tables call it.
        family: the torchattacks class, or ours of it.
        source: the paper.
        steps: gradient steps, where the class takes them.
        pace: the step size as a fraction of eps, where the class takes it.
        targeted: towards a random wrong label, drawn from the seed.
        settings: further arguments of the class, by name.
        portions: further arguments of the class that are fractions of eps, by name.
        norms: in which it can be bounded.
        unbounded: it keeps to no eps, but seeks the least perturbation in the L2 norm. Under an L2 threat model what
            lies beyond eps is given up; under an L-inf one it stands beside the worst case and is no part of it.
        through: the gradient sources that it is run through: `each`, the defense's `first`, or the `exact` model alone.
        aims: it is made for defenses with this opening, and is run on no other.
    """

    name: str
    family: type[torchattacks.attack.Attack]
    source: str
    steps: int | None = None
    pace: float | None = None
    targeted: bool = False
    settings: tuple[tuple[str, float | str], ...] = ()
    portions: tuple[tuple[str, float], ...] = ()
    norms: tuple[Norm, ...] = ("Linf",)
    unbounded: bool = False
    through: Literal["each", "first", "exact"] = "each"
    aims: Opening | None = None

    def options(self, threat: ThreatModel) -> dict[str, Any]:
        """Return what the class is made with."""
        bound = {} if self.unbounded else {"eps": threat.eps}
        norm = {"norm": threat.norm} if self.norms == BOTH and not self.unbounded else {}
        steps = {} if self.steps is None else {"steps": self.steps}
        pace = {} if self.pace is None else {"alpha": self.pace * threat.eps}
        portions = {name: share * threat.eps for name, share in self.portions}
        return {**bound, **norm, **pace, **steps, **portions, **dict(self.settings)}

    def budget(self, threat: ThreatModel) -> dict[str, Any]:
        """Return all that a number under this attack needs beside it, as JSON."""
        family = f"{self.family.__module__.partition('.')[0]}.{self.family.__name__}"
        norm = "L2, least, not bounded by eps" if self.exceeds(threat) else threat.norm
        return {"attack": self.name, "class": family, "norm": norm, **self.options(threat), "targeted": self.targeted}

    def spoken(self) -> str:
        """Return the parameters in words, those that scale with eps as multiples of it."""
        pace = {} if self.pace is None else {"alpha": f"{self.pace:g} eps"}
        steps = {} if self.steps is None else {"steps": self.steps}
        portions = {name: f"{share:g} eps" for name, share in self.portions}
        words = {**steps, **pace, **portions, **dict(self.settings), **({"targeted": "yes"} if self.targeted else {})}
        return ", ".join(f"{name} {value}" for name, value in words.items())

    def exceeds(self, threat: ThreatModel) -> bool:
        """Say whether its images may lie outside the threat model."""
        return self.unbounded and threat.norm == "Linf"

    def craft(
        self,
        model: nn.Module,
        x_NCHW: Tensor,
        y_N: Tensor,
        threat: ThreatModel,
        seed: int,
        *,
        ids_N: Tensor | None = None,
        stops: bool = False,
    ) -> Tensor:
        """Return adversarial images of `x_NCHW`, each within the threat model.

        Args:
            model: what the attacker sees, logits out.
            seed: of random starts, targets and the defense's noise.
            ids_N: the images' numbers, on which alone their random starts and targets depend; else their places.
            stops: see `attacks.tidy.Tidy`.

        Raises:
            AttackError: the attack left the ball or [0, 1].
            InputError: the attack cannot be bounded in the threat model's norm.
        """
        if threat.norm not in self.norms:
            raise InputError(f"{self.name} must be run in {' or '.join(self.norms)}, but the norm is {threat.norm}")
        if len(x_NCHW) == 0:
            return x_NCHW
        attack = self.family(model, **self.options(threat))
        attack.stops = stops
        if self.targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        seed = seed + zlib.crc32(self.name.encode())
        ids_N = torch.arange(len(y_N), device=x_NCHW.device) if ids_N is None else ids_N
        with reproducible(model, seed), torch.enable_grad():
            labels_N = wrong_labels(y_N, _classes(model, x_NCHW), Draws(seed + 1, ids_N)) if self.targeted else y_N
            adversarial = []
            size = max(1, min(BATCH, ROWS // rows(model)))
            for x, labels, ids in zip(x_NCHW.split(size), labels_N.split(size), ids_N.split(size), strict=True):
                attack.draws = Draws(seed, ids)
                adversarial.append(attack(x, labels).detach())
        return self._verified(torch.cat(adversarial), x_NCHW, threat)

    def _verified(self, adversarial_NCHW: Tensor, x_NCHW: Tensor, threat: ThreatModel) -> Tensor:
        step_NCHW = adversarial_NCHW - x_NCHW
        if self.unbounded and threat.norm == "L2":
            beyond_N111 = lengths(step_NCHW) > threat.eps
            adversarial_NCHW = torch.where(beyond_N111, x_NCHW, adversarial_NCHW)
            step_NCHW = torch.where(beyond_N111, 0, step_NCHW)
        moved = float(step_NCHW.abs().max() if threat.norm == "Linf" else lengths(step_NCHW).max())
        low, high = (float(edge) for edge in adversarial_NCHW.aminmax())
        # Written so that a NaN is a fault too.
        reach = 1.0 if self.exceeds(threat) else threat.eps * (1 + ROUNDING)
        if not (moved <= reach + ROUNDING and low >= -ROUNDING and high <= 1 + ROUNDING):
            raise AttackError(
                f"{self.name} must stay within {threat} and [0, 1], but moved by {moved:g} into [{low:g}, {high:g}]"
            )
        return adversarial_NCHW


STILL = (("random_start", False),)
MADRY, KURAKIN, CROCE = "Madry et al. 2017", "Kurakin et al. 2016", "Croce and Hein 2020, AutoAttack"
FGSM = Attack(name="fgsm", family=PGD, source="Goodfellow et al. 2014", steps=1, pace=1.0, settings=STILL, norms=BOTH)
FGSM_TARGETED = replace(FGSM, name="fgsm-targeted", source="Kurakin et al. 2016; PuVAE Eq. 1", targeted=True)
IFGSM = Attack(name="ifgsm", family=PGD, source=KURAKIN, steps=10, pace=0.1, settings=STILL, norms=BOTH)
IFGSM_TARGETED = replace(IFGSM, name="ifgsm-targeted", source="PuVAE Eq. 2", targeted=True)
IFGSM_CIFAR = replace(IFGSM_TARGETED, name="ifgsm-targeted-cifar", pace=0.5)
RAND_FGSM = Attack(
    name="rand-fgsm", family=RandFGSM, source="Tramer et al. 2018; alpha 0.05 at eps 0.3", portions=(("alpha", 1 / 6),)
)
RAND_FGSM_TARGETED = replace(RAND_FGSM, name="rand-fgsm-targeted", targeted=True)
RAND_FGSM_CIFAR = replace(
    RAND_FGSM_TARGETED,
    name="rand-fgsm-cifar",
    source="Tramer et al. 2018; alpha 0.005 at eps 0.06, as PuVAE",
    portions=(("alpha", 1 / 12),),
)
PGD_5 = Attack(name="pgd-5", family=PGD, source=MADRY, steps=5, pace=0.5, norms=BOTH)
PGD_10 = Attack(name="pgd-10", family=PGD, source=MADRY, steps=10, pace=0.25, norms=BOTH)
PGD_40 = Attack(name="pgd-40", family=PGD, source=MADRY, steps=40, pace=0.1, norms=BOTH)
PGD_40_ADVAE = replace(PGD_40, name="pgd-40-advae", source="AdvAE, section 4.1: 0.01 at eps 0.3", pace=1 / 30)
PGD_10_ADVAE = replace(PGD_10, name="pgd-10-advae", source="AdvAE, section 4.1: 1/255 at eps 8/255", pace=1 / 8)
MIM_10 = Attack(name="mim-10", family=MIM, source="Dong et al. 2018; CleverHans' budget, as GMVAE", steps=10, pace=0.2)
CW_L2 = Attack(
    name="cw-l2",
    family=CW,
    source="Carlini and Wagner 2017; AdvAE's budget, section 4.1",
    steps=1000,
    settings=(("c", 10.0), ("lr", 0.2)),
    norms=BOTH,
    unbounded=True,
)
CW_100 = replace(
    CW_L2,
    name="cw-100",
    source="Carlini and Wagner 2017; 100 iterations, c and rate of CleverHans' tutorial, as PuVAE (docs/decisions.md)",
    steps=100,
    targeted=True,
)
CW_100_FAST = replace(
    CW_100,
    name="cw-100-fast",
    source="Carlini and Wagner 2017; Defense-VAE's code: 100 steps, c 100, lr 10",
    settings=(("c", 100.0), ("lr", 10.0)),
    targeted=False,
)
DEEPFOOL = Attack(
    name="deepfool", family=DeepFool, source="Moosavi-Dezfooli et al. 2016", steps=50, norms=BOTH, unbounded=True
)
APGD_CE = Attack(name="apgd-ce", family=APGD, source=CROCE, steps=100, settings=(("loss", "ce"),), norms=BOTH)
APGD_DLR = replace(APGD_CE, name="apgd-dlr", settings=(("loss", "dlr"),))
APGD_DLR_50 = replace(APGD_DLR, name="apgd-dlr-50", steps=50)
APGD_T = replace(APGD_CE, name="apgd-t", settings=(("loss", "targeted"),))
FAB_T = Attack(name="fab-t", family=FAB, source="Croce and Hein 2020, FAB", steps=100, norms=BOTH)
SQUARE = Attack(
    name="square",
    family=Square,
    source="Andriushchenko et al. 2020",
    settings=(("queries", 5000),),
    norms=BOTH,
    through="exact",
)
NES_30 = Attack(name="nes-30", family=NES, source="Ilyas et al. 2018", steps=30, norms=BOTH, through="exact")
SELECTIVE_10 = Attack(
    name="selective-10",
    family=SelectivePGD,
    source="Bryniarski et al. 2021",
    steps=10,
    pace=0.25,
    norms=BOTH,
    aims="rejection",
)
SELECTIVE_40 = replace(SELECTIVE_10, name="selective-40", steps=40, pace=0.1)
CHOICE_10 = Attack(
    name="choice-10",
    family=ChoicePGD,
    source="Tramer et al. 2020: cross-entropy and the class choice's distance",
    steps=10,
    pace=0.25,
    norms=BOTH,
    through="first",
    aims="choice",
)
CHOICE_40 = replace(CHOICE_10, name="choice-40", steps=40, pace=0.1)
LATENT = Attack(
    name="latent", family=LatentPGD, source="Tramer et al. 2020", steps=40, norms=BOTH, through="exact", aims="latent"
)
MIXTURE = Attack(
    name="gmvae-eq10",
    family=MixtureAttack,
    source="GMVAE Eq. 10",
    steps=1000,
    norms=BOTH,
    unbounded=True,
    through="exact",
    aims="mixture",
)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Attacks that are run together; a sample is robust when it withstands all.

    Args:
        oblivious: crafted on the bare classifier, or in the black-box threat model on the attacker's substitute, and
            fed to whatever defends it.
        white_box: crafted on the whole, through each gradient source; they follow on the oblivious ones.
        transfer: the oblivious attacks of the white-box threat model, where those that look for the nearest image,
            which fools no other model, would cost most; empty: `oblivious`.
        draws: draws of a stochastic defense's noise in each gradient.
        looks: draws of a stochastic defense's noise over which each verdict is taken.
        eps: of the paper whose suite it is; None: the task's.
    """

    name: str
    oblivious: tuple[Attack, ...]
    white_box: tuple[Attack, ...]
    draws: int
    looks: int = 1
    eps: float | None = None
    transfer: tuple[Attack, ...] = ()

    def with_rungs(self) -> Suite:
        """Return the suite with the oblivious attacks that score a training's rungs."""
        return replace(self, oblivious=tuple(dict.fromkeys((*self.oblivious, *SUITES["quick"].oblivious))))

    def within(self, threat: ThreatModel) -> Suite:
        """Return the suite as it is run under a threat model: with the attacks that can be bounded in its norm."""
        blind = self.transfer if self.transfer and threat.knowledge == "white-box" else self.oblivious
        oblivious, white_box = (
            tuple(attack for attack in group if threat.norm in attack.norms) for group in (blind, self.white_box)
        )
        return replace(self, oblivious=oblivious, white_box=white_box, transfer=())


FIRST = (FGSM_TARGETED, IFGSM_TARGETED, FGSM, IFGSM)
AUTO = (APGD_CE, APGD_T, FAB_T, SQUARE)
TAILORED_10, TAILORED_40 = (SELECTIVE_10, CHOICE_10), (SELECTIVE_40, CHOICE_40, LATENT)
SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(name="quick", oblivious=(IFGSM_TARGETED,), white_box=(PGD_5,), draws=1),
        Suite(name="search", oblivious=(*FIRST, PGD_10), white_box=(PGD_10, *TAILORED_10), draws=2),
        Suite(
            name="audit",
            oblivious=(*FIRST, PGD_40),
            white_box=(PGD_40, APGD_DLR_50, *TAILORED_40, replace(MIXTURE, name="gmvae-eq10-200", steps=200)),
            draws=4,
            looks=20,
        ),
        Suite(name="standard", oblivious=AUTO, white_box=AUTO, draws=20, looks=20, transfer=(APGD_CE,)),
        Suite(
            name="full",
            oblivious=(*FIRST, RAND_FGSM, MIM_10, PGD_40, *AUTO, CW_L2, DEEPFOOL),
            white_box=(FGSM, PGD_40, MIM_10, *TAILORED_40, APGD_DLR, *AUTO, NES_30, MIXTURE),
            draws=20,
            looks=20,
            transfer=(*FIRST, RAND_FGSM, MIM_10, PGD_40, APGD_CE),
        ),
        Suite(
            name="puvae",
            oblivious=(FGSM_TARGETED, IFGSM_TARGETED, RAND_FGSM_TARGETED, CW_100),
            white_box=(PGD_10, CHOICE_10),
            draws=2,
            eps=0.3,
        ),
        Suite(
            name="puvae-cifar",
            oblivious=(
                FGSM_TARGETED,
                IFGSM_CIFAR,
                RAND_FGSM_CIFAR,
                CW_100,
            ),
            white_box=(PGD_10, CHOICE_10),
            draws=2,
            eps=0.06,
        ),
        Suite(
            name="defense-vae",
            oblivious=(FGSM, RAND_FGSM, CW_100_FAST),
            white_box=(PGD_10, SELECTIVE_10),
            draws=2,
            eps=0.3,
        ),
        Suite(
            name="advae",
            oblivious=(FGSM, PGD_40_ADVAE, CW_L2),
            white_box=(FGSM, PGD_40_ADVAE, CW_L2),
            draws=2,
            eps=0.3,
        ),
        Suite(
            name="advae-cifar",
            oblivious=(FGSM, PGD_10_ADVAE, CW_L2),
            white_box=(FGSM, PGD_10_ADVAE, CW_L2),
            draws=2,
            eps=8 / 255,
        ),
        Suite(
            name="gmvae",
            oblivious=(FGSM,),
            white_box=(FGSM, MIM_10, PGD_40_ADVAE, SELECTIVE_40, MIXTURE),
            draws=2,
            eps=0.3,
        ),
    )
}


def wrong_labels(y_N: Tensor, classes: int, draws: Draws) -> Tensor:
    """Return for each label another one, uniformly."""
    return (y_N + 1 + draws.below(classes - 1)) % classes


@contextmanager
def reproducible(model: nn.Module, seed: int) -> Iterator[None]:
    """Run with every submodule in eval mode and the generators seeded; leave modes and generators as they were."""
    with seeded(seed), evaluating(model):
        yield


@torch.no_grad()
def _classes(model: nn.Module, x_NCHW: Tensor) -> int:
    return int(model(x_NCHW[:1]).shape[1])
