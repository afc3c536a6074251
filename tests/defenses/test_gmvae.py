"""GMVAE against the paper: its losses and limits against float64 loops, and what it does on real digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import defenses.gmvae
import spaces
from defenses.base import Batches, Shape
from defenses.gmvae import GMVAE, LOGIT_SCALE, RIDGE
from spaces.domain import extremes
from spaces.exceptions import InputError
from spaces.space import GRID_LIMIT, SearchSpace

MNIST, CIFAR, DIGITS = Shape(1, 28, 28, 10), Shape(3, 32, 32, 10), Shape(1, 8, 8, 10)
COIL, ODD = Shape(3, 128, 128, 100), Shape(2, 9, 13, 4)
SMALL = {"maps": 3, "dense": 16}
QUICK = {"maps": 8, "dense": 64, "batch_size": 32, "learning_rate": 3e-3}
NEVER = {"tau_enc": 1e9, "tau_dec": 1e9}
Digits = tuple[Tensor, Tensor]


def build(shape: Shape = DIGITS, inference: dict[str, object] | None = None, **train: object) -> GMVAE:
    torch.manual_seed(0)
    return GMVAE(SMALL | train, inference or {}, shape).eval()  # type: ignore[arg-type]


def images(shape: Shape, n: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, shape.channels, shape.height, shape.width, generator=generator)


def trained(given: Digits, **train: object) -> GMVAE:
    """Return a GMVAE fitted to digits."""
    torch.manual_seed(0)
    defense = GMVAE(QUICK | {"epochs": 12} | train, {}, DIGITS)  # type: ignore[arg-type]
    k = defense.train_knobs
    for _ in defense.fit(Batches(*given, epochs=k.epochs, batch_size=k.batch_size), nn.Identity()):
        pass
    return defense.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def split(digits: Digits) -> tuple[Digits, Digits]:
    """1,257 digits to train on and 540 others, shuffled: they lie sorted by writer."""
    order = torch.randperm(len(digits[0]), generator=torch.Generator().manual_seed(5))
    (x_NCHW, y_N), kept = (tensor[order] for tensor in digits), 1257
    return (x_NCHW[:kept], y_N[:kept]), (x_NCHW[kept:], y_N[kept:])


@pytest.fixture(scope="module")
def fitted(split: tuple[Digits, Digits]) -> GMVAE:
    return trained(split[0])


@pytest.fixture
def defense(fitted: GMVAE) -> GMVAE:
    """The fitted one at its default setting."""
    return fitted.at({})


def attacked(defense: GMVAE, given: Digits, eps: float) -> Tensor:
    """Return FGSM images against the encoder."""
    x_NCHW = given[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(defense.classify(x_NCHW, nn.Identity()), given[1]), x_NCHW)
    return (given[0] + eps * slope.sign()).clamp(0, 1)


# The architecture: section 4.


def test_the_default_architecture_is_the_papers() -> None:
    defense = GMVAE({}, {}, MNIST)
    layers = [
        [m.out_channels if isinstance(m, nn.Conv2d) else type(m).__name__ for m in part if not isinstance(m, nn.ReLU)]
        for part in (defense.down, defense.up)
    ]
    assert layers == [
        [32, 32, "MaxPool2d", 64, 64, "MaxPool2d", 64, 64, "MaxPool2d"],
        ["Upsample", 64, 64, "Upsample", 64, 32, "Upsample", 32, 1, "Sigmoid"],
    ]
    assert all(m.kernel_size == (3, 3) for m in defense.modules() if isinstance(m, nn.Conv2d))
    # By hand from the layer list: weights and biases.
    same = 9 * 64 * 64 + 64
    encoder = (9 * 1 * 32 + 32) + (9 * 32 * 32 + 32) + (9 * 32 * 64 + 64) + 3 * same + (64 * 9 + 1) * 128 + 129 * 10
    decoder = 11 * 128 + 129 * 64 * 9 + 3 * same + (9 * 64 * 32 + 32) + (9 * 32 * 32 + 32) + (9 * 32 * 1 + 1)
    assert sum(p.numel() for p in defense.parameters()) == encoder + decoder


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (MNIST, [(3, 3), (7, 7), (14, 14), (28, 28)]),
        (CIFAR, [(4, 4), (8, 8), (16, 16), (32, 32)]),
        (DIGITS, [(1, 1), (2, 2), (4, 4), (8, 8)]),
        (ODD, [(1, 1), (2, 3), (4, 6), (9, 13)]),
        (COIL, [(16, 16), (32, 32), (64, 64), (128, 128)]),
    ],
    ids=str,
)
def test_the_decoder_grows_through_the_sizes_that_the_encoder_shrinks_through(
    shape: Shape, sizes: list[tuple[int, int]]
) -> None:
    defense, seen = build(shape), list[tuple[int, int]]()
    for part in (*defense.down, *defense.up):
        if isinstance(part, nn.MaxPool2d | nn.Upsample):
            part.register_forward_hook(lambda part, args, out: seen.append(tuple(out.shape[2:])))
    x = images(shape, 2)
    purified = defense.purify(x)
    assert seen == [*sizes[-2::-1], *sizes[1:]]
    assert purified.shape == x.shape and purified.dtype == x.dtype
    assert defense.classify(x, nn.Identity()).shape == (2, shape.classes)


@pytest.mark.parametrize(
    ("shape", "train", "says"),
    [
        (COIL, {"latent": 32}, "latent must be 0 or at least the number of classes, 100, but is 32"),
        (Shape(1, 7, 28, 10), {}, "sides must be at least 8, but are 7x28"),
    ],
    ids=str,
)
def test_a_bad_combination_is_refused_with_its_law(shape: Shape, train: dict[str, int], says: str) -> None:
    with torch.device("meta"), pytest.raises(InputError, match=says):
        GMVAE(train, {}, shape)


def test_the_means_are_one_hot_and_padded_with_zeros() -> None:
    assert torch.equal(build(ODD).means_KL, torch.eye(4))
    means_KL = build(ODD, latent=7).means_KL
    assert means_KL.shape == (4, 7)
    assert torch.equal(means_KL[:, :4], torch.eye(4)) and not bool(means_KL[:, 4:].any())


# Training: sections 3.2 and 3.3.


def loops(defense: GMVAE, x: Tensor, y: Tensor, epsilon: Tensor) -> tuple[float, float]:
    """Eq. 7 and Eq. 3, number by number in float64, on what the networks emit; -1 is an unknown label."""
    alpha, classes = defense.train_knobs.alpha, defense.shape.classes
    f = defense.encode(x)
    g, f_rows = defense.decode(f + epsilon).double(), f.double().tolist()
    rc, known, unknown = [], [], []
    for n in range(len(x)):
        pairs = zip(x[n].double().flatten().tolist(), g[n].flatten().tolist(), strict=True)
        rc.append(sum((a - b) ** 2 for a, b in pairs))
        square = [sum((v - float(d == c)) ** 2 for d, v in enumerate(f_rows[n])) for c in range(classes)]
        if y[n] >= 0:
            known.append(alpha * square[int(y[n])])
        else:
            unknown.append(-math.log(sum(math.exp(-alpha * s) for s in square)))
    return sum(rc) / len(rc), sum(sum(terms) / len(terms) for terms in (known, unknown) if terms)


@pytest.mark.parametrize(
    "y", [[0, 1, 2, 3, 0, 1], [-1] * 6, [-1, 2, -1, -1, 0, -1]], ids=["Eq. 7", "Eq. 3", "semi-supervised"]
)
@pytest.mark.parametrize("latent", [0, 7])
def test_each_loss_is_the_papers_equation(y: list[int], latent: int) -> None:
    defense, x = build(ODD, alpha=2.5, latent=latent, latent_variance=0.3), images(ODD)
    torch.manual_seed(3)
    found = [float(loss.detach()) for loss in defense.losses(x, torch.tensor(y))]
    torch.manual_seed(3)
    epsilon = math.sqrt(0.3) * torch.randn(6, latent or 4)
    assert found == pytest.approx(loops(defense, x, torch.tensor(y), epsilon), rel=1e-4)


def test_the_training_noise_has_the_stated_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x = build(), images(DIGITS, 3000)
    decoded = list[Tensor]()
    errors = GMVAE.errors

    def spy(self: GMVAE, x_NCHW: Tensor, z_NL: Tensor) -> Tensor:
        decoded.append(z_NL)
        return errors(self, x_NCHW, z_NL)

    monkeypatch.setattr(GMVAE, "errors", spy)
    defense.losses(x, torch.zeros(3000, dtype=torch.long))
    noise = (decoded[0] - defense.encode(x)).detach()
    assert noise.var(dim=0).mean() == pytest.approx(1 / 3000, rel=0.03) and abs(noise.mean()) < 1e-3


@pytest.mark.parametrize("y", [[0, 1, 2, 3, 0, 1], [-1] * 6], ids=["Eq. 7", "Eq. 3"])
def test_a_variable_entropy_adds_what_the_fixed_one_drops(y: list[int]) -> None:
    defense, x = build(ODD, alpha=2.5, latent=7, variable_entropy=True), images(ODD)
    f, variance = defense.posterior(x)
    assert f.shape == variance.shape == (6, 7) and torch.equal(f, defense.encode(x)) and bool((variance > 0).all())
    torch.manual_seed(3)
    found = [float(loss.detach()) for loss in defense.losses(x, torch.tensor(y))]
    torch.manual_seed(3)
    rc, prior = loops(defense, x, torch.tensor(y), variance.sqrt() * torch.randn(6, 7))
    rows = variance.double().tolist()
    more = sum(2.5 * v - math.log(v) / 2 for row in rows for v in row) / 6  # of H(Q, P), and -H(Q)
    assert found == pytest.approx([rc, prior + more], rel=1e-4)


def test_the_encoder_emits_its_variance_in_the_same_network_otherwise_and_starts_at_the_fixed_one() -> None:
    fixed, variable = build(), build(variable_entropy=True, latent_variance=0.01)
    assert GMVAE({}, {}, DIGITS).train_knobs.variable_entropy is False
    sizes = [{name: value.numel() for name, value in one.state_dict().items()} for one in (fixed, variable)]
    grown = {name for name in sizes[0] if sizes[0][name] != sizes[1][name]}
    assert grown == {"to_latent.2.weight", "to_latent.2.bias"}
    variance = variable.posterior(images(DIGITS, 50))[1].detach()
    assert float(variance.log().mean()) == pytest.approx(math.log(0.01), abs=2) and float(variance.std()) > 0
    assert torch.equal(fixed.posterior(images(DIGITS))[1], torch.full((6, 10), 1 / 3000))


def test_a_variable_entropy_learns_the_digits_too(split: tuple[Digits, Digits]) -> None:
    defense, (x, y) = trained(split[0], variable_entropy=True), split[1]
    assert float((defense.classify(x, nn.Identity()).argmax(1) == y).float().mean()) >= 0.8
    assert not defense.stochastic and torch.equal(defense.purify(x[:4]), defense.decode(defense.encode(x[:4])))


def test_there_is_no_noise_at_inference() -> None:
    defense, x = build(latent_variance=1.0), images(DIGITS)
    before = torch.get_rng_state()
    assert torch.equal(defense.purify(x), defense.decode(defense.encode(x))) and not defense.stochastic
    defense.suspicion(x)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("labels", [0, 1, 3, 100])
def test_the_training_sees_the_first_labels_of_each_class(labels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x = build(ODD, labels_per_class=labels), images(ODD, 40)
    y = torch.randint(4, (40,), generator=torch.Generator().manual_seed(2))
    expected, count = list[int](), [0] * 4
    for label in y.tolist():
        count[label] += 1
        expected.append(label if labels == 0 or count[label] <= labels else -1)
    assert defense.seen(y).tolist() == expected
    shown = dict[float, int]()
    losses = GMVAE.losses

    def spy(self: GMVAE, x_NCHW: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
        shown.update(zip(x_NCHW[:, 0, 0, 0].tolist(), y_N.tolist(), strict=True))
        return losses(self, x_NCHW, y_N)

    monkeypatch.setattr(GMVAE, "losses", spy)
    (metrics,) = defense.fit(Batches(x, y, epochs=1, batch_size=16), nn.Identity())
    assert [shown[pixel] for pixel in x[:, 0, 0, 0].tolist()] == expected
    assert metrics["loss"] == pytest.approx(metrics["rc"] + metrics["prior"])


def test_ten_labels_a_class_are_enough_to_learn_most_digits(split: tuple[Digits, Digits]) -> None:
    defense, (x, y) = trained(split[0], labels_per_class=10), split[1]
    assert float((defense.classify(x, nn.Identity()).argmax(1) == y).float().mean()) >= 0.65


# Thresholds: section 3.4.


@pytest.mark.parametrize(("latent", "quantile"), [(10, 26.90), (32, 58.75), (100, 143.85)])
def test_the_limit_of_the_encoder_is_the_papers_chi_square_quantile(latent: int, quantile: float) -> None:
    assert build(latent=latent).quantile == pytest.approx(quantile, abs=0.005)
    assert build(latent=latent).quantile == pytest.approx(scipy.stats.chi2.ppf(0.9973, latent), rel=1e-9)


def test_suspicion_is_the_mahalanobis_distance_and_the_sigmas_of_the_error(
    defense: GMVAE, split: tuple[Digits, Digits]
) -> None:
    (x_train, y_train), (x, _) = split
    f, mu = defense.encode(x_train).double().numpy(), np.eye(10)
    errors = ((x_train - defense.decode(defense.encode(x_train))).double() ** 2).flatten(1).sum(1).numpy()
    inverse = []
    for label in range(10):
        off = f[y_train.numpy() == label] - mu[label]
        covariance = sum(np.outer(row, row) for row in off) / len(off)
        inverse.append(np.linalg.inv(covariance + RIDGE * np.trace(covariance) / 10 * np.eye(10)))
    codes, images = defense.encode(x[:40]), x[:40]
    found = defense.suspicion(images)
    for n, z in enumerate(codes.double().numpy()):
        label = int(np.argmin(((z - mu) ** 2).sum(1)))
        distance = (z - mu[label]) @ inverse[label] @ (z - mu[label])
        error = float(((images[n] - defense.decode(codes[n : n + 1])[0]).double() ** 2).sum())
        by_hand = [distance / scipy.stats.chi2.ppf(0.9973, 10), (error - errors.mean()) / errors.std()]
        assert found[n].tolist() == pytest.approx(by_hand, rel=1e-3, abs=1e-4)


def test_an_image_without_a_label_counts_for_the_nearest_mean(defense: GMVAE, split: tuple[Digits, Digits]) -> None:
    x, nearest = split[0][0], defense.distances(defense.encode(split[0][0])).argmin(1)
    state = {name: tensor.clone() for name, tensor in defense.state_dict().items()}
    found = []
    for y in (nearest, torch.full_like(nearest, -1)):
        defense.calibrate(Batches(x, y, epochs=1, batch_size=32))
        found.append(defense.precision_KLL.clone())
    defense.load_state_dict(state)
    assert torch.equal(*found) and not torch.equal(found[0], state["precision_KLL"])


def test_what_is_taken_for_a_class_without_images_is_rejected() -> None:
    defense, x = build(ODD).requires_grad_(False), images(ODD)
    nearest = int(defense.distances(defense.encode(x[:1])).argmin())
    defense.calibrate(Batches(x, torch.full((6,), (nearest + 1) % 4), epochs=1, batch_size=6))
    assert float(defense.suspicion(x[:1])[0, 0]) > 1e3


def test_it_classifies_digits_and_rejects_noise(defense: GMVAE, split: tuple[Digits, Digits]) -> None:
    (x, y), noise = split[1], images(DIGITS, 200)
    assert float((defense.classify(x, nn.Identity()).argmax(1) == y).float().mean()) >= 0.9
    assert float(defense.accept(x).float().mean()) >= 0.7
    assert float(defense.accept(noise).float().mean()) <= 0.05
    right = defense.classify(x, nn.Identity()).argmax(1) == y
    assert float(right[defense.accept(x)].float().mean()) > float(right.float().mean())
    defense.at(NEVER)
    assert bool(defense.accept(x).all() & defense.accept(noise).all())


def test_logits_fall_with_the_squared_distance_and_leave_every_image_a_gradient(
    defense: GMVAE, split: tuple[Digits, Digits]
) -> None:
    x, y = split[1]
    x = x.clone().requires_grad_()
    logits = defense.classify(x, nn.Identity())
    squares = (defense.encode(x)[:, None] - torch.eye(10)).square().sum(2)
    assert torch.allclose(logits, -LOGIT_SCALE * squares, atol=1e-5)
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
    assert float(slope.flatten(1).abs().amax(1).min()) > 1e-8


# Reclassification: section 3.5.


def test_no_start_ends_worse_than_it_began(defense: GMVAE, split: tuple[Digits, Digits]) -> None:
    x = split[1][0][:30]
    at_means = torch.stack([defense.errors(x, mean.expand(30, -1)) for mean in defense.means_KL], dim=1)
    least = at_means.amin(1)
    for steps in (1, 10, 30):
        for rate in (3e-3, 1.0):  # the latter overshoots
            defense.at({"reclassify": True, "reclassify_steps": steps, "reclassify_rate": rate})
            assert bool((defense.errors(x, defense.recode(x)) <= least + 1e-5).all())
    defense.at({"reclassify": True})
    assert float(defense.errors(x, defense.recode(x)).mean()) < 0.9 * float(least.mean())


def test_images_are_reclassified_as_if_one_by_one(
    defense: GMVAE, split: tuple[Digits, Digits], monkeypatch: pytest.MonkeyPatch
) -> None:
    defense.at({"reclassify": True})
    x = split[1][0][:12]
    together = defense.recode(x)
    assert torch.allclose(together, torch.cat([defense.recode(one) for one in x.split(1)]), atol=1e-4)
    whole = defense.codes(x)
    monkeypatch.setattr(defenses.gmvae, "PIXELS", 2 * 10 * 64)  # two images at once
    assert torch.allclose(whole, defense.codes(x), atol=1e-4)


def test_the_best_of_all_starts_is_found(defense: GMVAE) -> None:
    """What the decoder draws close to a mean is reclassified as that mean's class, whatever the encoder says."""
    x = defense.decode(defense.means_KL + 0.02)
    defense.at({"reclassify": True, "doubt_enc": 0.0})
    assert defense.classify(x, nn.Identity()).argmax(1).tolist() == list(range(10))


