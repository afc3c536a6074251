"""Defense-GAN: each loss against a float64 loop, the projection against a descent image by image, its special cases."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import defenses.defense_gan
import spaces
from defenses.base import Batches, Shape
from defenses.defense_gan import DefenseGAN
from spaces.domain import Scalar
from spaces.space import SearchSpace

MNIST, CIFAR, DIGITS = Shape(1, 28, 28, 10), Shape(3, 32, 32, 10), Shape(1, 8, 8, 10)
COIL, ODD = Shape(3, 128, 128, 100), Shape(2, 9, 13, 4)
SMALL: dict[str, Scalar] = {"latent": 5, "maps": 3}


def build(shape: Shape = ODD, train: dict[str, Scalar] | None = None, **inference: Scalar) -> DefenseGAN:
    torch.manual_seed(0)
    return DefenseGAN(SMALL | (train or {}), {"steps": 4, "restarts": 3} | inference, shape).eval()


def images(shape: Shape, n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, shape.channels, shape.height, shape.width, generator=generator)


def batches(x: Tensor, epochs: int = 1, size: int = 4, start: int = 0) -> Batches:
    return Batches(x, torch.zeros(len(x), dtype=torch.long), epochs=epochs, batch_size=size, start=start)


def weights(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.fixture(scope="module")
def fitted(digits: tuple[Tensor, Tensor]) -> DefenseGAN:
    """A generator trained for seconds on real digits."""
    smoke: dict[str, Scalar] = {"latent": 16, "maps": 8, "batch_size": 16, "critic_steps": 2, "learning_rate": 3e-3}
    torch.manual_seed(0)
    defense = DefenseGAN(smoke | {"epochs": 2}, {"steps": 10, "restarts": 2}, DIGITS)
    for _ in defense.fit(batches(digits[0][:1257], epochs=2, size=16), nn.Identity()):
        pass
    return defense.eval().requires_grad_(False)


def test_the_default_architecture_is_the_codes() -> None:
    defense = DefenseGAN({}, {}, MNIST)
    deconvolutions = [m for m in defense.deconvolutions if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size, m.stride) for m in deconvolutions] == [
        (256, 128, (5, 5), (2, 2)),
        (128, 64, (5, 5), (2, 2)),
        (64, 1, (5, 5), (2, 2)),
    ]
    assert defense.sizes == [(4, 4), (7, 7), (14, 14), (28, 28)]
    generator = (128 + 1) * 4 * 4 * 256 + (25 * 256 * 128 + 128) + (25 * 128 * 64 + 64) + (25 * 64 + 1)
    assert weights(defense) == generator
    critic = defense.critic(seed=0)
    convolutions = [m for m in critic.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, m.kernel_size, m.stride) for m in convolutions] == [
        (64, (5, 5), (2, 2)),
        (128, (5, 5), (2, 2)),
        (256, (5, 5), (2, 2)),
    ]
    assert [m.negative_slope for m in critic.modules() if isinstance(m, nn.LeakyReLU)] == [0.2] * 3
    assert weights(critic) == (25 * 64 + 64) + (25 * 64 * 128 + 128) + (25 * 128 * 256 + 256) + (4 * 4 * 256 + 1)
    assert critic(images(MNIST)).shape == (4,)


@pytest.mark.parametrize(
    ("shape", "heights", "widths"),
    [
        (MNIST, [4, 7, 14, 28], [12, 6, 3, 1]),
        (CIFAR, [4, 8, 16, 32], [12, 6, 3, 3]),
        (Shape(3, 64, 64, 2), [4, 8, 16, 32, 64], [12, 6, 3, 3, 3]),
        (COIL, [4, 8, 16, 32, 64, 128], [12, 6, 3, 3, 3, 3]),
        (DIGITS, [1, 2, 4, 8], [12, 6, 3, 1]),
        (ODD, [2, 3, 5, 9], [12, 6, 3, 2]),
    ],
    ids=str,
)
def test_images_of_any_size_come_out_of_the_generator_and_go_into_the_critic(
    shape: Shape, heights: list[int], widths: list[int]
) -> None:
    defense, x = build(shape, steps=1, restarts=2), images(shape, 2)
    assert [height for height, _ in defense.sizes] == heights and defense.widths == widths
    purified = defense.purify(x)
    assert (
        defense.surrogate(x).shape == purified.shape == x.shape
        and 0 <= float(purified.min())
        and float(purified.max()) <= 1
    )
    assert defense.critic(seed=0)(x).shape == (2,)


def test_the_weights_start_as_wide_as_in_the_code() -> None:
    defense = DefenseGAN({}, {}, MNIST)
    deconvolution, convolution = defense.deconvolutions[1], list(defense.critic(0).modules())[3]
    assert isinstance(deconvolution, nn.ConvTranspose2d) and isinstance(convolution, nn.Conv2d)
    up = math.sqrt(4 / (128 * 25 / 4 + 64 * 25))  # fan in over the stride's square, fan out
    down = math.sqrt(4 / (64 * 25 + 128 * 25 / 4))
    parts: list[tuple[nn.Linear | nn.Conv2d | nn.ConvTranspose2d, float]] = [
        (defense.dense, math.sqrt(2 / (128 + 4096))),
        (deconvolution, up),
        (convolution, down),
    ]
    for part, std in parts:
        assert float(part.weight.detach().std()) == pytest.approx(std, rel=0.01)
        assert float(part.weight.detach().abs().max()) <= math.sqrt(3) * std
        assert part.bias is not None and not bool(part.bias.any())


# Training: each term against Algorithm 1 in float64.


def drawn(defense: DefenseGAN, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `losses` draws next: the generated images and the mixing weights."""
    z = torch.randn(len(x), defense.train_knobs.latent, dtype=x.dtype)
    return defense.generate(z).detach(), torch.rand(len(x), 1, 1, 1, dtype=x.dtype)


