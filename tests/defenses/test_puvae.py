"""PuVAE against the paper: each loss against a float64 loop, the fast inference against the slow one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from defenses.base import Batches, Metrics, Shape
from defenses.puvae import SOFT_CHOICE, PuVAE, rmse

MNIST, CIFAR, DIGITS = Shape(1, 28, 28, 10), Shape(3, 32, 32, 10), Shape(1, 8, 8, 10)
ODD = Shape(2, 9, 13, 4)
ONLY_KL = {"lambda_rc": 0.0, "lambda_kl": 1.0, "lambda_ce": 0.0}
SMALL = {"conv_maps": 3, "decoder_maps": 4, "dense": 16, "latent": 5}


def build(shape: Shape = MNIST, sigma_eps: float = 0.1, **train: object) -> PuVAE:
    torch.manual_seed(0)
    return PuVAE(SMALL | train, {"sigma_eps": sigma_eps}, shape).eval()  # type: ignore[arg-type]


def images(shape: Shape, n: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, shape.channels, shape.height, shape.width, generator=generator)


def test_the_default_architecture_is_table_2() -> None:
    defense = PuVAE({}, {}, MNIST)
    convolutions = [m for m in defense.trunk if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, m.kernel_size, m.dilation) for m in convolutions] == [(32, (7, 7), (2, 2))] * 3
    assert [m.out_features for m in (defense.dense_1, defense.dense_2, defense.dense_3)] == [1024, 1024, 64]
    assert defense.dense_4.out_features == 512
    deconvolutions = [m for m in defense.deconvolutions if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.out_channels, m.kernel_size, m.stride) for m in deconvolutions] == [
        (32, (7, 7), (2, 2)),
        (32, (7, 7), (2, 2)),
        (1, (7, 7), (2, 2)),
    ]
    # By hand from the layer list: weights and biases, the one-hot label beside the features and beside z.
    encoder = (49 * 32 + 32) + 2 * (49 * 32 * 32 + 32) + (32 * 784 + 10 + 1) * 1024 + 1025 * 1024 + 1025 * 64
    decoder = (32 + 10 + 1) * 512 + 2 * (49 * 32 * 32 + 32) + (49 * 32 + 1)
    assert sum(p.numel() for p in defense.parameters()) == encoder + decoder


@pytest.mark.parametrize("shape", [MNIST, CIFAR, DIGITS, ODD], ids=str)
@pytest.mark.parametrize("injection", ["dense", "planes"])
def test_purified_images_keep_shape_dtype_and_range(shape: Shape, injection: str) -> None:
    x = images(shape)
    purified = build(shape, label_injection=injection).purify(x).detach()
    assert purified.shape == x.shape and purified.dtype == x.dtype
    assert 0 <= float(purified.min()) and float(purified.max()) <= 1


class Recorder(nn.Module):
    """A source classifier that keeps the images it was shown."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.map = nn.Linear(2 * 9 * 13, classes)
        self.shown = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.shown = x.detach()
        return self.map(x.flatten(1)) * 3


def loops(defense: PuVAE, source: Recorder, x: Tensor, y: Tensor, reduction: str) -> tuple[float, float, float]:
    """Eq. 15, 16 and 18, number by number in float64, on what the network emitted."""
    one_hot = nn.functional.one_hot(y, 4).float()
    mu, sigma = (t.double() for t in defense.encode(x, one_hot))
    x_hat, y_s = source.shown.double(), source(source.shown).double().softmax(1)
    rc, kl, ce = [], [], []
    for n in range(len(x)):
        pairs = list(zip(x[n].double().flatten().tolist(), x_hat[n].flatten().tolist(), strict=True))
        rc.append([-a * math.log(b) - (1 - a) * math.log(1 - b) for a, b in pairs])
        latents = zip(mu[n].tolist(), sigma[n].tolist(), strict=True)
        kl.append([m**2 + s**2 - math.log(s**2) - 1 for m, s in latents])
        labels = zip(one_hot[n].tolist(), y_s[n].tolist(), strict=True)
        ce.append([-t * math.log(p) - (1 - t) * math.log(1 - p) for t, p in labels])
    per_image: Callable[[list[float]], float] = sum if reduction == "sum" else (lambda v: sum(v) / len(v))
    rc_mean, kl_mean, ce_mean = (sum(map(per_image, term)) / len(term) for term in (rc, kl, ce))
    return rc_mean, kl_mean, ce_mean


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("injection", ["dense", "planes"])
def test_each_loss_is_the_papers_equation(reduction: str, injection: str) -> None:
    defense = build(ODD, reduction=reduction, label_injection=injection)
    source, x, y = Recorder(4), images(ODD), torch.tensor([0, 1, 2, 3, 0, 1])
    rc, kl_L, ce = (loss.detach() for loss in defense.losses(x, y, source))
    found = [float(rc), float(kl_L.sum() if reduction == "sum" else kl_L.mean()), float(ce)]
    assert found == pytest.approx(loops(defense, source, x, y, reduction), rel=1e-4)


