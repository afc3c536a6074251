"""Defenses built against the audit: each answers otherwise where an audit does not look, and the alarm it must raise.

Most have two faces: the adversarially trained network where attacks look, the bare classifier everywhere else.

Shapes: N images, C channels, H x W pixels, K classes, M remembered images.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType

import torch
from torch import Tensor, nn

from attacks.algorithms.base import lead
from benchmarks.broken import PGD, Argmin, LooksUp, Member, NearestBlend, NoOp, Rounding
from defenses.adversarial_training import AdversarialTraining
from defenses.magnet import MagNet

TRAIN = {**PGD, "start": "pretrained", "epochs": 10}


class TwoFaced(AdversarialTraining):
    """Answers by the adversarially trained network where it expects an attack, else by the bare classifier."""

    def expects(self, x_NCHW: Tensor) -> Tensor:
        """Return whether each image may come from an attack, bool_N."""
        raise NotImplementedError

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        return torch.where(self.expects(x_NCHW)[:, None], self.network(x_NCHW), classifier(x_NCHW))


class Crowd(TwoFaced):
    """Expects attacks in batches of more than two images."""

    def expects(self, x_NCHW: Tensor) -> Tensor:
        return torch.full((len(x_NCHW),), len(x_NCHW) > 2)


class Gathering(TwoFaced):
    """Expects attacks, and their verdicts, in batches of at most 256."""

    def expects(self, x_NCHW: Tensor) -> Tensor:
        return torch.full((len(x_NCHW),), len(x_NCHW) <= 256)


class Handfuls(TwoFaced):
    """Expects attacks in batches of all sizes but 3 to 6."""

    def expects(self, x_NCHW: Tensor) -> Tensor:
        return torch.full((len(x_NCHW),), not 3 <= len(x_NCHW) <= 6)


class Plainly(TwoFaced):
    """Expects attacks where gradients are off or required, but not where they are on and nobody needs them."""

    def expects(self, x_NCHW: Tensor) -> Tensor:
        return torch.full((len(x_NCHW),), x_NCHW.requires_grad or not torch.is_grad_enabled())


class FarClass(Plainly):
    """The same, with a further class that is never answered, so far away that the spread of the logits is huge."""

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        logits_NK = super().classify(x_NCHW, classifier)
        return torch.cat((logits_NK, torch.full_like(logits_NK[:, :1], -1e5)), dim=1)


class Inferring(TwoFaced):
    """Expects no attack in inference mode."""

    def expects(self, x_NCHW: Tensor) -> Tensor:
        return torch.full((len(x_NCHW),), not torch.is_inference_mode_enabled())


class Looking(TwoFaced):
    """Expects attacks where a function of an attack or an audit is among its callers."""

    def expects(self, x_NCHW: Tensor) -> Tensor:
        frame: FrameType | None = sys._getframe()
        while frame is not None and not frame.f_globals["__name__"].startswith(("attacks.", "search.")):
            frame = frame.f_back
        return torch.full((len(x_NCHW),), frame is not None)


class Overwriting(NoOp):
    """Writes easier images in the place of those that it is asked about, where nothing keeps a copy of them."""

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        logits_NK = classifier(x_NCHW)
        if x_NCHW._is_view() and not torch.is_grad_enabled():
            easier_NCHW, classes_N = x_NCHW.clone(), logits_NK.argmax(1)
            for _ in range(10):
                with torch.enable_grad():
                    lead_N = -lead(classifier(easier_NCHW.requires_grad_()), classes_N)
                    (slope_NCHW,) = torch.autograd.grad(lead_N.sum(), easier_NCHW)
                easier_NCHW = (easier_NCHW.detach() + 0.04 * slope_NCHW.sign()).clamp(0, 1)
            x_NCHW.data.copy_(easier_NCHW)
        return logits_NK


class Counting(TwoFaced):
    """Expects attacks after the first 140 images, which are those of the clean accuracy."""

    asked = 0

    def expects(self, x_NCHW: Tensor) -> Tensor:
        self.asked += 0 if self.training else len(x_NCHW)
        return torch.full((len(x_NCHW),), self.asked > 140)


class Remembering(NoOp):
    """Moves an image towards the first image near it that it was asked about: attacks come after the clean images."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.seen_MCHW = torch.zeros(0)

    def purify(self, x_NCHW: Tensor) -> Tensor:
        with torch.no_grad():
            if len(self.seen_MCHW) == 0:
                self.seen_MCHW = x_NCHW.detach().clone()
            near_NM = torch.cdist(x_NCHW.flatten(1), self.seen_MCHW.flatten(1), p=torch.inf)
            distance_N, nearest_N = near_NM.min(dim=1)
            fresh_N = distance_N > 0.15
            if len(self.seen_MCHW) < 300 and not self.training:
                self.seen_MCHW = torch.cat((self.seen_MCHW, x_NCHW[fresh_N].detach()))
            pull_NCHW = torch.where(fresh_N[:, None, None, None], 0.0, 0.9 * (self.seen_MCHW[nearest_N] - x_NCHW))
        return x_NCHW + pull_NCHW


