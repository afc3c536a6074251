"""Diffusion purification against closed forms in float64, and gradients through all of its steps."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spaces
from attacks.gradient_view import BATCH, View
from defenses import diffusion
from defenses.base import Batches, Defended, Shape
from defenses.diffusion import SURROGATE_STEPS, Average, Diffusion, T, alpha_bars
from spaces.space import SearchSpace

DIGITS = Shape(1, 8, 8, 10)
SMALL = {"maps": 4, "levels": 2, "attention": 4, "embedding": 8, "batch_size": 16}
SCHEDULES = ["linear", "cosine"]


def build(shape: Shape = DIGITS, train: dict[str, Any] | None = None, **inference: Any) -> Diffusion:
    """Return a small defense whose network is not the zero that it begins as."""
    torch.manual_seed(0)
    defense = Diffusion({**SMALL, **(train or {})}, inference, shape)
    for weight in defense.parameters():
        nn.init.normal_(weight, std=0.2)
    return defense.eval().requires_grad_(False)


def images(n: int = 4, shape: Shape = DIGITS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, shape.channels, shape.height, shape.width, generator=generator)


class Predicting(nn.Module):
    """A network in place of the U-Net that computes the noise by a function of the image and the time."""

    def __init__(self, epsilon: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.epsilon, self.calls = epsilon, list[int]()

    def forward(self, x_NCHW: Tensor, t_N: Tensor) -> Tensor:
        assert t_N.shape == x_NCHW.shape[:1] and len(t_N.unique()) == 1
        self.calls += [int(t_N[0])] * len(t_N)
        return self.epsilon(x_NCHW, int(t_N[0]))


def predicting(epsilon: Callable[[Tensor, int], Tensor] = lambda x, t: 0 * x, **knobs: Any) -> Diffusion:
    train = {"schedule": knobs.pop("schedule", "linear")}
    defense = build(train=train, **knobs).double()
    defense.network = Predicting(epsilon)  # type: ignore[assignment]
    return defense


# The processes, against closed forms.


def betas(schedule: str) -> list[float]:
    """Return beta_1 to beta_T, from the papers."""
    if schedule == "linear":
        return torch.linspace(1e-4, 0.02, T, dtype=torch.float64).tolist()
    f = [math.cos((t / T + 0.008) / (1 + 0.008) * math.pi / 2) ** 2 for t in range(T + 1)]
    return [min(0.999, 1 - (f[t] / f[0]) / (f[t - 1] / f[0])) for t in range(1, T + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_noising_to_t_is_t_noisings_by_one(schedule: str) -> None:
    """Mean and variance of Eq. 4, against those of a chain of Eq. 2."""
    defense, shrunk, variance = predicting(schedule=schedule), 1.0, 0.0
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert defense.noised(one, 0, one).item() == 1
    for t, beta in enumerate(betas(schedule), start=1):
        shrunk, variance = shrunk * math.sqrt(1 - beta), variance * (1 - beta) + beta
        assert defense.noised(one, t, zero).item() == pytest.approx(shrunk, rel=1e-9)
        assert defense.noised(zero, t, one).item() == pytest.approx(math.sqrt(variance), rel=1e-12)
    assert shrunk < 0.01 and len(defense.alpha_bar) == T + 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("t", "s"), [(1, 0), (2, 1), (300, 299), (500, 400), (990, 10)])
def test_a_step_of_ddpm_is_the_posterior_by_bayes(schedule: str, t: int, s: int) -> None:
    """q(x_s | x_t, x_0) is the product of two Gaussians: q(x_t | x_s) as one of x_s, and q(x_s | x_0)."""
    x_0 = 2 * images().double() - 1
    noise = torch.randn(x_0.shape, dtype=torch.float64)
    bars = alpha_bars(schedule)
    x_t = math.sqrt(bars[t]) * x_0 + math.sqrt(1 - bars[t]) * noise
    exact = predicting(lambda x, at: noise, schedule=schedule, sampler="ddpm")
    mean, one = exact.step(x_t, t, s), torch.ones_like(x_0)
    deviation = exact.step(x_t, t, s, one) - mean
    if s == 0:
        torch.testing.assert_close(mean, x_0)
        assert float(deviation.abs().max()) == 0
        return
    ratio = bars[t] / bars[s]
    precisions = ratio / (1 - ratio), 1 / (1 - bars[s])
    means = x_t / math.sqrt(ratio), math.sqrt(bars[s]) * x_0
    variance = 1 / sum(precisions)
    torch.testing.assert_close(mean, variance * (precisions[0] * means[0] + precisions[1] * means[1]))
    torch.testing.assert_close(deviation, math.sqrt(variance) * one)


def test_ddim_without_noise_is_deterministic_and_its_step_can_be_taken_back() -> None:
    """On the exact network of a single image mu, which is linear."""
    mu = 0.5 * images(1).double()
    bars = alpha_bars("linear")
    defense = predicting(lambda x, t: (x - math.sqrt(bars[t]) * mu) / math.sqrt(1 - bars[t]), sampler="ddim", eta=0.0)
    x_t = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    for t, s in ((900, 400), (400, 1), (2, 1)):
        x_s = defense.step(x_t, t, s)
        assert torch.equal(x_s, defense.step(x_t, t, s)) and not torch.allclose(x_s, x_t)
        torch.testing.assert_close(defense.step(x_s, s, t), x_t)
    x = images().double()
    torch.testing.assert_close(defense.at({"t_star": 0.9, "sampler": "ddim"}).purify(x), (mu + 1).expand_as(x) / 2)


def test_eta_is_the_share_of_ddpms_noise() -> None:
    found, x = list[Tensor](), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    for knobs in ({"sampler": "ddim", "eta": 0.25}, {"sampler": "ddpm"}, {"sampler": "ddim", "eta": 1.0}):
        defense = predicting(**knobs)
        found.append(defense.step(x, 500, 300, torch.ones_like(x)) - defense.step(x, 500, 300))
    torch.testing.assert_close(4 * found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_values_beyond_the_range_of_images_are_clipped_in_each_step() -> None:
    defense = predicting(lambda x, t: -100 * torch.ones_like(x), sampler="ddim")
    x = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(defense.step(x, 500, 0), torch.ones_like(x))


# The settings of the inference.


def test_no_noise_leaves_the_image_as_it_is() -> None:
    defense, x = build(t_star=0.0, votes=8), images().requires_grad_()
    assert defense.purify(x) is x and defense.surrogate(x) is x
    assert not defense.stochastic and defense.gradients == ("exact",) and defense.candidates_each == 1
    classifier = nn.Flatten()
    assert torch.equal(defense.classify(x, classifier), classifier(x))
    assert build(t_star=0.0004).times() == [0] and build(t_star=0.0006).times() == [1, 0]


@pytest.mark.parametrize("t_star", [0.001, 0.003, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 100, T])
def test_times_fall_from_t_star_to_0(t_star: float, steps: int) -> None:
    times = build(t_star=t_star, steps=steps).times()
    assert times[0] == round(t_star * T) and times[-1] == 0
    assert len(times) == 1 + min(steps, times[0]) and all(t > s for t, s in pairwise(times))


def test_networks_are_asked_once_for_each_step_and_vote() -> None:
    """So the latency grows with the steps and the votes."""
    defense, x = predicting(), images(3).double()
    for steps, votes, guidance in ((1, 1, 0.0), (4, 1, 0.0), (4, 5, 1.0)):
        defense.at({"t_star": 0.2, "steps": steps, "votes": votes, "guidance": guidance})
        network: Predicting = defense.network  # type: ignore[assignment]
        network.calls.clear()
        defense.classify(x, nn.Flatten())
        assert sorted(network.calls, reverse=True) == [t for t in defense.times()[:-1] for _ in range(3 * votes)]
    knobs = {name for name, field in diffusion.Inference.__dataclass_fields__.items() if field.metadata["latency"]}
    assert {"t_star", "steps", "votes", "guidance"} <= knobs


def test_votes_are_the_mean_of_the_predictions_of_each_image() -> None:
    defense, x, classifier = build(t_star=0.3, votes=3), images(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    torch.manual_seed(5)
    logits = defense.classify(x, classifier)
    torch.manual_seed(5)
    each = torch.stack([classifier(defense.purify(one[None].expand(3, -1, -1, -1))).softmax(1).mean(0) for one in x])
    torch.testing.assert_close(logits.softmax(1), each)


@pytest.mark.parametrize("knobs", [{}, {"sampler": "ddim"}, {"guidance": 5.0}, {"sampler": "ddim", "guidance": 5.0}])
def test_an_image_is_purified_alike_in_batches_of_any_size(
    knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    defense, x, found = build(t_star=0.3, steps=3, **knobs), images(32), []
    for size in (256, 16):
        monkeypatch.setattr(diffusion, "BATCH", size)
        torch.manual_seed(3)
        found.append(defense.purify(x))
    torch.testing.assert_close(*found)
    assert float(found[0].min()) >= 0 and float(found[0].max()) <= 1


def test_guidance_pulls_towards_the_input() -> None:
    """By the share that the authors' code adds in a step of DDPM, and with a large scale all the way."""
    defense = build(t_star=0.036, steps=36, guidance=19.0)
    bars = alpha_bars("linear")
    for t, s in pairwise(defense.times()):
        mse_gradient, variance = 2 / (100 * 3072), 1 - bars[t] / bars[t - 1]
        scale = math.sqrt(1 - bars[t]) / (math.sqrt(bars[t]) * (8 * 2 / 255 / 3 / 60_000))
        assert defense.pull(t, s) == pytest.approx(variance * scale * mse_gradient, rel=0.02)
    x, apart = images().double(), []
    for guidance in (0.0, 2.0, 1e4):
        off = predicting(lambda x, t: 0 * x, t_star=0.5, steps=10, guidance=guidance)
        torch.manual_seed(0)
        apart.append(float((off.purify(x) - x).abs().mean()))
    assert apart[0] > apart[1] > apart[2]


