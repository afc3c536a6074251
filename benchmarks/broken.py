"""Broken defenses, each with a different flaw and the alarm that it must raise; and two sound defenses.

No gate detects a defense that has stored the evaluation images and uses them smoothly: only images that it has not
seen, those of the test split, reveal it.

Shapes: N images, C channels, H x W pixels, K classes, M stored images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from optuna.distributions import FloatDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.advae import AdvAE
from defenses.adversarial_training import AdversarialTraining
from defenses.base import Batches, Defended, Defense, Knobs, Metrics, Shape
from defenses.defense_gan import DefenseGAN
from defenses.identity import Identity
from spaces.domain import Scalar
from spaces.space import knob

DIGITS = Shape(1, 8, 8, 10)
STORED = 1000
"""Number of training images that a defense stores, if it compares with stored images."""
LABELS: list[Tensor] = []
"""The labels of the images, in their order, that the peeking defense reads."""


class NoOp(Identity):
    """Changes nothing; the base class of other broken defenses."""

    gradients = Defense.gradients


class Rounding(NoOp):
    """Rounds pixels to eighths: the gradient is zero everywhere, but the defense claims to be differentiable."""

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return (8 * x_NCHW).round() / 8


class Saturated(NoOp):
    """Multiplies logits by 1000, so that the softmax has no gradient in float32."""

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        return 1000 * classifier(x_NCHW)


class HugeNoise(NoOp):
    """Adds noise of many times eps, and declares it."""

    @dataclass(frozen=True)
    class Inference(Knobs):
        sigma: float = knob(0.5, FloatDistribution(0.0, 10.0), "of the noise, in pixel units of [0, 1]")

    @property
    def stochastic(self) -> bool:
        return True

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW + self.inference_knobs.sigma * torch.randn_like(x_NCHW)


class SilentNoise(HugeNoise):
    """Adds noise without declaring it."""

    @property
    def stochastic(self) -> bool:
        return False


class Detached(NoOp):
    """Classifies an image that is detached from the graph, and hides that with a zero gradient."""

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        return classifier(x_NCHW.detach()) + 0 * x_NCHW.flatten(1).sum(1, keepdim=True)


class BatchStatistics(NoOp):
    """Normalizes by the statistics of the current batch, with a BatchNorm without running statistics."""

    def build(self) -> None:
        self.norm = nn.BatchNorm2d(self.shape.channels, affine=False, track_running_stats=False)

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return (0.3 + 0.37 * self.norm(x_NCHW)).clamp(0, 1)  # the mean and deviation of digits


class Argmin(NoOp):
    """Returns the nearest stored image; declares itself not differentiable, and has no surrogate."""

    differentiable = False
    stored_MCHW: Tensor

    def build(self) -> None:
        s = self.shape
        self.register_buffer("stored_MCHW", torch.zeros(STORED, s.channels, s.height, s.width))

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        self.stored_MCHW.copy_(batches.x_NCHW[: len(self.stored_MCHW)])
        yield from super().fit(batches, classifier)

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return self.stored_MCHW[torch.cdist(x_NCHW.flatten(1), self.stored_MCHW.flatten(1)).argmin(1)]


class NearestBlend(Argmin):
    """Blends one fifth of the image with four fifths of the nearest stored image; its surrogate is the image itself."""

    def surrogate(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return 0.2 * x_NCHW + 0.8 * super().purify(x_NCHW)


class LooksUp(Argmin):
    """Decides by the label of the nearest stored image; only 0.2 times the classifier's logits has a gradient."""

    differentiable = True
    labels_M: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("labels_M", torch.zeros(len(self.stored_MCHW), dtype=torch.long))

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        self.labels_M.copy_(batches.y_N[: len(self.labels_M)])
        yield from super().fit(batches, classifier)

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        nearest_N = torch.cdist(x_NCHW.flatten(1), self.stored_MCHW.flatten(1)).argmin(1)
        logits_NK = classifier(x_NCHW)
        return 10 * F.one_hot(self.labels_M[nearest_N], logits_NK.shape[1]) + 0.2 * logits_NK


