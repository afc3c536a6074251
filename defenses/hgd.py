"""HGD: a U-Net that subtracts adversarial noise, trained to restore the classifier's response to the clean image.

Source: Liao et al., Defense against Adversarial Attacks Using High-Level Representation Guided Denoiser, CVPR 2018
(arXiv 1712.02976), and the authors' lfz/Guided-Denoise. The U-Net is AdvAE's; the authors' has strided convolutions,
bilinear up-sampling and 64, 128, 256, 256, 256 maps. Left out: the guide by the last convolution's features (FGD),
since not every classifier has one.
Shapes: N images, C channels, H x W pixels, K classes, P pairs of an image and its clean version.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

from attacks.gradient_view import BATCH
from attacks.threat import ThreatModel
from defenses.advae import UNet
from defenses.base import Batches, Defense, Knobs, Metrics, Tensors
from spaces.space import knob

CONVERGED_AFTER, CONVERGED_BELOW = 2, 0.01
"""The training loss has converged when it has not fallen by 1 % for more than two epochs. Inferred: in the paper the
learning rate falls from 1e-3 to 1e-4 on convergence, in the authors' code at fixed epochs."""

SLOPE = 0.1
"""Gradient of the surrogate outside [0, 1], where a clip has none."""


@dataclass(frozen=True)
class Train(Knobs):
    guide: str = knob(
        "logits",
        CategoricalDistribution(("logits", "pixels", "labels")),
        "what the loss compares: the classifier's logits (LGD), the pixels (PGD, the paper's plain denoiser) or the "
        "prediction with the label (CGD; with attack pgd it is AdvAE's HGD)",
    )
    attack: str = knob(
        "mix",
        CategoricalDistribution(("mix", "fgsm", "pgd")),
        "on the bare classifier: FGSM and iFGSM of 2, 4 and 8 steps (the paper), FGSM, or PGD (AdvAE's HGD)",
    )
    pgd_steps: int = knob(
        40, IntDistribution(2, 1000), "steps of PGD, each 4 / 3 eps / steps as in AdvAE", given={"attack": ("pgd",)}
    )
    eps: float = knob(0.3, FloatDistribution(0.0, 1.0), "largest L-inf bound, in pixel units; 16 / 255 in the paper")
    strengths: int = knob(
        16,
        IntDistribution(1, 64),
        "bounds that the images are spread over evenly, the multiples of eps / strengths; 1: all at eps",
    )
    maps: int = knob(32, IntDistribution(1, 256), "maps of the first level; each next level doubles them", latency=True)
    levels: int = knob(4, IntDistribution(1, 7), "levels of the U-Net; 5 in the paper", latency=True)
    learning_rate: float = knob(
        1e-3, FloatDistribution(1e-5, 1e-1, log=True), "Adam's, until the loss converges; then a tenth"
    )
    batch_size: int = knob(60, IntDistribution(1, 4096), "pairs a step")
    epochs: int = knob(20, IntDistribution(1, 1000), "passes over all pairs; 20 to 30 in the paper")


