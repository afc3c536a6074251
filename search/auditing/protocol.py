"""What a model may say of itself to an audit, in at most four methods besides its forward pass, and what it says else.

| method | default |
| --- | --- |
| `purify(x_NCHW) -> x_NCHW` | there is no purifier: gradients are those of the model |
| `classify(x_NCHW) -> logits_NK`, of purified images; goes with `purify` | none |
| `surrogate(x_NCHW) -> x_NCHW`, a differentiable stand-in for `purify` | `purify`, its gradient the identity (BPDA) |
| `suspicion(x_NCHW) -> N or N x S` numbers; an image is rejected where one is above 0 | every image is accepted |

Without a forward pass of its own, a model with `purify` and `classify` answers `classify(purify(x))`. Whether it draws
noise, and whether it is differentiable, is found out by asking. Shapes: N images, C channels, H x W pixels, K classes,
S detectors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attacks.audit.gate import unit
from attacks.gradient_view import Gradient
from attacks.seeding import reproducible
from defenses.base import Defended, Defense, Shape
from search.auditing.source import one_line
from spaces.exceptions import InputError

Ask = Callable[[Tensor], Tensor]
METHODS = "purify", "classify", "surrogate", "suspicion"
FEW, TIMES = 32, 5
"""Images that a model is asked about before it is attacked, and how often, to see whether it draws noise."""
ALIKE = 1e-4
"""Largest difference between logits that are called the same, in units of their spread (the gate `determinism`)."""


def methods(model: nn.Module) -> tuple[str, ...]:
    """Return which of the four methods a model has, or a defended classifier of ours stands for.

    `classify` and `surrogate` count beside `purify` alone.

    Raises:
        InputError: it purifies, but does not say how it classifies.
    """
    if isinstance(model, Defended):
        kind = type(model.defense)
        own = {"surrogate": kind.surrogate is not Defense.surrogate, "suspicion": model.defense.rejects()}
        return ("purify", "classify", *(name for name, there in own.items() if there))
    found = [name for name in METHODS if callable(getattr(model, name, None))]
    if "purify" not in found:
        return ("suspicion",) if "suspicion" in found else ()
    if "classify" not in found:
        raise InputError(f"a model with purify must have classify too, but {type(model).__name__} has none")
    return tuple(found)


class Protocol(Defense):
    """The part of a model that purifies, as attacks and audit see it."""

    def __init__(self, model: nn.Module, shape: Shape, *, noisy: bool, exact: bool) -> None:
        super().__init__({}, {}, shape)
        self.model: Any = model
        self.whole = model if _answers(model) else None
        self.has = methods(model)
        self._noisy, self._exact = noisy, exact

    @property
    def stochastic(self) -> bool:
        return self._noisy

    @property
    def gradients(self) -> tuple[Gradient, ...]:
        sources: dict[Gradient, bool] = {
            "surrogate": "surrogate" in self.has,
            "bpda": "purify" in self.has,
            "exact": self._exact,
        }
        return tuple(source for source, there in sources.items() if there)

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return self.model.purify(self._open(x_NCHW)) if "purify" in self.has else x_NCHW

    def surrogate(self, x_NCHW: Tensor) -> Tensor:
        return self.model.surrogate(x_NCHW) if "surrogate" in self.has else self.purify(x_NCHW)

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        return self.model(self._open(x_NCHW)) if _answers(self.model) else classifier(self.purify(x_NCHW))

    def _open(self, x_NCHW: Tensor) -> Tensor:
        """Return the images without their graph where no gradient could flow: NumPy, say, refuses such tensors."""
        return x_NCHW if self._exact else x_NCHW.detach()


class Detecting(Protocol):
    """A model that rejects images: where its suspicion is above 0."""

    def suspicion(self, x_NCHW: Tensor) -> Tensor:
        scores = self.model.suspicion(x_NCHW)
        return scores.to(x_NCHW.dtype).reshape(len(x_NCHW), -1).amax(dim=1, keepdim=True)

    def accept(self, x_NCHW: Tensor) -> Tensor:
        return (self.suspicion(x_NCHW) <= 0).all(dim=1)


class Classifier(nn.Module):
    """The part of a model that classifies purified images; the whole model, where it does not purify."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.model.classify(x_NCHW) if "purify" in methods(self.model) else self.model(x_NCHW)


class Alone(Defended):
    """A model without a purifier or a detector: it defends nothing, so it stands for its own bare classifier."""

    def __init__(self, defense: Protocol) -> None:
        nn.Module.__init__(self)
        self.defense = defense

    def __getattr__(self, name: str) -> Any:
        return self if name == "classifier" else super().__getattr__(name)