class DeafDetector(Argmin):
    """Accepts images near a stored image; its detector has no score, only yes or no."""

    differentiable = True

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW

    def accept(self, x_NCHW: Tensor) -> Tensor:
        return torch.cdist(x_NCHW.flatten(1), self.stored_MCHW.flatten(1)).amin(1) < 2


class Peeks(NoOp):
    """Adds to the logit of the true label, which it reads from a global variable by the index of the image."""

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        logits_NK = classifier(x_NCHW)
        if not LABELS:
            return logits_NK
        places_N = torch.arange(len(x_NCHW)) % len(LABELS[0])
        return logits_NK + 30 * F.one_hot(LABELS[0][places_N], logits_NK.shape[1])


@dataclass(frozen=True, kw_only=True)
class Member:
    """One defense with its knobs.

    Args:
        alarm: the gate that must fail; empty for a sound defense.
        quick: whether the cheap gates of a search, run on every candidate, also raise the alarm.
    """

    kind: type[Defense]
    alarm: str = ""
    quick: bool = True
    train: Mapping[str, Scalar] = field(default_factory=dict)
    inference: Mapping[str, Scalar] = field(default_factory=dict)

    def before(self, classifier: nn.Module, x_NCHW: Tensor, y_N: Tensor) -> Defended:
        """Return the defense with a classifier, fitted to training images; on digits this takes seconds."""
        torch.manual_seed(0)
        defense = self.kind(self.train, self.inference, Shape(x_NCHW.shape[1], x_NCHW.shape[2], x_NCHW.shape[3], 10))
        defense.adopt(classifier)
        knobs = defense.train_knobs
        for _ in defense.fit(Batches(x_NCHW, y_N, epochs=knobs.epochs, batch_size=knobs.batch_size), classifier):
            pass
        return Defended(defense, classifier).eval().requires_grad_(False)


GAN: Mapping[str, Scalar] = {
    "latent": 16,
    "maps": 8,
    "learning_rate": 2e-3,
    "critic_steps": 2,
    "batch_size": 64,
    "epochs": 10,
}
BROKEN: Mapping[str, Member] = {
    "no-op": Member(kind=NoOp, alarm="baseline", quick=False),
    "rounding": Member(kind=Rounding, alarm="gradient"),
    "saturated logits": Member(kind=Saturated, alarm="saturation"),
    "detached gradient": Member(kind=Detached, alarm="gradient"),
    "huge noise": Member(kind=HugeNoise, alarm="draws", quick=False),
    "silent noise": Member(kind=SilentNoise, alarm="determinism"),
    "batch statistics": Member(kind=BatchStatistics, alarm="batch"),
    "argmin without stand-in": Member(kind=Argmin, alarm="stand-in"),
    "nearest, blended": Member(kind=NearestBlend, alarm="estimated", quick=False),
    "label looked up": Member(kind=LooksUp, alarm="completeness"),
    "detector without a gradient": Member(kind=DeafDetector, alarm="gradient"),
    "peeks at the label": Member(kind=Peeks, alarm="order"),
    "unconverged Defense-GAN": Member(
        kind=DefenseGAN, alarm="inner-loop", train=GAN, inference={"steps": 1, "restarts": 1}
    ),
}
PGD: Mapping[str, Scalar] = {"eps": 0.1, "pgd_steps": 3, "pgd_step_size": 0.06, "learning_rate": 5e-3, "batch_size": 64}
HONEST: Mapping[str, Member] = {
    "adversarial training": Member(kind=AdversarialTraining, train={**PGD, "start": "pretrained", "epochs": 10}),
    "AdvAE": Member(kind=AdvAE, train={**PGD, "architecture": "unet", "maps": 8, "lambda_rec": 0.2, "epochs": 6}),
}