def test_the_total_loss_weighs_the_three_terms() -> None:
    """One SGD-like check of Eq. 19: the reported loss is the weighted sum of the reported terms."""

    defense = build(ODD, lambda_rc=2.0, lambda_kl=3.0, lambda_ce=5.0)
    batches = Batches(images(ODD), torch.tensor([0, 1, 2, 3, 0, 1]), epochs=1, batch_size=6)
    (metrics,) = defense.fit(batches, Recorder(4))
    assert metrics["loss"] == pytest.approx(2 * metrics["rc"] + 3 * metrics["kl"] + 5 * metrics["ce"], rel=1e-5)


@pytest.mark.parametrize("shape", [MNIST, ODD], ids=str)
@pytest.mark.parametrize("injection", ["dense", "planes"])
def test_the_fast_inference_equals_the_loop_over_classes(shape: Shape, injection: str) -> None:
    defense = build(shape, sigma_eps=0.7, label_injection=injection)
    x = images(shape)
    noise = torch.randn(len(x), shape.classes, SMALL["latent"], generator=torch.Generator().manual_seed(2))
    fast = defense.candidates(x, noise)
    for label in range(shape.classes):
        y = nn.functional.one_hot(torch.full((len(x),), label), shape.classes).float()
        mu, sigma = defense.encode(x, y)
        slow = defense.decode(mu + 0.7 * noise[:, label] * sigma, y).sigmoid()
        assert torch.allclose(fast[:, label], slow, atol=1e-5)


def test_without_noise_the_purifier_is_deterministic_and_ignores_the_batch_size() -> None:
    defense, x = build(sigma_eps=0.0), images(MNIST, 8)
    assert not defense.stochastic
    assert torch.equal(defense.purify(x), defense.purify(x))
    assert torch.allclose(defense.purify(x), torch.cat([defense.purify(one) for one in x.split(1)]), atol=1e-6)


def test_noise_makes_it_stochastic_and_a_seed_repeats_it() -> None:
    defense, x = build(sigma_eps=10.0), images(MNIST)
    assert defense.stochastic
    first, second = defense.candidates(x), defense.candidates(x)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    third = defense.candidates(x)
    torch.manual_seed(5)
    assert torch.equal(third, defense.candidates(x))


def test_the_candidate_with_least_rmse_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x = build(), images(MNIST)
    planted = torch.rand(6, 10, 1, 28, 28, generator=torch.Generator().manual_seed(4))
    nearest = [3, 1, 4, 1, 5, 9]
    for n, label in enumerate(nearest):
        planted[n, label] = (x[n] + 0.05).clamp(0, 1)
    monkeypatch.setattr(defense, "candidates", lambda x_NCHW: planted)
    expected = torch.stack([planted[n, label] for n, label in enumerate(nearest)])
    assert torch.equal(defense.purify(x), expected)


def test_rmse_is_the_root_of_the_mean_square() -> None:
    x = images(ODD, 2)
    others = torch.rand(2, 4, 2, 9, 13, generator=torch.Generator().manual_seed(6))
    by_hand = [[math.sqrt(((others[n, k] - x[n]).double() ** 2).mean()) for k in range(4)] for n in range(2)]
    assert torch.allclose(rmse(x, others).double(), torch.tensor(by_hand, dtype=torch.float64), atol=1e-6)


def test_a_gradient_reaches_the_input_exactly_and_through_the_surrogate() -> None:
    defense = build(sigma_eps=0.0)
    for path in (defense.purify, defense.surrogate):
        x = images(MNIST).requires_grad_()
        (slope,) = torch.autograd.grad(path(x).square().sum(), x)
        assert bool((slope.flatten(1).abs().amax(1) > 0).all())