# Gradients.


def slopes(defense: Diffusion, x: Tensor, purify: Callable[[Tensor], Tensor]) -> Tensor:
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    weights = torch.linspace(-1, 1, x.numel()).view_as(x)
    return torch.autograd.grad((purify(x) * weights).sum(), x)[0]


@pytest.mark.parametrize("knobs", [{}, {"sampler": "ddim", "eta": 0.5, "guidance": 2.0}])
def test_the_gradient_with_checkpoints_is_the_plain_one(knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x = build(t_star=0.4, steps=6, **knobs), images()
    found = slopes(defense, x, defense.purify)
    monkeypatch.setattr(diffusion, "checkpoint", lambda step, *args, **how: step(*args))
    expected = slopes(defense, x, defense.purify)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_gradient_is_exact() -> None:
    """Against differences, in float64, through a process of several steps that clips nothing."""
    defense, x = build(t_star=0.05, steps=4).double(), 0.4 + 0.2 * images(1).double()
    found = slopes(defense, x, defense.purify)
    weights, nudge = torch.linspace(-1, 1, x.numel()).view_as(x), 1e-6 * torch.randn(x.shape, dtype=torch.float64)

    def loss(x: Tensor) -> float:
        torch.manual_seed(2)
        return float((defense.purify(x) * weights).sum())

    assert float((found * nudge).sum()) == pytest.approx((loss(x + nudge) - loss(x - nudge)) / 2, rel=1e-4)


def test_memory_of_the_gradient_does_not_grow_by_the_networks_maps() -> None:
    """Tensors kept for the backward pass: of the networks none, of each further step less than three images."""
    kept = list[int]()

    def count(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.numel()
        return tensor

    x = images(8).requires_grad_()
    for steps in (10, 20):
        defense = build(t_star=0.4, steps=steps, sampler="ddim")
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            defense.purify(x)
    assert kept[1] - kept[0] <= 10 * 3 * x.numel()


def test_the_memory_that_an_attack_takes_is_what_the_gradient_keeps() -> None:
    """Against tensors counted: what is kept between steps of all rows, and the network's of one step and batch."""
    few, many = build(t_star=0.4, steps=10, votes=3), build(t_star=0.4, steps=20, votes=3)
    kept, x = list[int](), images(8).requires_grad_()
    for defense in (few, many):
        kept.append(0)

        def count(tensor: Tensor) -> Tensor:
            kept[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            defense.classify(x, nn.Flatten())
    one, other = few.memory(8), many.memory(8)
    assert other["maps"] == one["maps"] > 20 * x.nbytes and other["steps"] == 2 * one["steps"]
    assert 0.5 * one["steps"] <= kept[1] - kept[0] <= 1.5 * one["steps"]
    assert few.memory(300)["maps"] == few.memory(BATCH)["maps"] == BATCH / 24 * one["maps"]
    (said,) = many.remarks(x, torch.zeros(8))
    assert "MiB (256 images x 3 votes through 20 steps)" in said
    nothing = build(t_star=0.0)
    assert nothing.memory(8) == {} and nothing.remarks(x, torch.zeros(8)) == ()


def test_the_surrogate_takes_few_steps_and_has_a_slope_where_values_are_clipped() -> None:
    defense, x = predicting(t_star=0.5, steps=50), images().double()
    network: Predicting = defense.network  # type: ignore[assignment]
    defense.surrogate(x)
    assert len(network.calls) == SURROGATE_STEPS * len(x)
    assert defense.gradients == ("exact", "surrogate", "bpda")
    assert defense.at({"t_star": 0.5, "steps": SURROGATE_STEPS}).gradients == ("exact", "bpda")
    beyond = predicting(lambda x, t: -100 + 0 * x, t_star=0.5, steps=1)
    assert float(slopes(beyond, x, beyond.purify).abs().max()) == 0
    assert bool((slopes(beyond, x, beyond.surrogate) != 0).all())
    beyond.at({"t_star": 0.5, "steps": 1})
    assert torch.equal(beyond.purify(x), beyond.surrogate(x))


def test_eot_averages_the_votes_of_every_draw() -> None:
    defense, x = build(t_star=0.3, votes=2), images(2).requires_grad_()
    view = View(Defended(defense, nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), "exact", draws=3)
    assert view(x).shape == (2, 10)
    assert torch.autograd.grad(view(x)[:, 0].sum(), x)[0].abs().amax(dim=(1, 2, 3)).min() > 0


# Training.


def fit(defense: Diffusion, x: Tensor, start: int = 0, epochs: int = 3) -> Iterator[dict[str, float]]:
    labels = torch.zeros(len(x), dtype=torch.long)
    return defense.fit(Batches(x, labels, epochs, defense.train_knobs.batch_size, start=start), nn.Identity())


def test_the_loss_is_that_of_the_noise() -> None:
    """Before the first step the network returns zero, so the loss of one batch is the mean square of the noise."""
    x = images(16)
    (metrics,) = fit(Diffusion(SMALL, {}, DIGITS), x, epochs=1)
    torch.manual_seed(0)
    torch.randperm(16)
    torch.randint(1, T + 1, (16,))
    assert metrics["loss"] == pytest.approx(float(torch.randn(x.shape).square().mean()), rel=1e-5)


def test_it_learns_to_purify_digits(digits: tuple[Tensor, Tensor]) -> None:
    wishes = {**spaces.named("diffusion", "smoke"), "learning_rate": 5e-3}
    space = SearchSpace.of(Diffusion).narrow(wishes)
    torch.manual_seed(0)
    defense = Diffusion(space.setting(space.usual_of).train, {"t_star": 0.1, "steps": 3}, DIGITS)
    losses = [metrics["loss"] for metrics in fit(defense, digits[0][:1000])]
    defense.eval()
    x, bar = digits[0][1000:1200], defense.alpha_bar[100]
    with torch.no_grad():
        purified = defense.purify(x)
    noised = (x + math.sqrt((1 - bar) / bar) / 2 * torch.randn_like(x)).clamp(0, 1)
    assert losses[-1] < 0.3 and losses == sorted(losses, reverse=True)
    assert (purified - x).square().mean() < (noised - x).square().mean()


def test_purifying_uses_the_moving_average_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Tensor]()

    def record(self: torch.optim.Adam, *args: object) -> None:
        step(self)
        seen.append(torch.cat([weight.detach().flatten() for weight in self.param_groups[0]["params"]]))

    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", record)
    torch.manual_seed(0)
    defense = Diffusion({**SMALL, "ema": 0.5}, {}, DIGITS)
    average = torch.cat([weight.detach().flatten() for weight in defense.parameters()])
    for _ in fit(defense, images(48)):
        for number, weights in enumerate(seen, start=1):
            decay = min(0.5, (1 + number) / (10 + number))
            average = decay * average + (1 - decay) * weights if number > len(seen) - 3 else average
        found = torch.cat([weight.detach().flatten() for weight in defense.parameters()])
        torch.testing.assert_close(found, average)
        assert not torch.allclose(found, seen[-1], atol=1e-4)


def test_an_average_is_resumed_and_exchanged_bit_for_bit() -> None:
    networks = [nn.Linear(3, 2) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    one = Average(networks[0], 0.9)
    for _ in range(3):
        nn.init.normal_(networks[0].weight)
        one.update()
    torch.save(one.state_dict(), kept := io.BytesIO())
    kept.seek(0)
    other = Average(networks[1], 0.9)
    other.load_state_dict(torch.load(kept, weights_only=True))
    assert other.updates == 3 and all(map(torch.equal, one.others, other.others))
    before = networks[0].weight.detach().clone()
    one.exchange()
    assert torch.equal(networks[0].weight, other.others[0]) and torch.equal(one.others[0], before)


def test_a_resumed_fit_goes_on_with_the_weights_that_were_trained() -> None:
    """Bit for bit; the stored weights are the average, and the others are beside them."""
    x, whole = images(48), Diffusion(SMALL, {}, DIGITS)
    start = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    curve = list(fit(whole, x))
    half = Diffusion(SMALL, {}, DIGITS)
    half.load_state_dict(start)
    epochs = fit(half, x)
    next(epochs)
    torch.save(half.progress(), kept := io.BytesIO())
    kept.seek(0)
    resumed = Diffusion(SMALL, {}, DIGITS)
    resumed.resume(torch.load(kept, weights_only=True))
    assert list(fit(resumed, x, start=1)) == curve[1:]
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


# The named spaces.


def test_the_papers_network_builds_without_values_and_takes_a_step() -> None:
    space = SearchSpace.of(Diffusion).narrow(spaces.named("diffusion", "paper"))
    params = space.setting(space.usual_of)
    with torch.device("meta"):
        defense = Diffusion(params.train, {**params.inference, "t_star": 0.1}, Shape(3, 32, 32, 10))
        (metrics,) = [defense.step(torch.rand(2, 3, 32, 32), 100, 99)]
    assert metrics.shape == (2, 3, 32, 32) and len(defense.times()) == 101
    assert 50e6 < sum(weight.numel() for weight in defense.parameters()) < 80e6