@torch.no_grad()
def loops(critic: nn.Module, x: Tensor, fake: Tensor, alpha: Tensor) -> tuple[float, float, float]:
    """Algorithm 1 image by image, the slope pixel by pixel by central differences."""
    real, made, penalty, h = [], [], [], 1e-5
    for n in range(len(x)):
        real.append(float(critic(x[n : n + 1])))
        made.append(float(critic(fake[n : n + 1])))
        between = (1 - float(alpha[n])) * x[n] + float(alpha[n]) * fake[n]
        nudges = h * torch.eye(between.numel(), dtype=x.dtype).reshape(-1, *between.shape)
        slopes = (critic(between + nudges) - critic(between - nudges)) / (2 * h)
        penalty.append((math.sqrt(sum(s**2 for s in slopes.tolist())) - 1) ** 2)
    mean_real, mean_made, mean_penalty = (sum(term) / len(term) for term in (real, made, penalty))
    return mean_real, mean_made, mean_penalty


def test_the_critics_losses_are_algorithm_1() -> None:
    defense, x = build().double(), images(ODD).double()
    critic = defense.critic(seed=3).double()
    torch.manual_seed(2)
    expected = loops(critic, x, *drawn(defense, x))
    torch.manual_seed(2)
    assert [float(loss.detach()) for loss in defense.losses(critic, x)] == pytest.approx(expected, rel=1e-6)


def test_the_gradient_penalty_reaches_the_critics_weights() -> None:
    defense, x = build().double(), images(ODD).double()
    critic = defense.critic(seed=3).double()

    def penalty() -> Tensor:
        torch.manual_seed(2)
        return defense.losses(critic, x)[2]

    penalty().backward()
    for weight in (p for p in critic.parameters() if p.dim() > 1):
        assert weight.grad is not None
        at, found = (0,) * weight.dim(), []
        for nudge in (1e-6, -2e-6):
            with torch.no_grad():
                weight[at] += nudge
            found.append(penalty().item())
        assert float(weight.grad[at]) == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-4, abs=1e-8)
    assert all(p.grad is None for p in defense.parameters())


def test_a_critic_without_slope_has_a_finite_penalty() -> None:
    defense, x = build(), images(ODD)
    critic = defense.critic(seed=0)
    for parameter in critic.parameters():
        nn.init.zeros_(parameter)
    penalty = defense.losses(critic, x)[2]
    penalty.backward()
    assert penalty.item() == 1
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in critic.parameters())


def test_the_metrics_are_the_losses_of_the_epoch() -> None:
    x = images(ODD)
    defense = build(train={"lambda_gp": 3.0})
    critic, before = defense.critic(seed=0), copy.deepcopy(defense)
    (metrics,) = defense.fit(batches(x), nn.Identity())
    torch.manual_seed(0)
    x = x[torch.randperm(4)]
    real, made, penalty = loops(critic.double(), x.double(), *(tensor.double() for tensor in drawn(before, x)))
    assert metrics["wasserstein"] == pytest.approx(real - made, rel=1e-4)
    assert metrics["generator"] == pytest.approx(-made, rel=1e-4)
    assert metrics["penalty"] == pytest.approx(penalty, rel=1e-4)
    assert metrics["critic"] == pytest.approx(made - real + 3 * penalty, rel=1e-4)


