"""Named suites: attacks that are run together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from attacks.attack import Attack
from attacks.catalog import (
    APGD_CE,
    APGD_DLR,
    APGD_DLR_50,
    APGD_T,
    CHOICE_10,
    CHOICE_40,
    CW_100,
    CW_100_FAST,
    CW_L2,
    DEEPFOOL,
    FAB_T,
    FGSM,
    FGSM_TARGETED,
    IFGSM,
    IFGSM_CIFAR,
    IFGSM_TARGETED,
    LATENT,
    MIM_10,
    MIXTURE,
    NES_30,
    PENALISED_40,
    PGD_5,
    PGD_10,
    PGD_10_ADVAE,
    PGD_20,
    PGD_40,
    PGD_40_ADVAE,
    RAND_FGSM,
    RAND_FGSM_CIFAR,
    RAND_FGSM_TARGETED,
    SELECTIVE_10,
    SELECTIVE_40,
    SQUARE,
)
from attacks.gradient_view import View
from attacks.threat import ThreatModel

LOOKS = 5
"""Least draws of the noise over which verdicts are taken where its worst draw is reported."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Attacks that are run together; a sample is robust when it withstands all of them.

    Args:
        oblivious: attacks crafted on the bare classifier, or in the black-box threat model on the attacker's
            substitute, and evaluated on the defended classifier.
        white_box: attacks crafted on the defended classifier through its gradient sources, after the oblivious ones.
        transfer: replaces `oblivious` under the white-box threat model where minimum-norm attacks, whose images do not
            transfer, would dominate the cost; empty: `oblivious`.
        draws: noise draws averaged in each gradient, for a stochastic defense.
        looks: noise draws over which each verdict is taken, for a stochastic defense.
        known: white-box attack of a stochastic defense whose attacker also knows the noise that the first look draws;
            None: the noise stays unknown.
        eps: perturbation budget of the suite's paper; None: the task's.
    """

    name: str
    oblivious: tuple[Attack, ...]
    white_box: tuple[Attack, ...]
    draws: int
    looks: int = 1
    known: Attack | None = None
    eps: float | None = None
    transfer: tuple[Attack, ...] = ()

    def with_rungs(self) -> Suite:
        """Return the suite with the oblivious attacks that give the intermediate scores for early stopping added."""
        return replace(self, oblivious=tuple(dict.fromkeys((*self.oblivious, *SUITES["quick"].oblivious))))

    def with_known_noise(self) -> Suite:
        """Return the suite with an attacker who knows the noise of a draw, and with verdicts over at least `LOOKS`."""
        return replace(self, known=self.known or PGD_20, looks=max(self.looks, LOOKS))

    def within(self, threat: ThreatModel) -> Suite:
        """Return the suite as it is run under a threat model: only attacks that can be bounded in its norm."""
        blind = self.transfer if self.transfer and threat.knowledge == "white-box" else self.oblivious
        oblivious, white_box = (
            tuple(attack for attack in group if threat.norm in attack.norms) for group in (blind, self.white_box)
        )
        return replace(self, oblivious=oblivious, white_box=white_box, transfer=())


FIRST = (FGSM_TARGETED, IFGSM_TARGETED, FGSM, IFGSM)
AUTO = (APGD_CE, APGD_T, FAB_T, SQUARE)
TAILORED_10, TAILORED_40 = (SELECTIVE_10, CHOICE_10), (SELECTIVE_40, PENALISED_40, CHOICE_40, LATENT)
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
            looks=10,
            known=PGD_40,
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


def craft_oblivious(
    suite: Suite, classifier: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, seed: int
) -> dict[str, Tensor]:
    """Return the adversarial examples of each oblivious attack; they depend only on the bare classifier."""
    attacks = suite.within(threat).oblivious
    return {attack.name: attack.craft(View(classifier), x_NCHW, y_N, threat, seed) for attack in attacks}
