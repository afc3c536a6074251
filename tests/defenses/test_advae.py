"""AdvAE against the paper: its objective against a float64 loop, its networks by hand, its training on real digits."""

from __future__ import annotations

import math

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from attacks.seeding import evaluating
from defenses.advae import AdvAE, UNet
from defenses.base import Batches, Defended, Shape
from spaces.domain import Scalar
from spaces.exceptions import InputError

MNIST, CIFAR, DIGITS = Shape(1, 28, 28, 10), Shape(3, 32, 32, 10), Shape(1, 8, 8, 10)
COIL, ODD = Shape(3, 128, 128, 100), Shape(2, 9, 13, 4)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
TINY: dict[str, Scalar] = {"maps": 3, "eps": 0.1, "pgd_steps": 2, "pgd_step_size": 0.05}


def build(shape: Shape = DIGITS, **train: Scalar) -> AdvAE:
    torch.manual_seed(0)
    return AdvAE(TINY | train, {}, shape).eval()


def images(shape: Shape, n: int = 6, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, shape.channels, shape.height, shape.width, generator=generator)


class Witness(nn.Module):
    """A frozen base model with parts that know modes; it says in which mode it was asked."""

    def __init__(self, seed: int = 3, shape: Shape = ODD) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.drop = nn.BatchNorm2d(shape.channels), nn.Dropout(0.5)
        self.map = nn.Linear(shape.channels * shape.height * shape.width, shape.classes)
        self.modes: set[bool] = set()
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.modes |= {part.training for part in self.modules()}
        return self.map(self.drop(self.norm(x)).flatten(1)) * 3


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


# The objective.


def cross_entropy_by_hand(logits_NK: Tensor, y_N: Tensor) -> float:
    rows = zip(logits_NK.double().tolist(), y_N.tolist(), strict=True)
    return sum(math.log(sum(map(math.exp, row))) - row[y] for row, y in rows) / len(y_N)


def sigmoid_cross_entropy_by_hand(raw: Tensor, x: Tensor) -> float:
    total = 0.0
    pairs = list(zip(raw.double().flatten().tolist(), x.double().flatten().tolist(), strict=True))
    for logit, target in pairs:
        p = 1 / (1 + math.exp(-logit))
        total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    return total / len(pairs)


@pytest.mark.parametrize("architecture", ["cnn", "unet"])
def test_the_losses_of_one_base_model_are_those_of_equation_7(architecture: str) -> None:
    defense, base = build(ODD, architecture=architecture), Witness()
    x, adversarial = images(ODD), images(ODD, seed=2)
    ce, d = (float(loss.detach()) for loss in defense.losses([adversarial], x, LABELS, [base]))
    assert ce == pytest.approx(cross_entropy_by_hand(base(defense.purify(adversarial)).detach(), LABELS), rel=1e-5)
    assert d == pytest.approx(sigmoid_cross_entropy_by_hand(defense.network(x).detach(), x), rel=1e-5)


def test_an_ensemble_sums_the_losses_over_its_base_models_as_in_equation_8() -> None:
    defense, bases = build(ODD), [Witness(seed) for seed in (3, 4, 5)]
    x, adversarial = images(ODD), [images(ODD, seed=seed) for seed in (6, 7, 8)]
    ce, d = (float(loss.detach()) for loss in defense.losses(adversarial, x, LABELS, bases))
    by_hand = [
        cross_entropy_by_hand(base(defense.purify(own)).detach(), LABELS)
        for base, own in zip(bases, adversarial, strict=True)
    ]
    assert ce == pytest.approx(sum(by_hand), rel=1e-5)
    assert d == pytest.approx(3 * sigmoid_cross_entropy_by_hand(defense.network(x).detach(), x), rel=1e-5)


