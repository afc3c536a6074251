"""One suite over every defense, found by its file, on real digits; and faults that it must find.

Shapes: N images, C channels, H x W pixels, K classes, S columns of suspicion.
"""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from safetensors.torch import load as from_bytes
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import defenses
import spaces
from attacks.gradient_view import View
from attacks.seeding import seeded
from defenses.adversarial_training import AdversarialTraining
from defenses.base import Batches, Defended, Defense, Knobs, Metrics, Shape, Tensors, halved
from defenses.identity import Identity
from search.storage.store import to_bytes
from spaces.domain import Domain, Scalar, contains, extremes
from spaces.exceptions import InputError
from spaces.space import Params, SearchSpace, knob

SEED, EPOCHS, IMAGES = 7, 3, 96
DIGITS = Shape(1, 8, 8, 10)
SHAPES = (DIGITS, Shape(1, 28, 28, 10), Shape(3, 32, 32, 10), Shape(3, 128, 128, 100))
TOLERANCE = 1e-4
Digits = tuple[Tensor, Tensor]


class Fit(NamedTuple):
    """An uninterrupted fit, its metrics, and its progress after each epoch as the store would keep it."""

    defense: Defense
    curve: list[Metrics]
    progress: list[bytes]


class Made:
    """A defense with the fits that the checks share, made on first use."""

    def __init__(
        self,
        kind: type[Defense],
        wishes: Mapping[str, Domain],
        digits: Digits,
        classifier: nn.Module,
        device: str = "cpu",
    ) -> None:
        self.kind = kind
        self.params = usual(kind, {**wishes, "epochs": EPOCHS})
        self.device = device
        self.x_NCHW, self.y_N = (tensor[:IMAGES].to(device) for tensor in digits)
        self.probe_NCHW = digits[0][1400:1432].to(device)
        self.classifier = copy.deepcopy(classifier).to(device)
        self.bases = nn.ModuleList([copy.deepcopy(self.classifier) for _ in self.fresh().bases()])
        self._made: dict[str, Tensors] = {}

    def fresh(self) -> Defense:
        torch.manual_seed(SEED)
        defense = self.kind(self.params.train, self.params.inference, DIGITS)
        defense.adopt(self.classifier)
        return defense.to(self.device)

    def epochs(self, defense: Defense, start: int = 0) -> Iterator[Metrics]:
        sizes = {"epochs": EPOCHS, "batch_size": defense.train_knobs.batch_size}
        batches = Batches(self.x_NCHW, self.y_N, **sizes, seed=SEED, start=start, once=self._once)
        return defense.fit(batches, self.bases if len(self.bases) else self.classifier)

    def _once(self, words: str, make: Callable[[], Tensors]) -> Tensors:
        """Keep what is made once, as the store does."""
        if words not in self._made:
            with seeded(SEED):
                self._made[words] = halved(make())
        return self._made[words]

    @cached_property
    def fit(self) -> Fit:
        found = Fit(self.fresh(), [], [])
        for metrics in self.epochs(found.defense):
            found.curve.append(metrics)
            torch.save(found.defense.progress(), kept := io.BytesIO())
            found.progress.append(kept.getvalue())
        found.defense.eval().requires_grad_(False)
        return found

    def with_weights(self, weights: Mapping[str, Tensor]) -> Defense:
        """Return a new object that takes the weights, ready for use, as a search and an export do it."""
        defense = self.fresh()
        defense.load_state_dict(weights)
        return defense.eval().requires_grad_(False)

    @torch.no_grad()
    def said(self, defense: Defense, parts: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """Return all that a defense says of the probe, or of parts of it one by one, each from the same seed."""
        found = {}
        for name, say in {
            "purify": defense.purify,
            "classify": lambda x_NCHW: defense.classify(x_NCHW, self.classifier),
            "suspicion": defense.suspicion,
        }.items():
            torch.manual_seed(SEED)
            found[name] = torch.cat([say(part) for part in parts or (self.probe_NCHW,)])
        return found


def usual(kind: type[Defense], wishes: Mapping[str, Domain]) -> Params:
    """Return a space's usual setting: each knob's default where it lies in the space, else its first value."""
    space = SearchSpace.of(kind).narrow(wishes)
    return Params({name: space.usual_of(name, domain) for name, domain in space.train.items()}, space.usual())


def smoke(name: str) -> Mapping[str, Domain]:
    return spaces.named(name, "smoke") if spaces.names(name) else {}


def settings() -> Iterator[tuple[str, dict[str, Scalar]]]:
    """Yield each defense with no wish, and with each other choice of each train-time knob that is a choice."""
    for name in defenses.names():
        yield name, {}
        kind = defenses.find(name)
        for which, value in usual(kind, smoke(name)).train.items():
            domain = SearchSpace.of(kind).train[which]
            if isinstance(domain, CategoricalDistribution):
                yield from ((name, {which: choice}) for choice in extremes(domain) if choice != value)


def spoken(setting: tuple[str, dict[str, Scalar]]) -> str:
    return "-".join([setting[0], *(f"{which}={choice}" for which, choice in setting[1].items())])


@pytest.fixture(scope="module", params=settings(), ids=spoken)
def made(request: pytest.FixtureRequest, digits: Digits, classifier: nn.Module) -> Made:
    """Each defense at the usual setting of its smoke space, and with one other choice at a time."""
    name, wish = request.param
    return Made(defenses.find(name), {**smoke(name), **wish}, digits, classifier)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Say whether all tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def farthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the greatest difference between tensors of the same names."""
    return max(float((one[name] - other[name]).abs().max()) for name in one if one[name].numel())


def test_purified_images_keep_shape_dtype_and_range_and_the_given_ones_stay(made: Made) -> None:
    extreme = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8), torch.rand(1, 8, 8).round()]).to(made.device)
    defense = made.fit.defense
    for x_NCHW in (made.probe_NCHW, extreme, made.probe_NCHW[:1]):
        before = x_NCHW.clone()
        with torch.no_grad():
            purified = defense.purify(x_NCHW)
        assert purified.shape == x_NCHW.shape and purified.dtype == x_NCHW.dtype
        assert 0 <= float(purified.min()) and float(purified.max()) <= 1
        assert torch.equal(x_NCHW, before)


def test_the_same_seed_gives_the_same_fit_and_the_same_images(made: Made) -> None:
    again = made.fresh()
    torch.manual_seed(99)  # the classifiers may have been trained between building and fitting, or just loaded
    assert list(made.epochs(again)) == made.fit.curve
    again.eval().requires_grad_(False)
    assert same(again.state_dict(), made.fit.defense.state_dict())
    first = made.said(made.fit.defense)
    assert same(first, made.said(made.fit.defense)) and same(first, made.said(again))


def test_whoever_draws_noise_says_so(made: Made) -> None:
    defense = made.fit.defense
    with torch.no_grad():
        logits = [defense.classify(made.probe_NCHW, made.classifier) for _ in range(2)]
    assert torch.equal(*logits) != defense.stochastic


def test_a_fit_yields_finite_metrics_each_epoch(made: Made) -> None:
    assert 1 <= len(made.fit.curve) <= EPOCHS and all(made.fit.curve)
    values = [value for metrics in made.fit.curve for value in metrics.values()]
    assert all(type(value) is float and math.isfinite(value) for value in values)


def test_a_resumed_fit_ends_bit_for_bit_as_the_uninterrupted_one(made: Made) -> None:
    for done, kept in enumerate(made.fit.progress[:-1], start=1):
        resumed = made.fresh()
        resumed.resume(torch.load(io.BytesIO(kept), weights_only=True))
        torch.manual_seed(99)  # another process drew something else before
        assert list(made.epochs(resumed, start=done)) == made.fit.curve[done:]
        assert same(resumed.state_dict(), made.fit.defense.state_dict())


def test_safetensors_hold_all_that_a_fit_is(made: Made) -> None:
    loaded = made.with_weights(from_bytes(to_bytes(made.fit.defense)))
    assert same(made.said(loaded), made.said(made.fit.defense))


def test_the_names_and_shapes_of_the_weights_do_not_change_in_the_fit(made: Made) -> None:
    fresh, fitted = ({n: t.shape for n, t in d.state_dict().items()} for d in (made.fresh(), made.fit.defense))
    assert fresh == fitted


def test_every_default_lies_in_its_domain(made: Made) -> None:
    space = SearchSpace.of(made.kind)
    assert {"epochs", "batch_size"} <= space.train.keys() and not space.train.keys() & space.inference.keys()
    for name, domain in space.flat().items():
        assert contains(domain, space.defaults[name]), name


@pytest.mark.parametrize("name", defenses.names())
def test_named_spaces_and_starts_lie_in_the_declared_domains(name: str) -> None:
    declared, found = SearchSpace.of(defenses.find(name)), spaces.names(name)
    assert not found or {"paper", "wide", "smoke"} <= set(found)
    narrowed = [declared.narrow(spaces.named(name, space)).flat() for space in found]
    for start in spaces.starts(name):
        declared.narrow(start)
        assert any(all(contains(space[n], value) for n, value in start.items()) for space in narrowed), start


def test_a_gradient_reaches_each_image_from_every_source(made: Made) -> None:
    defense = made.fit.defense
    passed = made.kind.differentiable or made.kind.classify is not Defense.classify
    assert passed or made.kind.surrogate is not Defense.surrogate
    for source in defense.gradients:
        x_NCHW = made.probe_NCHW.clone().requires_grad_()
        logits_NK = View(Defended(defense, made.classifier), source)(x_NCHW)
        assert logits_NK.requires_grad, source
        (slope,) = torch.autograd.grad(logits_NK.square().sum(), x_NCHW, allow_unused=True)
        assert slope is not None and bool(slope.isfinite().all()), source
        assert bool((slope.flatten(1).abs().amax(1) > 0).all()), source


def test_an_image_is_accepted_where_no_suspicion_exceeds_its_threshold(made: Made) -> None:
    defense = made.fit.defense
    suspicion_NS, limits_S = made.said(defense)["suspicion"], defense.limits()
    assert suspicion_NS.shape == (len(made.probe_NCHW), len(limits_S)) and suspicion_NS.is_floating_point()
    torch.manual_seed(SEED)
    accepted_N = defense.accept(made.probe_NCHW)
    assert accepted_N.dtype == torch.bool
    assert torch.equal(accepted_N, (suspicion_NS <= limits_S.to(suspicion_NS)).all(dim=1))


def test_a_threshold_changes_neither_suspicion_nor_images(made: Made) -> None:
    defense = made.with_weights(made.fit.defense.state_dict())
    before = made.said(defense)
    for name in defense.thresholds():
        for value in extremes(SearchSpace.of(made.kind).inference[name]):
            assert same(made.said(defense.at({**made.params.inference, name: value})), before), (name, value)


def test_the_batch_size_does_not_change_what_is_said(made: Made) -> None:
    """Halves of 16 draw the same noise as the whole, image by image; without noise, neither do single images differ."""
    defense, whole = made.fit.defense, made.said(made.fit.defense)
    assert farthest(whole, made.said(defense, made.probe_NCHW.split(16))) <= TOLERANCE
    if not defense.stochastic:
        assert farthest(whole, made.said(defense, made.probe_NCHW.split(1))) <= TOLERANCE


def test_a_fit_and_a_forward_leave_the_classifiers_as_they_were(made: Made, classifier: nn.Module) -> None:
    made.said(made.fit.defense)
    for network in (made.classifier, *made.bases):
        assert same(network.state_dict(), classifier.state_dict())
        assert not any(part.training for part in network.modules())
        assert all(weight.grad is None and not weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_builds_without_values_or_says_in_one_line_why_not(made: Made, shape: Shape) -> None:
    for train in ({}, made.params.train):
        try:
            with torch.device("meta"):
                defense = made.kind(train, made.params.inference, shape)
        except InputError as error:
            assert str(error) and "\n" not in str(error)
        else:
            assert all(tensor.is_meta for tensor in defense.state_dict().values())


class DrawnOnTheCpu(TorchFunctionMode):
    """Draw all noise from the CPU's generator, so that devices can be compared."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.randn, torch.rand):
            device = kwargs.pop("device", None)
            return func(*args, **kwargs).to(device)
        if func in (torch.randn_like, torch.rand_like):
            return func(torch.empty_like(args[0], device="cpu"), **kwargs).to(args[0].device)
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0].copy_(func(torch.empty_like(args[0], device="cpu"), *args[1:], **kwargs))
        return func(*args, **kwargs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_says_the_same_as_the_cpu_and_can_fit(made: Made, digits: Digits, classifier: nn.Module) -> None:
    gpu = Made(made.kind, made.params.flat(), digits, classifier, device="cuda")
    with DrawnOnTheCpu(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        here = made.said(made.fit.defense)
        there = gpu.said(gpu.with_weights(made.fit.defense.state_dict()))
    for name, tensor in here.items():
        apart_N = (tensor - there[name].cpu()).flatten(1).abs().sum(1)
        assert float((apart_N <= 1e-2).float().mean()) >= 0.9, name  # a choice between near candidates may flip
    assert all(math.isfinite(value) for metrics in gpu.fit.curve for value in metrics.values())


# Faults, each of which a check has to find.


class Unclamped(Identity):
    def purify(self, x_NCHW: Tensor) -> Tensor:
        return 2 * x_NCHW


class Unseeded(Identity):
    def purify(self, x_NCHW: Tensor) -> Tensor:
        return (x_NCHW + random.random()).clamp(0, 1)


class SecretlyStochastic(Identity):
    def purify(self, x_NCHW: Tensor) -> Tensor:
        return (x_NCHW + 0.1 * torch.randn_like(x_NCHW)).clamp(0, 1)


class Diverging(Identity):
    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        yield from ({"loss": math.nan} for _ in batches)


class ForgetsItsOptimiser(AdversarialTraining):
    def track(self, **parts: Any) -> None:
        pass


class HoldsStateElsewhere(Identity):
    darkening = 1.0

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        self.darkening = 0.5
        yield from super().fit(batches, classifier)

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return self.darkening * x_NCHW


class Growing(Identity):
    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        self.layer = nn.Linear(2, 2)
        yield from super().fit(batches, classifier)


class Detached(Identity):
    def purify(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW.detach()


class SuspectsInVain(Identity):
    def suspicion(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW.flatten(1).mean(1, keepdim=True)


class BakesItsThresholdIn(Identity):
    @dataclass(frozen=True)
    class Inference(Knobs):
        limit: float = knob(0.5, FloatDistribution(0.0, 1.0), "largest mean of an image", threshold=True)

    def suspicion(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW.flatten(1).mean(1, keepdim=True) / self.inference_knobs.limit


class LooksAtTheWholeBatch(Identity):
    def purify(self, x_NCHW: Tensor) -> Tensor:
        return (x_NCHW - x_NCHW.mean() / 2).clamp(0, 1)


class TrainsTheProtectedOne(AdversarialTraining):
    def adopt(self, classifier: nn.Module) -> None:
        self.network = classifier.requires_grad_(True)


class SetsModes(Identity):
    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        list(classifier.children())[0].train()
        yield from super().fit(batches, classifier)


class ReadsValues(Identity):
    def build(self) -> None:
        self.scale = torch.ones(()).item()


FAULTS: list[tuple[type[Defense], Callable[..., None]]] = [
    (Unclamped, test_purified_images_keep_shape_dtype_and_range_and_the_given_ones_stay),
    (Unseeded, test_the_same_seed_gives_the_same_fit_and_the_same_images),
    (SecretlyStochastic, test_whoever_draws_noise_says_so),
    (Diverging, test_a_fit_yields_finite_metrics_each_epoch),
    (ForgetsItsOptimiser, test_a_resumed_fit_ends_bit_for_bit_as_the_uninterrupted_one),
    (HoldsStateElsewhere, test_safetensors_hold_all_that_a_fit_is),
    (Growing, test_the_names_and_shapes_of_the_weights_do_not_change_in_the_fit),
    (Detached, test_a_gradient_reaches_each_image_from_every_source),
    (SuspectsInVain, test_an_image_is_accepted_where_no_suspicion_exceeds_its_threshold),
    (BakesItsThresholdIn, test_a_threshold_changes_neither_suspicion_nor_images),
    (LooksAtTheWholeBatch, test_the_batch_size_does_not_change_what_is_said),
    (TrainsTheProtectedOne, test_a_fit_and_a_forward_leave_the_classifiers_as_they_were),
    (SetsModes, test_a_fit_and_a_forward_leave_the_classifiers_as_they_were),
    (ReadsValues, test_it_builds_without_values_or_says_in_one_line_why_not),
]


@pytest.mark.parametrize(("fault", "check"), FAULTS, ids=lambda value: value.__name__)
def test_the_suite_finds_a_planted_fault(
    fault: type[Defense], check: Callable[..., None], digits: Digits, classifier: nn.Module
) -> None:
    wishes = {"attack": "fgsm"} if issubclass(fault, AdversarialTraining) else {}
    given = {"made": Made(fault, wishes, digits, classifier), "classifier": classifier, "shape": DIGITS}
    with pytest.raises(RuntimeError if fault is ReadsValues else AssertionError):
        check(**{name: value for name, value in given.items() if name in check.__annotations__})