class HGD(Defense):
    """Purify by subtracting the adversarial noise that a U-Net estimates."""

    Train = Train

    def build(self) -> None:
        k, s = self.train_knobs, self.shape
        UNet.check(k.levels, s.height, s.width)
        self.denoiser = UNet(s.channels, k.maps, k.levels, last=1)

    def purify(self, x_NCHW: Tensor) -> Tensor:
        """Return x* - dx, clipped to [0, 1]; the authors do not clip."""
        return (x_NCHW - self.denoiser(x_NCHW)).clamp(0, 1)

    def surrogate(self, x_NCHW: Tensor) -> Tensor:
        """Return the purified images, with a gradient for clipped pixels too.

        In images with black and white areas most pixels are clipped, and a gradient attack on the clip itself is weak.
        """
        raw_NCHW = x_NCHW - self.denoiser(x_NCHW)
        outside_NCHW = raw_NCHW - raw_NCHW.clamp(0, 1)
        return raw_NCHW.clamp(0, 1) + SLOPE * (outside_NCHW - outside_NCHW.detach())

    def loss(self, x_NCHW: Tensor, target: Tensor, classifier: nn.Module) -> Tensor:
        """Return the distance of the purified images to the output of `targets`: L1, or the cross-entropy.

        The L1 distance is the mean over batch and logits or pixels, as in the authors' code.
        """
        purified_NCHW = self.purify(x_NCHW)
        if self.train_knobs.guide == "pixels":
            return F.l1_loss(purified_NCHW, target)
        distance = F.l1_loss if self.train_knobs.guide == "logits" else F.cross_entropy
        return distance(classifier(purified_NCHW), target)

    @torch.no_grad()
    def targets(self, x_NCHW: Tensor, y_N: Tensor, classifier: nn.Module) -> Tensor:
        """Return the target of each clean image's purified versions: f(x), x or the label."""
        if self.train_knobs.guide == "logits":
            return torch.cat([classifier(x) for x in x_NCHW.split(BATCH)])
        return x_NCHW if self.train_knobs.guide == "pixels" else y_N

    def attacks(self) -> tuple[Any, ...]:
        """Return the attacks whose examples are denoised in training, each on the bare classifier."""
        from attacks.catalog import FGSM, IFGSM, PGD_40  # loads torchattacks, which only a training needs

        steps = self.train_knobs.pgd_steps
        pgd = replace(PGD_40, name="pgd", source="AdvAE", steps=steps, pace=4 / 3 / steps)
        ifgsm = (replace(IFGSM, name=f"ifgsm-{n}", source="HGD", steps=n, pace=1 / n) for n in (2, 4, 8))
        return {"mix": (FGSM, *ifgsm), "fgsm": (FGSM,), "pgd": (pgd,)}[self.train_knobs.attack]

    def adversarial(self, x_NCHW: Tensor, y_N: Tensor, classifier: nn.Module) -> Tensors:
        """Return each attack's adversarial examples, x_NCHW; an image gets a different strength for each attack."""
        k, found = self.train_knobs, dict[str, Tensor]()
        for turn, attack in enumerate(self.attacks()):
            found[attack.name] = x_NCHW.clone()
            strength_N = (torch.arange(len(x_NCHW), device=x_NCHW.device) + turn) % k.strengths + 1
            for strength in strength_N.unique().tolist():
                its = strength_N == strength
                threat = ThreatModel("Linf", k.eps * strength / k.strengths, "oblivious")
                found[attack.name][its] = attack.craft(classifier, x_NCHW[its], y_N[its], threat, seed=0)
        return found

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        k, x_NCHW, y_N = self.train_knobs, batches.x_NCHW, batches.y_N
        whole = ThreatModel("Linf", k.eps, "oblivious")
        shaped_by = f"hgd {[attack.budget(whole) for attack in self.attacks()]} in {k.strengths} strengths"
        made = batches.once(shaped_by, lambda: self.adversarial(x_NCHW, y_N, classifier))
        # Clean images form pairs too, so that the denoiser learns to leave them unchanged.
        x_PCHW = torch.cat((x_NCHW.half(), *(made[attack.name] for attack in self.attacks())))
        clean_P = torch.arange(len(x_NCHW), device=x_NCHW.device).repeat(len(x_PCHW) // len(x_NCHW))
        target = self.targets(x_NCHW, y_N, classifier)
        adam = torch.optim.Adam(self.parameters(), lr=k.learning_rate, fused=True)
        decay = ReduceLROnPlateau(
            adam, patience=CONVERGED_AFTER, threshold=CONVERGED_BELOW, factor=0.1, min_lr=0.1 * k.learning_rate
        )
        self.track(adam=adam, decay=decay)
        for epoch in replace(batches, x_NCHW=x_PCHW, y_N=clean_P):
            self.train()
            total, pairs = torch.zeros((), device=x_NCHW.device), 0
            for half_NCHW, clean_N in epoch:
                loss = self.loss(half_NCHW.to(x_NCHW.dtype), target[clean_N], classifier)
                adam.zero_grad(set_to_none=True)
                loss.backward()
                adam.step()
                total += loss.detach() * len(clean_N)
                pairs += len(clean_N)
            mean = float(total / pairs)
            decay.step(mean)
            yield {"loss": mean}
