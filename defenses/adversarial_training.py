"""Adversarial training: the classifier itself is trained on its own adversarial examples; nothing is purified.

Sources: `fgsm` is Goodfellow et al., Explaining and Harnessing Adversarial Examples, 2014, section 6, a baseline of
PuVAE (IEEE Access 2019, Eq. 4); `pgd` is Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks,
2017, a baseline of AdvAE under the name of iterative adversarial training (sections 2.3 and 4.1, Eq. 4).
Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.seeding import Draws, evaluating
from defenses.base import Batches, Defense, Knobs, Metrics
from spaces.exceptions import InputError
from spaces.space import knob


@dataclass(frozen=True)
class Train(Knobs):
    attack: str = knob("pgd", CategoricalDistribution(("fgsm", "pgd")), "what makes each step's adversarial images")
    norm: str = knob(
        "Linf",
        CategoricalDistribution(("Linf", "L2")),
        "of their perturbation; fgsm's is Linf",
        given={"attack": ("pgd",)},
    )
    eps: float = knob(
        0.3, FloatDistribution(0.0, 1000.0), "bound of their perturbation, in pixel units of [0, 1]; in Linf at most 1"
    )
    pgd_steps: int = knob(
        40, IntDistribution(1, 1000), "gradient steps; AdvAE on MNIST 40, on CIFAR-10 10", given={"attack": ("pgd",)}
    )
    pgd_step_size: float = knob(
        0.01, FloatDistribution(1e-4, 1000.0, log=True), "step, in pixel units; AdvAE's", given={"attack": ("pgd",)}
    )
    warm_up: int = knob(
        0,
        IntDistribution(0, 1000),
        "first epochs in which eps and step grow linearly (inferred: at a large eps a training may stay at chance)",
    )
    clean_share: float = knob(
        0.5,
        FloatDistribution(0.0, 1.0),
        "alpha, weight of the clean images' loss; pgd trains on adversarial images alone",
        given={"attack": ("fgsm",)},
    )
    start: str = knob(
        "scratch",
        CategoricalDistribution(("scratch", "pretrained")),
        "from fresh weights (inferred), or from those of the protected classifier",
    )
    learning_rate: float = knob(1e-3, FloatDistribution(1e-5, 1e-1, log=True), "Adam's, AdvAE section 4.1")
    batch_size: int = knob(128, IntDistribution(1, 4096), "images a step (the papers do not say)")
    epochs: int = knob(20, IntDistribution(1, 1000), "passes over the training images (the papers do not say)")


class AdversarialTraining(Defense):
    """Classify by a network of the protected classifier's architecture, adversarially trained."""

    Train = Train

    def build(self) -> None:
        k = self.train_knobs
        if k.norm == "Linf" and k.eps > 1:
            raise InputError(f"eps must be at most 1 in Linf, in pixel units of [0, 1], but is {k.eps}")

    def adopt(self, classifier: nn.Module) -> None:
        self.network = copy.deepcopy(classifier).requires_grad_(True)

    def attacked(self, x_NCHW: Tensor, y_N: Tensor, share: float = 1.0) -> Tensor:
        """Return x + delta: the inner maximum of AdvAE's Eq. 4, found by the attack on the current network.

        Args:
            share: of eps and of the step; less than 1 while the training warms up.
        """
        import torchattacks  # only a training needs it

        from attacks.algorithms.pgd import PGD  # loads torchattacks

        k = self.train_knobs
        eps, alpha = share * k.eps, share * k.pgd_step_size
        attack: torchattacks.attack.Attack
        if k.attack == "fgsm":
            attack = torchattacks.FGSM(self.network, eps=eps)
        elif k.norm == "Linf":
            attack = torchattacks.PGD(self.network, eps=eps, alpha=alpha, steps=k.pgd_steps)
        else:  # torchattacks' PGDL2 adds 1e-10 to the norm of the gradient of the batch's mean loss, which may be less
            attack = PGD(self.network, eps=eps, alpha=alpha, steps=k.pgd_steps, norm="L2")
            seed = int(torch.randint(2**31, ()))  # of this step's random starts; it follows from the epoch's seed
            attack.draws = Draws(seed, torch.arange(len(x_NCHW), device=x_NCHW.device))
        with evaluating(self.network):
            return attack(x_NCHW, y_N)

    def loss(self, x_NCHW: Tensor, adversarial_NCHW: Tensor, y_N: Tensor) -> Tensor:
        """Return the batch's mean of L(theta; x + delta, y), AdvAE Eq. 4; for fgsm with clean images, PuVAE Eq. 4."""
        adversarial = F.cross_entropy(self.network(adversarial_NCHW), y_N)
        if self.train_knobs.attack == "pgd":
            return adversarial
        alpha = self.train_knobs.clean_share
        return alpha * F.cross_entropy(self.network(x_NCHW), y_N) + (1 - alpha) * adversarial

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        k = self.train_knobs
        adam = torch.optim.Adam(self.parameters(), lr=k.learning_rate, fused=True)
        self.track(adam=adam)
        for number, epoch in enumerate(batches, start=batches.start):
            if number == 0 and k.start == "scratch":  # here, so that the weights follow from the epoch's seed
                self._forget()
            share = min(1.0, (number + 1) / (k.warm_up + 1))
            self.train()
            total, images = torch.zeros((), device=batches.x_NCHW.device), 0
            for x_NCHW, y_N in epoch:
                loss = self.loss(x_NCHW, self.attacked(x_NCHW, y_N, share), y_N)
                adam.zero_grad(set_to_none=True)
                loss.backward()
                adam.step()
                total += loss.detach() * len(x_NCHW)
                images += len(x_NCHW)
            yield {"loss": float(total / images)}

    def _forget(self) -> None:
        for part in self.network.modules():
            getattr(part, "reset_parameters", lambda: None)()

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        return self.network(x_NCHW)
