"""MagNet against its authors' code: architecture, losses, errors, and what the thresholds let pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from defenses.base import Batches, Shape
from defenses.magnet import NEVER, QUANTILES, MagNet, position

MNIST, CIFAR, DIGITS = Shape(1, 28, 28, 10), Shape(3, 32, 32, 10), Shape(1, 8, 8, 10)
COIL, ODD = Shape(3, 128, 128, 100), Shape(2, 9, 13, 4)


def build(shape: Shape = ODD, reformer: str = "I", **train: object) -> MagNet:
    torch.manual_seed(0)
    return MagNet(train, {"reformer": reformer}, shape).eval()  # type: ignore[arg-type]


def images(shape: Shape, n: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, shape.channels, shape.height, shape.width, generator=generator)


@pytest.fixture(scope="module")
def fitted(digits: tuple[Tensor, Tensor]) -> MagNet:
    """A short fit on 1,400 digits; the last 140 of them are held out."""
    torch.manual_seed(0)
    defense = MagNet({"maps": 8, "learning_rate": 2e-2, "batch_size": 16, "epochs": 4}, {}, DIGITS)
    for _ in defense.fit(Batches(digits[0][:1400], digits[1][:1400], epochs=4, batch_size=16), nn.Identity()):
        pass
    return defense.eval()


def layers(network: nn.Module) -> list[str]:
    """Return the layers of an autoencoder in order; a convolution as its kernel and maps."""
    leaves = [m for m in network.modules() if not list(m.children())]
    spoken = {nn.Sigmoid: "sigmoid", nn.AvgPool2d: "average", nn.MaxPool2d: "max", nn.Upsample: "up"}
    return [
        f"{m.kernel_size[0]}x{m.kernel_size[1]}x{m.out_channels}" if isinstance(m, nn.Conv2d) else spoken[type(m)]
        for m in leaves
    ]


def test_the_default_architecture_is_the_papers_on_mnist() -> None:
    defense, hidden, last = build(MNIST), ["3x3x3", "sigmoid"], ["3x3x1", "sigmoid"]
    expected = [*hidden, "average", *hidden, *hidden, "up", *hidden, *last]
    assert layers(defense.autoencoder_1) == expected
    assert layers(defense.autoencoder_2) == [*hidden, *hidden, *last]
    # By hand: weights and biases of 1 -> 3, 3 -> 3 and 3 -> 1 maps.
    first, middle, final = 9 * 1 * 3 + 3, 9 * 3 * 3 + 3, 9 * 3 * 1 + 1
    assert sum(p.numel() for p in defense.autoencoder_1.parameters()) == first + 3 * middle + final
    assert sum(p.numel() for p in defense.autoencoder_2.parameters()) == first + middle + final
    assert "max" in layers(build(MNIST, pooling="max").autoencoder_1)


@pytest.mark.parametrize("shape", [MNIST, CIFAR, DIGITS, COIL, ODD, Shape(1, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize("reformer", ["I", "II"])
def test_purified_images_keep_shape_dtype_and_range(shape: Shape, pooling: str, reformer: str) -> None:
    x = images(shape, 2)
    purified = build(shape, reformer, pooling=pooling).purify(x).detach()
    assert purified.shape == x.shape and purified.dtype == x.dtype
    assert 0 <= float(purified.min()) and float(purified.max()) <= 1


def test_the_losses_are_the_mean_squares_between_clean_images_and_reconstructions_of_noisy_ones() -> None:
    defense, x = build(noise=0.4), images(ODD)
    torch.manual_seed(7)
    found = defense.losses(x).tolist()
    torch.manual_seed(7)
    noise = torch.randn_like(x)
    noisy = [
        min(max(a + 0.4 * b, 0.0), 1.0) for a, b in zip(x.flatten().tolist(), noise.flatten().tolist(), strict=True)
    ]
    for loss, autoencoder in zip(found, (defense.autoencoder_1, defense.autoencoder_2), strict=True):
        rebuilt = autoencoder.double()(torch.tensor(noisy, dtype=torch.float64).view_as(x)).flatten().tolist()
        squares = [(a - b) ** 2 for a, b in zip(x.double().flatten().tolist(), rebuilt, strict=True)]
        assert loss == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_a_detectors_error_is_the_mean_power_of_the_difference() -> None:
    """Detector I: p = 2; detector II: p = 1."""
    defense, x = build(), images(ODD)
    found = defense.errors(x).detach()
    for n in range(len(x)):
        for column, (autoencoder, p) in enumerate(((defense.autoencoder_1, 2), (defense.autoencoder_2, 1))):
            rebuilt = autoencoder(x)[n].double().flatten().tolist()
            powers = [abs(a - b) ** p for a, b in zip(x[n].double().flatten().tolist(), rebuilt, strict=True)]
            assert float(found[n, column]) == pytest.approx(sum(powers) / len(powers), rel=1e-5)


def test_the_reformer_knob_says_which_autoencoder_purifies() -> None:
    defense, x = build(), images(ODD)
    assert torch.equal(defense.purify(x), defense.autoencoder_1(x))
    defense.at({"reformer": "II"})
    assert torch.equal(defense.purify(x), defense.autoencoder_2(x))
    assert not defense.stochastic and torch.equal(defense.purify(x), defense.purify(x))


def test_an_image_that_alone_stands_in_a_batch_is_purified_alike() -> None:
    defense, x = build(), images(ODD)
    assert torch.allclose(defense.purify(x), torch.cat([defense.purify(one) for one in x.split(1)]), atol=1e-6)


def by_hand(error: float, held_out: list[float]) -> float:
    """The piecewise linear distribution function through the sorted held-out errors."""
    if error > held_out[-1]:
        return error / held_out[-1]
    if error <= held_out[0]:
        return 0.0
    i = max(j for j in range(len(held_out) - 1) if held_out[j] < error)
    return (i + (error - held_out[i]) / (held_out[i + 1] - held_out[i])) / (len(held_out) - 1)


def test_the_position_is_the_interpolated_share_of_smaller_errors() -> None:
    held_out = torch.rand(21, generator=torch.Generator().manual_seed(2)).sort().values + 0.1
    errors = torch.linspace(0, 2, 400)
    found = position(errors, held_out)
    assert found.tolist() == pytest.approx([by_hand(e, held_out.tolist()) for e in errors.tolist()], abs=1e-5)
    assert bool((found.diff() >= 0).all())
    assert position(held_out, held_out).tolist() == pytest.approx([i / 20 for i in range(21)], abs=1e-6)


def test_a_position_is_finite_where_all_held_out_errors_are_equal_or_zero() -> None:
    errors = torch.tensor([0.0, 0.2, 0.3, 1.0])
    assert position(errors, torch.full((QUANTILES,), 0.2)).tolist() == pytest.approx([0, 0.999, 1.5, 5])
    found = position(errors, torch.zeros(QUANTILES))
    assert bool(found.isfinite().all()) and float(found.max()) <= NEVER
    assert math.isnan(float(position(torch.tensor([math.nan]), torch.zeros(QUANTILES))))


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_a_threshold_rejects_its_share_of_the_held_out_images(
    fitted: MagNet, digits: tuple[Tensor, Tensor], rate: float
) -> None:
    held_out = digits[0][1260:1400]
    for own, other in (("detector_1", "detector_2"), ("detector_2", "detector_1")):
        fitted.at({own: 1 - rate, other: NEVER})
        assert float((~fitted.accept(held_out)).float().mean()) == pytest.approx(rate, abs=1 / 140)


def test_digits_pass_and_noise_is_rejected(fitted: MagNet, digits: tuple[Tensor, Tensor]) -> None:
    fitted.at({})
    unseen, noise = digits[0][1400:], images(DIGITS, 200)
    assert float(fitted.accept(unseen).float().mean()) > 0.95
    assert not bool(fitted.accept(noise).any())
    fitted.at({"detector_1": NEVER, "detector_2": NEVER})
    assert bool(fitted.accept(noise).all())


def test_a_lower_threshold_never_accepts_more(fitted: MagNet, digits: tuple[Tensor, Tensor]) -> None:
    accepts = [
        fitted.at({"detector_1": limit, "detector_2": limit}).accept(digits[0]) for limit in (0.5, 0.9, 0.999, NEVER)
    ]
    for lower, higher in zip(accepts, accepts[1:], strict=False):
        assert not bool((lower & ~higher).any())


def test_the_thresholds_come_from_the_last_tenth_of_the_images_which_is_not_trained_on() -> None:
    x = images(DIGITS, 40)
    defense, seen = build(DIGITS), list[Tensor]()
    handle = defense.autoencoder_2.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for _ in defense.fit(Batches(x, torch.zeros(40).long(), epochs=1, batch_size=64), nn.Identity()):
        pass
    handle.remove()
    trained_on, held_out = seen
    assert len(trained_on) == 36 and torch.equal(held_out, x[36:])
    errors = defense.errors(held_out).detach()
    assert torch.allclose(defense.quantiles_2Q[:, 0], errors.amin(0)) and defense.quantiles_2Q.shape == (2, QUANTILES)
    assert torch.allclose(defense.quantiles_2Q[:, -1], errors.amax(0))


def test_weights_and_quantiles_load_into_a_fresh_object(fitted: MagNet, digits: tuple[Tensor, Tensor]) -> None:
    fresh = MagNet(fitted.params.train, {}, DIGITS).eval()
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh.suspicion(digits[0]), fitted.suspicion(digits[0]))


def test_a_gradient_reaches_the_input_through_purifier_and_detectors() -> None:
    defense = build()
    for path in (defense.purify, defense.suspicion):
        x = images(ODD).requires_grad_()
        (slope,) = torch.autograd.grad(path(x).square().sum(), x)
        assert bool((slope.flatten(1).abs().amax(1) > 0).all())