def adapted(model: nn.Module, x_NCHW: Tensor, y_N: Tensor, classes: int | None = None) -> Defended:
    """Return a model in the form that attacks and audit ask; one of ours is returned as it is.

    Args:
        x_NCHW, y_N: the images that it will be attacked on, on its device.
        classes: number of classes of the data, if known.

    Raises:
        InputError: it does not take such images, or does not return logits of such classes, or has no gradient.
    """
    if isinstance(model, Defended):
        return getattr(model, "unchecked", lambda: model)()
    few_NCHW = x_NCHW[:FEW]
    has, kind = methods(model), type(model).__name__
    if not has and not _answers(model):
        raise InputError(f"a model must have a forward pass, or purify and classify, but {kind} has neither")
    logits_NK = _asked(model, has, few_NCHW, y_N, classes)
    noisy = _noisy(model, has, few_NCHW)
    if "purify" in has and _answers(model) and not noisy:
        _agree(model, few_NCHW, logits_NK)
    exact = _differentiable(partial(_once, model, has), model, few_NCHW)
    for name in has:
        if name in ("classify", "surrogate") and not _differentiable(getattr(model, name), model, few_NCHW):
            raise InputError(f"{name} must have a gradient, as attacks go around purify by it, but {kind}'s has none")
    if not exact and "purify" not in has:
        raise InputError(
            f"a model must have a gradient, but {kind} computes without one (no_grad, detach, numpy): attacks would be "
            "blind; give it purify and classify, and they go around what has none (docs/audit.md)"
        )
    _, channels, height, width = x_NCHW.shape
    shape = Shape(channels, height, width, logits_NK.shape[1])
    return wrapped(model, shape, noisy=noisy, exact=exact)


def wrapped(model: nn.Module, shape: Shape, *, noisy: bool, exact: bool) -> Defended:
    """Return a model that was checked before in the form that attacks and audit ask."""
    has = methods(model)
    defense = (Detecting if "suspicion" in has else Protocol)(model, shape, noisy=noisy, exact=exact)
    return Defended(defense, Classifier(model)) if has else Alone(defense)


def _answers(model: nn.Module) -> bool:
    """Return whether a model has a forward pass of its own."""
    return type(model).forward is not nn.Module.forward


def _once(model: Any, has: tuple[str, ...], x_NCHW: Tensor) -> Tensor:
    return model(x_NCHW) if _answers(model) else model.classify(model.purify(x_NCHW))


def _asked(model: Any, has: tuple[str, ...], x_NCHW: Tensor, y_N: Tensor, classes: int | None) -> Tensor:
    """Return the logits of the first images, after each method was asked about one image and about all of them."""
    asks = {**{name: getattr(model, name) for name in has if name != "classify"}, "logits": partial(_once, model, has)}
    for name, ask in asks.items():
        for x in (x_NCHW[:1], x_NCHW):
            found = _answered(name, partial(ask, x), model, x)
    logits_NK, most = found, found.shape[-1] if found.ndim == 2 else 0
    if most and classes not in (None, most):
        raise InputError(f"a model must return {classes} logits, one for each class of the data, but returns {most}")
    if most and int(y_N.max()) >= most:
        raise InputError(f"labels must be classes of the model, 0 to {most - 1}, but go up to {int(y_N.max())}")
    return logits_NK


def _answered(name: str, ask: Callable[[], object], model: nn.Module, x_NCHW: Tensor) -> Tensor:
    """Return what a model answers.

    Raises:
        InputError: it raises an error, or does not answer each image.
    """
    size = " x ".join(map(str, x_NCHW.shape))
    try:
        with reproducible(model, 0), torch.no_grad():
            found = ask()
    except Exception as error:
        raise InputError(f"a model must answer images {size}, but {name} raises {one_line(error)}") from None
    if not isinstance(found, Tensor):
        raise InputError(f"a model must answer with a tensor, but {name} returns a {type(found).__name__}")
    told = " x ".join(map(str, found.shape)) or "a scalar"
    if found.shape[:1] != x_NCHW.shape[:1]:
        raise InputError(f"{name} must return a row for each of {len(x_NCHW)} images, but returns {told}")
    if name in ("purify", "surrogate") and found.shape != x_NCHW.shape:
        raise InputError(f"{name} must return images {size}, as it gets, but returns {told}")
    return found


@torch.no_grad()
def _noisy(model: nn.Module, has: tuple[str, ...], x_NCHW: Tensor) -> bool:
    """Return whether a model answers the same images otherwise when it is asked again."""
    with reproducible(model, 0):
        first_NK, *others = (_once(model, has, x_NCHW) for _ in range(TIMES))
    return max(float((other - first_NK).abs().max()) for other in others) > ALIKE * unit(first_NK)


@torch.no_grad()
def _agree(model: Any, x_NCHW: Tensor, logits_NK: Tensor) -> None:
    """Raise an InputError if a model without noise answers otherwise than its purifier and classifier do."""
    with reproducible(model, 0):
        parts_NK = model.classify(model.purify(x_NCHW))
    apart = float((parts_NK - logits_NK).abs().max()) / unit(logits_NK) if parts_NK.shape == logits_NK.shape else 1.0
    if not apart <= 100 * ALIKE:
        raise InputError(
            f"model(x) must be model.classify(model.purify(x)), but they differ by {apart:.2g} of the logits' spread"
        )


def _differentiable(ask: Ask, model: nn.Module, x_NCHW: Tensor) -> bool:
    """Return whether a gradient flows through what a model answers, be it zero: the checks look at its value."""
    x = x_NCHW[:2].clone().requires_grad_()
    with reproducible(model, 0), torch.enable_grad():
        try:
            found = ask(x)
            return found.requires_grad and torch.autograd.grad(found.sum(), x, allow_unused=True)[0] is not None
        except RuntimeError:  # such as from numpy(); it answered where no gradient was asked for
            return False