def test_reclassification_recovers_attacked_digits(defense: GMVAE, split: tuple[Digits, Digits]) -> None:
    given = split[1][0][:150], split[1][1][:150]
    x = attacked(defense, given, eps=0.12)
    rejected, right = ~defense.accept(x), defense.classify(x, nn.Identity()).argmax(1) == given[1]
    defense.at({"reclassify": True})
    again = defense.classify(x, nn.Identity()).argmax(1) == given[1]
    assert torch.equal(again[~rejected], right[~rejected])
    assert float(again[rejected].float().mean()) > 0.15 + float(right[rejected].float().mean())


def test_only_doubted_images_get_another_code(defense: GMVAE, split: tuple[Digits, Digits]) -> None:
    x = torch.cat((split[1][0][:40], images(DIGITS, 10)))
    first, f = defense.suspicion(x), defense.encode(x)
    defense.at({"reclassify": True})
    found, codes, z = defense.suspicion(x), defense.codes(x), defense.recode(x)
    doubted = (first > torch.tensor([1.0, 3.0])).any(1)
    assert 0 < int(doubted.sum()) < 50
    assert torch.equal(found[~doubted], first[~doubted]) and torch.equal(codes[~doubted], f[~doubted])
    assert torch.allclose(codes[doubted], z[doubted], atol=1e-4)
    assert torch.allclose(defense.purify(x)[doubted], defense.decode(z)[doubted], atol=1e-4)
    sigmas = (defense.errors(x, z) - defense.error_mean) / defense.error_sigma
    assert torch.allclose(found[doubted, 1], sigmas[doubted].float(), atol=1e-3)
    for limits in ({"tau_enc": 0.0, "tau_dec": -10.0}, NEVER):  # doubt has limits of its own
        assert torch.equal(defense.at({"reclassify": True, **limits}).suspicion(x), found)
    assert torch.equal(defense.at({"reclassify": True, "doubt_enc": 1e9, "doubt_dec": 1e9}).codes(x), f)


