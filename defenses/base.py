"""The contract of a defense. Shapes: N images, C channels, H x W pixels, K classes; images lie in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from attacks.gradient_view import Gradient, Opening
from defenses.layers.channels_last import channels_last
from spaces.domain import Scalar
from spaces.space import Params

Metrics = dict[str, float]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """The shape of a task's images, and its number of classes."""

    channels: int
    height: int
    width: int
    classes: int


@dataclass
class Batches:
    """Training images on the device, served by epoch.

    Iterating yields one iterator of (x_NCHW, y_N) per epoch from `start` on. An epoch's order and noise depend only on
    `seed` and its number, so that a resumed fit is bit-identical. `boundary` is called before each batch, where other
    processes may take the device; `once` returns the tensors of a function under a key, cached by the trainer.
    """

    x_NCHW: Tensor
    y_N: Tensor
    epochs: int
    batch_size: int
    seed: int = 0
    start: int = 0
    boundary: Callable[[], None] = lambda: None
    once: Callable[[str, Callable[[], Tensors]], Tensors] = lambda shaped_by, make: halved(make())

    def split(self, share: float) -> tuple[Batches, tuple[Tensor, Tensor]]:
        """Return batches without the last `share` of the images, and these images x_NCHW, y_N, held out."""
        kept = len(self.x_NCHW) - max(1, round(share * len(self.x_NCHW)))
        held_out = self.x_NCHW[kept:], self.y_N[kept:]
        return replace(self, x_NCHW=self.x_NCHW[:kept], y_N=self.y_N[:kept]), held_out

    def __iter__(self) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        for epoch in range(self.start, self.epochs):
            torch.manual_seed(self.seed * 100_003 + epoch)
            yield self._one(torch.randperm(len(self.x_NCHW)).to(self.x_NCHW.device))

    def _one(self, order_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in order_N.split(self.batch_size):
            self.boundary()
            yield self.x_NCHW[chosen], self.y_N[chosen]


def halved(tensors: Tensors) -> Tensors:
    """Return the tensors with floating point as float16, which is accurate to 1 / 2048 for images in [0, 1]."""
    return {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}


@dataclass(frozen=True)
class Knobs:
    """A set of knobs; base class of a defense's Train and Inference."""


class Defense(nn.Module):
    """A purifier with its knobs.

    A defense is one file: it declares its knobs in `Train` and `Inference`, builds its networks in `build`, and
    implements `fit` and `purify`. Everything else has a default.

    Args:
        train: train-time knobs; a change needs a new training.
        inference: inference-time knobs; `at` changes them on a stored fit.
        shape: the shape of the task's images.

    Raises:
        InputError: the combination cannot be built.
    """

    Train: ClassVar[type[Knobs]] = Knobs
    Inference: ClassVar[type[Knobs]] = Knobs
    consults: ClassVar[Literal["target", "partner"]] = "target"
    """Which classifier `fit` gets: the protected one, or its partner architecture (PuVAE's source classifier)."""
    differentiable: ClassVar[bool] = True
    """Whether a gradient flows through `purify`; if not, override `surrogate`."""

    def __init__(self, train: Mapping[str, Scalar], inference: Mapping[str, Scalar], shape: Shape) -> None:
        super().__init__()
        self.train_knobs: Any = self.Train(**train)
        self.shape = shape
        self.at(inference)
        self._tracked: dict[str, Any] = {}
        self._resumed: dict[str, Any] = {}
        self.build()
        channels_last(self)

    def at(self, inference: Mapping[str, Scalar]) -> Self:
        """Set the inference-time knobs; the weights are unchanged."""
        self.inference_knobs: Any = self.Inference(**inference)
        return self

    @property
    def params(self) -> Params:
        return Params(asdict(self.train_knobs), asdict(self.inference_knobs))

    @property
    def stochastic(self) -> bool:
        """Whether `purify` draws noise at the present inference setting."""
        return False

    @property
    def descends(self) -> str | None:
        """The inference knob with the number of optimisation steps in `purify`; None: it does not optimise."""
        return None

    @property
    def candidates_each(self) -> int:
        """Number of candidate images that `purify` computes for each image, all in one forward pass."""
        return 1

    @property
    def gradients(self) -> tuple[Gradient, ...]:
        """The gradient sources that an attacker of this defense tries, the probably strongest first."""
        if type(self).classify is not Defense.classify:
            return ("exact",)  # `classify` does not use the output of `purify` or `surrogate`
        own = type(self).surrogate is not Defense.surrogate
        return (*(("surrogate",) if own else ()), "bpda", *(("exact",) if self.differentiable else ()))

    @property
    def openings(self) -> tuple[Opening, ...]:
        """The attack surfaces that adaptive attacks target, besides the gradient."""
        kind = type(self)
        own = {
            "rejection": kind.rejects(),
            "choice": kind.strain is not Defense.strain,
            "latent": kind.latent is not Defense.latent,
        }
        return tuple(name for name, there in own.items() if there)  # type: ignore[misc]

    def memory(self, images: int) -> Mapping[str, int]:
        """Return the bytes that a gradient through `classify` takes for so many images, by the knob that lowers them.

        Empty: not known, and small.
        """
        return {}

    def build(self) -> None:
        """Build the networks from `self.train_knobs` and `self.shape`.

        Also called on torch's meta device, where tensors have no values, to check a setting before any training.

        Raises:
            InputError: the combination cannot be built; one line with the requirement and the value.
        """

    def adopt(self, classifier: nn.Module) -> None:
        """Set up parts that depend on the protected classifier's architecture; called once, after `build`.

        A defense that retrains a classifier stores a deep copy here; the given classifier must not change.
        """

    def bases(self) -> tuple[str, ...]:
        """Return the architectures whose classifiers `fit` gets as an nn.ModuleList; empty: the one of `consults`."""
        return ()

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        """Train, yielding the metrics of each epoch.

        Args:
            batches: one iterator of batches per epoch.
            classifier: the classifier used in training, frozen and in eval mode; for PuVAE the source classifier M_s.
                An nn.ModuleList if `bases` names several.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it is trained")

    def purify(self, x_NCHW: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not say how it purifies")

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        """Return logits_NK."""
        return classifier(self.purify(x_NCHW))

    def suspicion(self, x_NCHW: Tensor) -> Tensor:
        """Return the detector scores of each image, NS: one column per inference knob that is a threshold, in order.

        An image is accepted if no score exceeds its threshold, so another threshold needs no new forward pass. A
        defense that only overrides `accept` has one score: 0 for accepted images, 1 for rejected ones.
        """
        if type(self).accept is Defense.accept:
            return x_NCHW.new_zeros((len(x_NCHW), 0))
        return (~self.accept(x_NCHW))[:, None].to(x_NCHW)

    @classmethod
    def thresholds(cls) -> tuple[str, ...]:
        """Return the names of the inference knobs that are thresholds of `suspicion`."""
        return tuple(f.name for f in fields(cls.Inference) if f.metadata["threshold"])

    @classmethod
    def rejects(cls) -> bool:
        """Return whether the defense can reject images."""
        return bool(cls.thresholds()) or cls.accept is not Defense.accept

    def limits(self) -> Tensor:
        """Return the values of the thresholds, S."""
        if type(self).accept is not Defense.accept:
            return torch.zeros(1)
        return torch.tensor([float(getattr(self.inference_knobs, name)) for name in self.thresholds()])

    def accept(self, x_NCHW: Tensor) -> Tensor:
        """Return a bool for each image; False means rejected."""
        suspicion_NS = self.suspicion(x_NCHW)
        return (suspicion_NS <= self.limits().to(suspicion_NS)).all(dim=1)

    def surrogate(self, x_NCHW: Tensor) -> Tensor:
        """Return a differentiable approximation of `purify`, for an attacker's gradient."""
        return self.purify(x_NCHW)

    def strain(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        """Return how close each image is to being purified into another class than its label, N, differentiable.

        A defense that chooses between candidates of the classes returns by how much the label's candidate is worse than
        the best other one; an attack maximises it together with the cross-entropy.
        """
        raise NotImplementedError(f"{type(self).__name__} does not choose between candidates")

    def latent(self, x_NCHW: Tensor) -> Tensor:
        """Return the latent vectors, NZ, from which images are generated, for an attack in the latent space."""
        raise NotImplementedError(f"{type(self).__name__} has no latent space")

    def generate(self, z_NZ: Tensor) -> Tensor:
        """Return the images generated from latent vectors."""
        raise NotImplementedError(f"{type(self).__name__} has no latent space")

    def remarks(self, x_NCHW: Tensor, y_N: Tensor) -> tuple[str, ...]:
        """Return what users should know of the trained networks, found on images of validation; mostly nothing."""
        return ()

    @contextmanager
    def deepened(self, factor: int) -> Iterator[bool]:
        """Run with `factor` times the optimisation steps in `purify`; yield whether there are any."""
        own = self.inference_knobs
        if self.descends is not None:
            self.inference_knobs = replace(own, **{self.descends: factor * getattr(own, self.descends)})
        try:
            yield self.descends is not None
        finally:
            self.inference_knobs = own

    def track(self, **parts: Any) -> None:
        """Register what a resumed fit needs besides the weights: optimisers, schedulers, auxiliary networks.

        Each part has state_dict and load_state_dict; call this in `fit` before the first batch. If the fit is resumed
        from a stored epoch, the parts' stored state is loaded here.
        """
        for name, part in parts.items():
            if name in self._resumed:
                part.load_state_dict(self._resumed.pop(name))
        self._tracked.update(parts)

    def progress(self) -> dict[str, Any]:
        """Return the state that `resume` needs to continue after this epoch."""
        return {"weights": self.state_dict(), **{n: part.state_dict() for n, part in self._tracked.items()}}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Load the state returned by `progress`."""
        self._resumed = dict(progress)
        self.load_state_dict(self._resumed.pop("weights"))


class Defended(nn.Module):
    """A classifier behind a defense, as one model: logits_NK from images in [0, 1]."""

    def __init__(self, defense: Defense, classifier: nn.Module) -> None:
        super().__init__()
        self.defense = defense
        self.classifier = classifier

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.defense.classify(x_NCHW, self.classifier)

    def accept(self, x_NCHW: Tensor) -> Tensor:
        return self.defense.accept(x_NCHW)