def test_a_step_descends_the_weighted_sum_once_for_all_base_models() -> None:
    """Eq. 8: Adam's first moment after one step is a tenth of the gradient of the sum, by autograd."""
    defense, twin = (build(ODD, lambda_rec=2.0, bases="advae-X+advae-A+advae-B").train() for _ in range(2))
    bases = nn.ModuleList(Witness(seed) for seed in (3, 4, 5))
    x = images(ODD, 7)
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    batches = Batches(x, y, epochs=1, batch_size=6)
    (metrics,) = defense.fit(batches, bases)
    ((batch,),) = batches.split(0.1)[0]
    own = [twin.adversarial(*batch, base) for base in bases]
    ce, d = twin.losses(own, *batch, list(bases))
    (ce + 2 * d).backward()
    assert (
        metrics["loss"]
        == pytest.approx(metrics["ce"] + 2 * metrics["d"])
        == pytest.approx(float((ce + 2 * d).detach()))
    )
    adam = defense._tracked["adam"].state
    for mine, other in zip(defense.parameters(), twin.parameters(), strict=True):
        assert float(adam[mine]["step"]) == 1
        assert other.grad is not None and torch.allclose(adam[mine]["exp_avg"], other.grad / 10, atol=1e-6)


def test_the_named_base_models_are_asked_for() -> None:
    assert build().bases() == ()
    assert build(bases="advae-X").bases() == ("advae-X",)
    assert build(bases="advae-X+advae-A+advae-B").bases() == ("advae-X", "advae-A", "advae-B")


# PGD in training.


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_pgd_stays_in_its_bounds_and_lowers_the_accuracy_of_the_composite(
    statistics: str, digits: tuple[Tensor, Tensor], classifier: nn.Module
) -> None:
    x, y = digits[0][:200], digits[1][:200]
    knobs: dict[str, Scalar] = {"architecture": "unet", "attack_statistics": statistics}
    defense = build(DIGITS, **knobs, lambda_rec=30.0, learning_rate=0.01, eps=0.05, pgd_steps=1, epochs=3)
    list(defense.fit(Batches(digits[0][:640], digits[1][:640], epochs=3, batch_size=32), classifier))
    attacker = build(DIGITS, **knobs, eps=0.2, pgd_steps=5, pgd_step_size=0.07)
    attacker.load_state_dict(defense.state_dict())
    for training in (True, False):
        adversarial = attacker.train(training).adversarial(x, y, classifier)
        assert float((adversarial - x).abs().max()) <= 0.2 + 1e-6
        assert 0 <= float(adversarial.min()) and float(adversarial.max()) <= 1
        assert not torch.equal(adversarial, attacker.adversarial(x, y, classifier))  # a random start
        model = Defended(attacker.eval(), classifier)
        assert accuracy(model, adversarial, y) < accuracy(model, x, y) - 0.3


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("training", [True, False])
def test_pgd_leaves_modes_and_running_statistics_as_they_were(statistics: str, training: bool) -> None:
    defense, base = build(ODD, attack_statistics=statistics).train(training), Witness()
    before = {name: tensor.clone() for name, tensor in defense.state_dict().items()}
    defense.adversarial(images(ODD), LABELS, base)
    assert base.modes == {False}
    assert {part.training for part in defense.modules()} == {training}
    assert all(torch.equal(tensor, before[name]) for name, tensor in defense.state_dict().items())


