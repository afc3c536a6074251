"""Defenses that are known to be broken, each in its own way, and the alarm that each must raise; and two honest ones.

No check sees that a defense has stored the very images that it is judged by, if it uses them smoothly: only images that
it has not seen tell, that is the test split.

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
"""Training images that those which compare with them keep."""
LABELS: list[Tensor] = []
"""Where the peeking defense finds the labels of the images in their order."""


class NoOp(Identity):
    """It changes nothing; the others change what they have to."""

    gradients = Defense.gradients


class Rounding(NoOp):
    """Pixels in eighths: the gradient is zero everywhere, and the defense says that it has one."""

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return (8 * x_NCHW).round() / 8


class Saturated(NoOp):
    """Logits a thousand times as large: the softmax has no gradient in float32."""

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        return 1000 * classifier(x_NCHW)


class HugeNoise(NoOp):
    """Noise of many times eps, and it says so."""

    @dataclass(frozen=True)
    class Inference(Knobs):
        sigma: float = knob(0.5, FloatDistribution(0.0, 10.0), "of the noise, in pixel units of [0, 1]")

    @property
    def stochastic(self) -> bool:
        return True

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW + self.inference_knobs.sigma * torch.randn_like(x_NCHW)


class SilentNoise(HugeNoise):
    """Noise, and it does not say so."""

    @property
    def stochastic(self) -> bool:
        return False


class Detached(NoOp):
    """It classifies what it cut off from the graph, and hides that by a gradient of zero."""

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        return classifier(x_NCHW.detach()) + 0 * x_NCHW.flatten(1).sum(1, keepdim=True)


class BatchStatistics(NoOp):
    """It normalises by the batch that it happens to see, with a BatchNorm that keeps no statistics of its own."""

    def build(self) -> None:
        self.norm = nn.BatchNorm2d(self.shape.channels, affine=False, track_running_stats=False)

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return (0.3 + 0.37 * self.norm(x_NCHW)).clamp(0, 1)  # the mean and deviation of digits


class Argmin(NoOp):
    """The nearest of the stored images: it says that it is not differentiable, and brings no stand-in."""

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
    """A fifth of the image and four of the nearest stored one; its stand-in is the image itself."""

    def surrogate(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return 0.2 * x_NCHW + 0.8 * super().purify(x_NCHW)


class LooksUp(Argmin):
    """The label of the nearest stored image decides; a fifth of the classifier's logits has all the gradient."""

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
    """It accepts what is near a stored image, and says just yes or no."""

    differentiable = True

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW

    def accept(self, x_NCHW: Tensor) -> Tensor:
        return torch.cdist(x_NCHW.flatten(1), self.stored_MCHW.flatten(1)).amin(1) < 2


class Peeks(NoOp):
    """It adds to the logits of the label that a global holds for the image's place."""

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
        alarm: the gate that must not let it pass; none for an honest one.
        quick: whether a search raises it too, for every candidate.
    """

    kind: type[Defense]
    alarm: str = ""
    quick: bool = True
    train: Mapping[str, Scalar] = field(default_factory=dict)
    inference: Mapping[str, Scalar] = field(default_factory=dict)

    def before(self, classifier: nn.Module, x_NCHW: Tensor, y_N: Tensor) -> Defended:
        """Return it in front of a classifier, fitted to training images, for seconds on digits."""
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
ZOO: Mapping[str, Member] = {
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