class OffGrid(TwoFaced):
    """Expects attacks off the levels k / 16 in which the images of digits are stored."""

    def expects(self, x_NCHW: Tensor) -> Tensor:
        return ((16 * x_NCHW).round() / 16 - x_NCHW).abs().flatten(1).amax(1) > 1e-6


class FarOffGrid(OffGrid):
    """Expects attacks where pixels are far from levels, so that next to nothing changes no answer."""

    def expects(self, x_NCHW: Tensor) -> Tensor:
        return ((16 * x_NCHW).round() / 16 - x_NCHW).abs().flatten(1).mean(1) > 0.006


class Zeros(TwoFaced):
    """Expects attacks where fewer than a fifth of the pixels are exactly black."""

    def expects(self, x_NCHW: Tensor) -> Tensor:
        return (x_NCHW == 0).flatten(1).double().mean(1) < 0.2


class Guard(NearestBlend):
    """Returns a grey image for one outside [0, 1], so that estimated gradients are of that, and blends inside."""

    def purify(self, x_NCHW: Tensor) -> Tensor:
        inside_N = ((x_NCHW >= 0) & (x_NCHW <= 1)).flatten(1).all(dim=1)
        return torch.where(inside_N[:, None, None, None], super().purify(x_NCHW), 0 * x_NCHW + 0.5)


class Announcing(NearestBlend):
    """Announces noise that it hardly draws, so that estimated gradients may find more."""

    @property
    def stochastic(self) -> bool:
        return True

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return super().purify(x_NCHW) + 1e-3 * torch.randn_like(x_NCHW)


class NoisyStraight(NearestBlend):
    """Blends with the stored image that is nearest to a noisy copy; the gradient passes straight through."""

    differentiable, surrogate = True, NoOp.surrogate

    @property
    def stochastic(self) -> bool:
        return True

    def purify(self, x_NCHW: Tensor) -> Tensor:
        noisy_NCHW = x_NCHW + 0.05 * torch.randn_like(x_NCHW)
        return x_NCHW + (super().purify(noisy_NCHW) - x_NCHW).detach()


class Tempered(NearestBlend):
    """Blends as well, straight through, and multiplies the logits by a random number, which changes no class."""

    differentiable, surrogate = True, NoOp.surrogate

    @property
    def stochastic(self) -> bool:
        return True

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW + (super().purify(x_NCHW) - x_NCHW).detach()

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        return super().classify(x_NCHW, classifier) * torch.randn(len(x_NCHW), 1).div(2).exp()


class NoisyBlend(Argmin):
    """Blends a noisy copy with the stored image nearest to it, without any trick: the choice has no gradient."""

    differentiable = True

    @property
    def stochastic(self) -> bool:
        return True

    def purify(self, x_NCHW: Tensor) -> Tensor:
        noisy_NCHW = x_NCHW + 0.05 * torch.randn_like(x_NCHW)
        return 0.35 * noisy_NCHW + 0.65 * super().purify(noisy_NCHW)