def test_the_statistics_under_attack_are_those_that_the_knob_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attacker of batch statistics is shown a model whose output for an image depends on the others."""
    shown = {}

    def forward(self: torchattacks.PGD, x: Tensor, y: Tensor) -> Tensor:
        shown["alone"], shown["together"] = self.model(x[:2]), self.model(x)[:2]
        return x

    monkeypatch.setattr(torchattacks.PGD, "forward", forward)
    for statistics, training, depends in (("batch", True, True), ("batch", False, False), ("running", True, False)):
        build(ODD, attack_statistics=statistics).train(training).adversarial(images(ODD), LABELS, Witness())
        assert torch.allclose(shown["alone"], shown["together"], atol=1e-5) is not depends


def test_a_fit_asks_the_classifier_in_eval_mode_and_leaves_it_as_it_was() -> None:
    defense, base = build(ODD), Witness()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    list(defense.fit(Batches(images(ODD, 20), torch.arange(20) % 4, epochs=2, batch_size=6), base))
    assert base.modes == {False}
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())


# The schedule.


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float], start: int = 0, **train: Scalar) -> AdvAE:
    """Return a defense whose validation loss is as given, epoch by epoch."""
    defense, left = build(DIGITS, epochs=40, pgd_steps=1, **train), iter(losses[start:])
    monkeypatch.setattr(defense, "validation", lambda *held_out: next(left))
    return defense


def test_the_rate_is_halved_after_4_epochs_the_fit_ends_after_10_and_the_best_weights_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = [3.0, 2.0, *[2.5] * 5, 1.0, *[1.0] * 30]
    defense, base = scripted(monkeypatch, losses, learning_rate=0.08), Witness(shape=DIGITS)
    rates, weights = [], []
    for _ in defense.fit(Batches(images(DIGITS, 20), torch.arange(20) % 10, epochs=40, batch_size=9), base):
        rates.append(defense._tracked["adam"].param_groups[0]["lr"])
        weights.append({name: tensor.clone() for name, tensor in defense.state_dict().items()})
    assert len(rates) == 8 + 10  # the eighth epoch is the best
    assert rates == [0.08] * 5 + [0.04] * 6 + [0.02] * 4 + [0.01] * 3
    assert all(torch.equal(tensor, weights[7][name]) for name, tensor in defense.state_dict().items())
    assert any(not torch.equal(tensor, weights[-1][name]) for name, tensor in defense.state_dict().items())


@pytest.mark.parametrize("interrupted", [3, 9, 12])
def test_a_resumed_fit_ends_at_the_same_epoch_with_the_same_weights(
    interrupted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, base = [3.0, 2.0, *[2.5] * 38], Witness(shape=DIGITS)
    batches = Batches(images(DIGITS, 20), torch.arange(20) % 10, epochs=40, batch_size=9)
    whole = scripted(monkeypatch, losses)
    assert len(list(whole.fit(batches, base))) == 12
    first = scripted(monkeypatch, losses)
    for epoch, _ in enumerate(first.fit(batches, base), start=1):
        if epoch == interrupted:
            break
    second = scripted(monkeypatch, losses, start=interrupted)
    second.resume(first.progress())
    batches.start = interrupted
    assert len(list(second.fit(batches, base))) == 12 - interrupted
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in second.state_dict().items())


def test_the_validation_loss_is_the_objective_and_is_drawn_alike_each_time() -> None:
    defense, base = build(ODD, lambda_rec=2.0, batch_size=4).train(), Witness()
    state = torch.get_rng_state()
    found = defense.validation(images(ODD), LABELS, [base])
    assert torch.equal(torch.get_rng_state(), state)
    assert defense.training and found == defense.validation(images(ODD), LABELS, [base])
    torch.manual_seed(0)
    total = 0.0
    with evaluating(defense):
        for x, y in zip(images(ODD).split(4), LABELS.split(4), strict=True):
            ce, d = defense.losses([defense.adversarial(x, y, base)], x, y, [base])
            total += float((ce + 2 * d).detach()) * len(x)
    assert found == pytest.approx(total / 6)


def test_training_buys_robustness_under_a_white_box_attack(
    digits: tuple[Tensor, Tensor], classifier: nn.Module
) -> None:
    (x, y), eps = (t[1400:] for t in digits), 0.15
    defense = build(architecture="unet", maps=8, learning_rate=5e-3, eps=eps, pgd_steps=4, pgd_step_size=0.06, epochs=4)
    list(defense.fit(Batches(digits[0][:1257], digits[1][:1257], epochs=4, batch_size=32), classifier))
    defended = Defended(defense, classifier).eval()
    undefended_pgd, defended_pgd = (
        accuracy(model, torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=20)(x, y), y)
        for model in (classifier, defended)
    )
    assert defended_pgd > undefended_pgd + 0.1
    assert accuracy(defended, x, y) > 0.8


# The networks.


def test_the_cnn_is_the_papers_for_mnist() -> None:
    defense = AdvAE({}, {}, MNIST)
    # By hand: weights and biases of five 3 x 3 convolutions, BatchNorm behind the first two.
    wide = 9 * 32 * 32 + 32
    expected = (9 * 32 + 32) + 64 + wide + 64 + 2 * wide + (9 * 32 + 1)
    assert sum(p.numel() for p in defense.parameters()) == expected
    sizes: list[tuple[int, ...]] = []
    for convolution in (part for part in defense.modules() if isinstance(part, nn.Conv2d)):
        convolution.register_forward_hook(lambda part, inputs, output: sizes.append(tuple(output.shape[1:])))
    defense.eval().purify(images(MNIST, 1))
    assert sizes == [(32, 28, 28), (32, 14, 14), (32, 7, 7), (32, 14, 14), (1, 28, 28)]


def test_the_unet_is_the_papers_for_cifar_10() -> None:
    defense = AdvAE({"architecture": "unet", "levels": 5}, {}, CIFAR)
    assert {m.kernel_size for m in defense.modules() if isinstance(m, nn.Conv2d)} == {(3, 3)}  # the last one too
    widths = [32, 64, 128, 256, 512]

    def level(inputs: int, outputs: int) -> int:
        return 9 * inputs * outputs + 9 * outputs * outputs + 2 * 2 * outputs

    down = level(3, 32) + sum(level(widths[i], widths[i + 1]) for i in range(4))
    up = sum(level(widths[i + 1] + widths[i], widths[i]) for i in range(4))
    assert sum(p.numel() for p in defense.parameters()) == down + up + (9 * 32 * 3 + 3)
    sizes: list[tuple[int, ...]] = []
    for convolution in (part for part in defense.modules() if isinstance(part, nn.Conv2d)):
        convolution.register_forward_hook(lambda part, inputs, output: sizes.append(tuple(output.shape[1:])))
    defense.eval().purify(images(CIFAR, 1))
    encoder = [(32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert sizes == [size for size in [*encoder, *encoder[-2::-1]] for _ in range(2)] + [(3, 32, 32)]


@pytest.mark.parametrize("shape", [MNIST, CIFAR, DIGITS, COIL, ODD], ids=str)
@pytest.mark.parametrize("architecture", ["cnn", "unet"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_purified_images_keep_shape_dtype_and_range(shape: Shape, architecture: str, levels: int) -> None:
    x = images(shape, 1)
    purified = build(shape, architecture=architecture, levels=levels).purify(x).detach()
    assert purified.shape == x.shape and purified.dtype == x.dtype
    assert 0 <= float(purified.min()) and float(purified.max()) <= 1


def test_a_batch_of_one_image_trains_where_the_lowest_level_has_one_pixel() -> None:
    defense, base = build(architecture="unet", levels=4), Witness(shape=DIGITS)
    assert len(list(defense.fit(Batches(images(DIGITS, 6), LABELS, epochs=1, batch_size=4), base))) == 1


@pytest.mark.parametrize(
    ("architecture", "levels", "law"),
    [
        ("unet", 5, "a U-Net of 5 levels needs images of at least 16 pixels a side, but they have 8; fewer levels"),
        ("cnn", 4, "an auto-encoder of 4 blocks needs images of at least 16 pixels a side, but they have 8; fewer"),
    ],
)
def test_images_that_cannot_be_halved_so_often_are_refused(architecture: str, levels: int, law: str) -> None:
    build(architecture=architecture, levels=levels - 1)
    with torch.device("meta"), pytest.raises(InputError, match=law):
        build(architecture=architecture, levels=levels)


def test_the_smaller_side_counts() -> None:
    UNet.check(4, 8, 100)
    with pytest.raises(InputError, match="but they have 7"):
        UNet.check(4, 100, 7)