@pytest.mark.parametrize("critic_steps", [1, 5])
def test_a_step_of_each_network_follows_its_own_loss(critic_steps: int) -> None:
    """Adam's first step moves each weight by the learning rate against the sign of its slope."""
    x, rate = images(ODD), 1e-3
    defense = build(train={"critic_steps": critic_steps, "learning_rate": rate, "lambda_gp": 100.0})
    before, critic = copy.deepcopy(defense), defense.critic(seed=0)
    (_,) = defense.fit(batches(x), nn.Identity())
    trained: nn.Module = defense._tracked["critic"]
    torch.manual_seed(0)
    real, fake, penalty = before.losses(critic, x[torch.randperm(4)])
    steps: list[tuple[nn.Module, nn.Module, Tensor]] = [(critic, trained, fake - real + 100 * penalty)]
    if critic_steps == 1:
        steps.append((before, defense, -trained(before.generate(torch.randn(4, 5))).mean()))
    for old, new, loss in steps:
        slopes = torch.autograd.grad(loss, list(old.parameters()), allow_unused=True)
        for was, now, slope in zip(old.parameters(), new.parameters(), slopes, strict=True):
            if slope is not None:  # the last bias of a critic has none
                clear = slope.abs() > 1e-4
                assert torch.allclose((now - was)[clear], -rate * slope.sign()[clear], rtol=0.02, atol=1e-6)
    assert (critic_steps == 1) != all(map(torch.equal, before.parameters(), defense.parameters()))


def test_every_fifth_critic_step_is_followed_by_a_generator_step_over_all_epochs() -> None:
    """Three batches an epoch: the generator moves in the second and the fourth, in a resumed fit too."""
    x = images(ODD, 12)
    moved = []
    for start in (0, 1, 3):
        defense = build()
        before = copy.deepcopy(defense.state_dict())
        for _ in defense.fit(batches(x, epochs=4, start=start), nn.Identity()):
            after = copy.deepcopy(defense.state_dict())
            moved.append(any(not torch.equal(before[name], after[name]) for name in before))
            before = after
    assert moved == [False, True, False, True] + [True, False, True] + [True]