class OthersGradient(MagNet):
    """Rejects like a MagNet, and gives its detectors the gradient of something else."""

    def suspicion(self, x_NCHW: Tensor) -> Tensor:
        decoy_N1 = 1e-3 * x_NCHW.square().flatten(1).mean(1, keepdim=True)
        return super().suspicion(x_NCHW.detach()).detach() + decoy_N1 - decoy_N1.detach()


class Faint(NoOp):
    """A mixin: logits times 1e-15, below all absolute limits."""

    scale = 1e-15

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        return self.scale * super().classify(x_NCHW, classifier)


class FaintRounding(Faint, Rounding):
    """Rounding with faint logits."""


class FaintNoise(AdversarialTraining):
    """Noise that is not announced, with faint logits."""

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        return Faint.scale * self.network(x_NCHW + 0.05 * torch.randn_like(x_NCHW))


class FaintLookUp(Faint, LooksUp):
    """A label looked up, with faint logits."""


class Loud(FaintLookUp):
    """A label looked up, with logits times 1e6."""

    scale = 1e6


class CountingCrowd(Counting):
    """Combines two: expects attacks after the first images, and only in batches of more than two."""

    def expects(self, x_NCHW: Tensor) -> Tensor:
        return super().expects(x_NCHW) & (len(x_NCHW) > 2)


class AnnouncedOffGrid(FarOffGrid):
    """Combines two: announces noise that it does not draw, and expects attacks far off the levels."""

    @property
    def stochastic(self) -> bool:
        return True


CHEATS: Mapping[str, Member] = {
    "robust in batches alone": Member(kind=Crowd, alarm="batch-size", quick=False, train=TRAIN),
    "robust in batches of verdicts": Member(kind=Gathering, alarm="batch-size", quick=False, train=TRAIN),
    "robust but by threes": Member(kind=Handfuls, alarm="batch-size", quick=False, train=TRAIN),
    "robust but asked plainly": Member(kind=Plainly, alarm="as-used", quick=False, train=TRAIN),
    "asked plainly, a class far away": Member(kind=FarClass, alarm="as-used", quick=False, train=TRAIN),
    "robust but in inference mode": Member(kind=Inferring, alarm="as-used", quick=False, train=TRAIN),
    "looks at its callers": Member(kind=Looking, alarm="as-used", quick=False, train=TRAIN),
    "counts its queries": Member(kind=Counting, alarm="replayed", quick=False, train=TRAIN),
    "remembers its queries": Member(kind=Remembering, alarm="replayed", quick=False),
    "robust off the levels": Member(kind=OffGrid, alarm="jump", train=TRAIN),
    "robust far off the levels": Member(kind=FarOffGrid, alarm="regular", quick=False, train=TRAIN),
    "robust without black": Member(kind=Zeros, alarm="jump", train=TRAIN),
    "guards the box": Member(kind=Guard, alarm="estimated", quick=False),
    "announces noise": Member(kind=Announcing, alarm="estimated", quick=False),
    "straight through, with noise": Member(kind=NoisyStraight, alarm="prediction"),
    "straight through, random scale": Member(kind=Tempered, alarm="prediction"),
    "nearest, blended, with noise": Member(kind=NoisyBlend, alarm="prediction"),
    "detectors with another's gradient": Member(
        kind=OthersGradient,
        alarm="prediction",
        train={"maps": 8, "learning_rate": 2e-2, "batch_size": 16, "epochs": 3},
        inference={"detector_1": 0.95, "detector_2": 0.95},
    ),
    "faint rounding": Member(kind=FaintRounding, alarm="gradient"),
    "faint noise": Member(kind=FaintNoise, alarm="determinism", train=TRAIN),
    "faint look-up": Member(kind=FaintLookUp, alarm="completeness"),
    "loud look-up": Member(kind=Loud, alarm="completeness"),
    "counts, and robust in batches": Member(kind=CountingCrowd, alarm="batch-size", quick=False, train=TRAIN),
    "announces noise, robust off levels": Member(kind=AnnouncedOffGrid, alarm="regular", quick=False, train=TRAIN),
}
