"""All attacks, each with the budget of its paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attacks.algorithms.apgd import APGD
from attacks.algorithms.carlini_wagner import CW
from attacks.algorithms.choice_pgd import ChoicePGD
from attacks.algorithms.deepfool import DeepFool
from attacks.algorithms.fab import FAB
from attacks.algorithms.latent_pgd import LatentPGD
from attacks.algorithms.mim import MIM
from attacks.algorithms.mixture import MixtureAttack
from attacks.algorithms.nes import NES
from attacks.algorithms.pgd import PGD
from attacks.algorithms.rand_fgsm import RandFGSM
from attacks.algorithms.regular_pgd import RegularPGD
from attacks.algorithms.selective_pgd import PenalisedPGD, SelectivePGD
from attacks.algorithms.square import Square
from attacks.attack import BOTH, Attack

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
PGD_20 = replace(PGD_10, name="pgd-20", steps=20, pace=0.1)
PGD_40 = Attack(name="pgd-40", family=PGD, source=MADRY, steps=40, pace=0.1, norms=BOTH)
PGD_80 = replace(PGD_40, name="pgd-80", steps=80, pace=0.05)
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
REGULAR_10 = Attack(
    name="regular-10",
    family=RegularPGD,
    source="Tramer et al. 2020: no image of the attack may look like one; levels, zeros and ones are kept",
    steps=10,
    pace=0.25,
    settings=(("kept", "both"),),
    norms=BOTH,
)
LEVELS_10 = replace(REGULAR_10, name="levels-10", settings=(("kept", "levels"),))
EXTREMES_10 = replace(REGULAR_10, name="extremes-10", settings=(("kept", "extremes"),))
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
PENALISED_40 = replace(
    SELECTIVE_40,
    name="penalised-40",
    family=PenalisedPGD,
    source="Carlini and Wagner 2017, detectors",
    through="exact",
)
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

ATTACKS: Mapping[str, Attack] = {attack.name: attack for attack in list(vars().values()) if isinstance(attack, Attack)}
"""The attacks of this file, by name."""