def test_the_critic_is_no_part_of_the_weights_and_starts_from_the_seed_alone() -> None:
    defense = build()
    names = set(defense.state_dict())
    (_,) = defense.fit(batches(images(ODD)), nn.Identity())
    assert set(defense.state_dict()) == names and "critic" in defense.progress()
    torch.manual_seed(1)
    first = defense.critic(seed=4)
    torch.manual_seed(2)
    for one, other in zip(first.parameters(), defense.critic(seed=4).parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(next(first.parameters()), next(defense.critic(seed=5).parameters()))


# Inference: the descent on z.


def descent(defense: DefenseGAN, x: Tensor, z: Tensor, steps: int) -> list[float]:
    """Return the best error so far after each step: one image and one start, momentum by hand, in float64."""
    k, velocity, best = defense.inference_knobs, torch.zeros_like(z), [math.inf]
    for _ in range(steps + 1):
        z = z.detach().requires_grad_()
        error = sum((defense.generate(z[None])[0] - x).square().flatten()) / x.numel()
        assert isinstance(error, Tensor)
        best.append(min(best[-1], float(error)))
        velocity = k.momentum * velocity + torch.autograd.grad(error, z)[0]
        z = z - k.rate * velocity
    return best[1:]


def test_the_projection_is_the_best_of_each_images_own_descents() -> None:
    defense, x = build(rate=7.0, momentum=0.6, spread=0.8).double(), images(ODD).double()
    torch.manual_seed(3)
    starts = 0.8 * torch.randn(4, 3, 5, dtype=torch.float64)
    torch.manual_seed(3)
    errors = (defense.trajectory(x, range(5)) - x).square().flatten(2).mean(2)
    for n in range(4):
        best = [min(errors) for errors in zip(*(descent(defense, x[n], z, 4) for z in starts[n]), strict=True)]
        assert errors[:, n].tolist() == pytest.approx(best, rel=1e-9)
    assert bool((errors[-1] < errors[0]).all())


def test_the_trajectory_is_what_fewer_steps_would_have_given() -> None:
    defense, x = build(steps=9), images(ODD)
    torch.manual_seed(4)
    course = defense.trajectory(x, [5, 0, 9])
    for found, steps in ((course[0], 5), (course[2], 9)):
        torch.manual_seed(4)
        assert torch.equal(found, defense.at({"steps": steps, "restarts": 3}).purify(x))


def test_more_steps_and_more_restarts_never_raise_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x = build(rate=300.0), images(ODD)  # a rate at which the descent itself goes up and down
    planted = torch.randn(4, 6, 5)
    monkeypatch.setattr(defense, "_noise", lambda x_NCHW, restarts: planted[:, :restarts])
    errors = []
    for restarts in (1, 2, 6):
        course = defense.at({"steps": 8, "restarts": restarts, "rate": 300.0}).trajectory(x, range(9))
        errors.append((course - x).square().flatten(2).mean(2))
    errors_RLN = torch.stack(errors)
    assert bool((errors_RLN.diff(dim=1) <= 1e-7).all()) and bool((errors_RLN.diff(dim=0) <= 1e-7).all())
    assert bool((errors_RLN[0, -1] < errors_RLN[0, 0]).any())


def test_a_descent_that_diverges_keeps_what_it_had() -> None:
    defense, x = build(rate=1e4, momentum=0.999, spread=10.0), images(ODD)
    first, last = defense.trajectory(x, [0, 4])
    assert bool(last.isfinite().all())
    assert bool(((last - x).square().flatten(1).mean(1) <= (first - x).square().flatten(1).mean(1) + 1e-7).all())


def test_a_large_batch_descends_in_parts_that_nobody_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x = build(), images(ODD, 7)
    torch.manual_seed(5)
    whole = defense.trajectory(x, [2, 4])
    for rows in (1, 7):
        monkeypatch.setattr(defenses.defense_gan, "ROWS", rows)
        torch.manual_seed(5)
        assert torch.allclose(defense.trajectory(x, [2, 4]), whole, atol=1e-5)


def test_a_projection_leaves_no_gradient_anywhere_and_needs_none_outside() -> None:
    defense, x = build(), images(ODD).requires_grad_()
    torch.manual_seed(6)
    purified = defense.purify(x)
    assert not purified.requires_grad and x.grad is None
    assert all(p.requires_grad and p.grad is None for p in defense.parameters())
    with torch.no_grad():
        torch.manual_seed(6)
        assert torch.equal(defense.purify(x), purified)


def test_the_surrogate_has_the_value_of_the_projection_and_the_slope_of_the_tangent() -> None:
    defense, x = build().double(), images(ODD, 2).double().requires_grad_()
    torch.manual_seed(7)
    purified = defense.purify(x)
    torch.manual_seed(7)
    stand_in = defense.surrogate(x)
    assert torch.allclose(stand_in, purified, atol=1e-12)
    towards = torch.randn_like(stand_in)
    (slope,) = torch.autograd.grad((stand_in * towards).sum(), x)
    torch.manual_seed(7)
    (z_NZ,) = defense.latents(x, [4])
    for n in range(2):
        made: Tensor = torch.autograd.functional.jacobian(lambda z: defense.generate(z[None])[0], z_NZ[n])
        j = made.flatten(0, -2)
        gram = j.T @ j
        gram += 0.01 * gram.diagonal().mean() * torch.eye(5)
        expected = j @ gram.inverse() @ (j.T @ towards[n].flatten())
        assert torch.allclose(slope[n].flatten(), expected, rtol=1e-5, atol=1e-8)


def test_where_the_generator_is_flat_the_surrogate_has_no_slope() -> None:
    defense, x = build(DIGITS), images(DIGITS).requires_grad_()
    nn.init.zeros_(defense.dense.weight)
    (slope,) = torch.autograd.grad(defense.surrogate(x).sum(), x)
    assert not bool(slope.any())


def test_a_trained_generator_projects_digits_better_than_noise_of_the_same_pixels(
    fitted: DefenseGAN, digits: tuple[Tensor, Tensor]
) -> None:
    x = digits[0][1400:1440]
    scrambled = x.flatten(1).gather(1, torch.rand(40, 64).argsort(1)).view_as(x)
    near, far = (float((fitted.purify(given) - given).square().mean()) for given in (x, scrambled))
    assert near < 0.6 * far


def test_the_papers_space_trades_accuracy_for_latency_on_one_training() -> None:
    space = SearchSpace.of(DefenseGAN).narrow(spaces.named("defense_gan", "paper"))
    assert (space.trainings(), space.size()) == (1, 25)
    found = {(s.inference["steps"], s.inference["restarts"]) for s in space.grid()}
    assert {(200, 10), (400, 10), (200, 20), (400, 20)} <= found  # Defense-VAE's Table 4; 200, 20 is PuVAE's


def test_what_is_generated_from_an_images_latent_vector_is_what_it_is_purified_to() -> None:
    defense, x = build(), images(ODD).requires_grad_()
    torch.manual_seed(3)
    z = defense.latent(x)
    torch.manual_seed(3)
    assert torch.equal(defense.generate(z), defense.purify(x)) and z.shape == (4, 5) and not z.requires_grad