def test_a_reclassified_image_has_the_encoders_gradient(split: tuple[Digits, Digits], fitted: GMVAE) -> None:
    """Between two logits, that is: all of one image share a term, which no loss on logits sees."""
    found = []
    for inference in ({}, {"reclassify": True, "doubt_dec": -10.0, "doubt_enc": 0.0}):
        x = split[1][0][:5].clone().requires_grad_()
        logits = fitted.at(inference).classify(x, nn.Identity())
        margin = logits[:, 0] - logits[:, 1]
        found.append((margin.detach(), torch.autograd.grad(margin.sum(), x)[0]))
    (value, slope), (other_value, other_slope) = found
    assert torch.allclose(slope, other_slope, atol=1e-5) and bool((slope.flatten(1).abs().amax(1) > 0).all())
    assert not torch.allclose(value, other_value, atol=1e-2)


def test_the_search_for_a_code_leaves_no_gradient_behind(split: tuple[Digits, Digits]) -> None:
    defense = build(inference={"reclassify": True, "doubt_dec": -10.0, "reclassify_steps": 2})
    with torch.no_grad():
        defense.purify(split[1][0][:3])
    assert all(p.grad is None and p.requires_grad for p in defense.parameters())


# Named spaces.


@pytest.mark.parametrize("name", spaces.names("gmvae"))
def test_each_space_can_be_built_and_has_its_thresholds_scored_whole(name: str) -> None:
    declared = SearchSpace.of(GMVAE)
    space = declared.narrow(spaces.named("gmvae", name))
    inference = SearchSpace({}, space.inference, space.defaults)
    assert 0 < (inference.size() or 0) <= GRID_LIMIT
    if name in ("default", "smoke"):
        assert {setting.inference["reclassify"] for setting in inference.grid()} == {False}
    usual = {knob: space.usual_of(knob, domain) for knob, domain in space.train.items()}
    for shape in (DIGITS, MNIST, COIL) if name != "paper_svhn" else (CIFAR,):
        for knob, domain in space.train.items():
            for value in extremes(domain):
                with torch.device("meta"):
                    GMVAE(usual | {knob: value}, space.usual(), shape)