def test_the_surrogate_is_the_choice_where_one_candidate_is_much_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x = build(), images(MNIST)
    planted = torch.ones(6, 10, 1, 28, 28)
    planted[:, 7] = x
    monkeypatch.setattr(defense, "candidates", lambda x_NCHW: planted)
    assert torch.allclose(defense.surrogate(x), defense.purify(x), atol=1e-4)


@pytest.mark.parametrize("injection", ["dense", "planes"])
def test_the_strain_is_how_far_the_labels_candidate_is_behind(injection: str) -> None:
    defense = build(ODD, sigma_eps=0.0, label_injection=injection).double()
    x, y = images(ODD).double(), [0, 1, 2, 3, 0, 1]
    by_hand = []
    for n, label in enumerate(y):
        candidates = defense.candidates(x[n : n + 1])[0].tolist()
        pixels = x[n].flatten().tolist()
        distances = []
        for candidate in candidates:
            pairs = zip(torch.tensor(candidate, dtype=torch.float64).flatten().tolist(), pixels, strict=True)
            distances.append(math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(pixels)))
        by_hand.append((distances[label] - min(d for k, d in enumerate(distances) if k != label)) / SOFT_CHOICE)
    x.requires_grad_()
    strain = defense.strain(x, torch.tensor(y))
    assert strain.tolist() == pytest.approx(by_hand, rel=1e-6, abs=1e-9)
    (slope,) = torch.autograd.grad(strain.sum(), x)
    assert bool((slope.flatten(1).abs().amax(1) > 0).all())
    chosen = rmse(x, defense.candidates(x)).argmin(1)
    assert torch.equal(strain > 0, chosen != torch.tensor(y))


def fitted(start: int = 0, **train: float) -> list[Metrics]:
    defense, x, y = build(ODD, epochs=2, batch_size=4, **train), images(ODD, 12), torch.arange(12) % 4
    return list(defense.fit(Batches(x, y, epochs=2, batch_size=4, start=start), Recorder(4)))


def test_the_weight_of_the_kl_rises_over_the_first_share_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all losses one, the loss is the sum of the weights: of 2 epochs of 3 steps, half rise."""

    def ones(defense: PuVAE, *_: object) -> tuple[Tensor, Tensor, Tensor]:
        one = defense.dense_4.weight.sum() * 0 + 1
        return one, one[None], one

    monkeypatch.setattr(PuVAE, "losses", ones)

    def losses(start: int = 0, **train: float) -> list[float]:
        epochs = fitted(start, **ONLY_KL | {"lambda_kl": 6.0}, **train)
        return [epoch["loss"] for epoch in epochs]

    assert losses(kl_warmup=1.0) == pytest.approx([(1 + 2 + 3) / 3, (4 + 5 + 6) / 3])
    assert losses(kl_warmup=0.5) == pytest.approx([(2 + 4 + 6) / 3, 6])
    assert losses() == [6, 6]
    assert losses(1, kl_warmup=1.0) == pytest.approx([(4 + 5 + 6) / 3])  # resumed


def test_free_nats_are_counted_in_each_dimension_over_the_batch() -> None:
    defense, x, y = build(ODD, free_nats=0.107, **ONLY_KL), images(ODD), torch.arange(6) % 4
    mu, sigma = (t.double() for t in defense.encode(x, nn.functional.one_hot(y, 4).float()))
    nats_L = [0.0] * 5
    for n in range(6):
        for i, (m, s) in enumerate(zip(mu[n].tolist(), sigma[n].tolist(), strict=True)):
            nats_L[i] += (m**2 + s**2 - math.log(s**2) - 1) / 2 / 6
    (metrics,) = defense.fit(Batches(x, y, epochs=1, batch_size=6), Recorder(4))
    assert metrics["loss"] == pytest.approx(sum(2 * max(0.107, each) for each in nats_L), rel=1e-4)
    assert metrics["kl"] == pytest.approx(2 * sum(nats_L), rel=1e-4)  # what is reported is the divergence itself
    assert min(nats_L) < 0.107 < max(nats_L), nats_L


def test_a_collapsed_posterior_is_remarked() -> None:
    defense, x, y = build(ODD), images(ODD), torch.arange(6) % 4
    with torch.no_grad():
        defense.dense_3.weight.zero_()
        defense.dense_3.bias.copy_(torch.tensor([1.0] * 5 + [math.log(math.e - 1)] * 5))  # 0.5 nats a dimension
        assert defense.remarks(x, y) == ()
        defense.dense_3.bias[:5] = 0
    (remark,) = defense.remarks(x, y)
    assert "collapsed (0.00 nats" in remark
