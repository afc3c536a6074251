"""Adversarial training against the papers: losses against float64 loops, the attacks against their formulas."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.adversarial_training import AdversarialTraining
from defenses.base import Batches, Shape
from spaces.exceptions import InputError

SHAPE = Shape(1, 8, 8, 10)
Digits = tuple[Tensor, Tensor]


def small(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 10)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def adopted(classifier: nn.Module, **train: Any) -> AdversarialTraining:
    torch.manual_seed(0)
    defense = AdversarialTraining(train, {}, SHAPE)
    defense.adopt(classifier)
    return defense.eval()


def fitted(classifier: nn.Module, digits: Digits, images: int = 64, epochs: int = 1, **train: Any) -> nn.Module:
    """Return the network after a fit on the first images."""
    defense = adopted(classifier, **train)
    x, y = digits
    for _ in defense.fit(Batches(x[:images], y[:images], epochs=epochs, batch_size=32), classifier):
        pass
    return defense.eval().network


def cross_entropy(logits_NK: Tensor, y_N: Tensor) -> float:
    """The mean of -log softmax, number by number in float64."""
    rows = [
        math.log(sum(math.exp(v) for v in row)) - row[label]
        for row, label in zip(logits_NK.double().tolist(), y_N.tolist(), strict=True)
    ]
    return sum(rows) / len(rows)


def weights_equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("attack", "share"), [("pgd", 0.5), ("fgsm", 0.5), ("fgsm", 0.2)])
def test_the_loss_is_the_papers_equation(attack: str, share: float, digits: Digits) -> None:
    """AdvAE Eq. 4 sees adversarial images alone, PuVAE Eq. 4 weighs clean and adversarial ones."""
    defense = adopted(small(), attack=attack, clean_share=share)
    x, y = digits[0][:7], digits[1][:7]
    adversarial = (x + 0.3 * torch.randn(x.shape).sign()).clamp(0, 1)
    clean, hard = (cross_entropy(defense.network(images), y) for images in (x, adversarial))
    expected = hard if attack == "pgd" else share * clean + (1 - share) * hard
    assert defense.loss(x, adversarial, y).tolist() == pytest.approx(expected, rel=1e-5)


def test_fgsm_is_one_step_along_the_gradients_sign(digits: Digits) -> None:
    defense = adopted(small(), attack="fgsm", eps=0.2)
    x, y = digits[0][:7], digits[1][:7]
    free = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(defense.network(free), y), free)
    assert torch.equal(defense.attacked(x, y), (x + 0.2 * slope.sign()).clamp(0, 1))


def test_pgd_starts_at_random_stays_within_eps_and_outdoes_fgsm(digits: Digits, classifier: nn.Module) -> None:
    x, y = digits[0][:64], digits[1][:64]
    pgd = adopted(classifier, attack="pgd", eps=0.2, pgd_steps=10, pgd_step_size=0.05)
    first, second = pgd.attacked(x, y), pgd.attacked(x, y)
    assert not torch.equal(first, second)
    assert float((first - x).abs().max()) <= 0.2 + 1e-6 and 0 <= float(first.min()) and float(first.max()) <= 1
    single = adopted(classifier, attack="fgsm", eps=0.2).attacked(x, y)
    assert pgd.loss(x, first, y) > pgd.loss(x, single, y)


def test_pgd_in_l2_stays_within_eps_starts_anew_at_each_step_and_goes_farther_than_linf(
    digits: Digits, classifier: nn.Module
) -> None:
    x, y = digits[0][:64], digits[1][:64]
    pgd = adopted(classifier, attack="pgd", norm="L2", eps=1.5, pgd_steps=10, pgd_step_size=0.375)
    first, second = pgd.attacked(x, y), pgd.attacked(x, y)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    once = pgd.attacked(x, y)
    torch.manual_seed(3)
    assert torch.equal(once, pgd.attacked(x, y))
    lengths = (first - x).flatten(1).norm(dim=1)
    assert float(lengths.max()) <= 1.5 + 1e-5 and float(lengths.median()) > 1
    assert float((first - x).abs().max()) > 0.3 and 0 <= float(first.min()) and float(first.max()) <= 1
    torch.manual_seed(3)
    noise = torch.randn_like(x)
    noisy = (x + 1.5 * noise / noise.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)
    assert pgd.loss(x, first, y) > 2 * pgd.loss(x, noisy, y)


def test_eps_may_exceed_1_in_l2_alone() -> None:
    assert adopted(small(), norm="L2", eps=3.0).train_knobs.eps == 3
    with pytest.raises(InputError, match="eps must be at most 1 in Linf, in pixel units"):
        adopted(small(), eps=1.5)


def test_eps_and_step_grow_over_the_warm_up(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = small()
    defense = adopted(classifier, attack="fgsm", eps=0.2, warm_up=3)
    attack, shares, farthest = defense.attacked, list[float](), list[float]()

    def attacked(x: Tensor, y: Tensor, share: float) -> Tensor:
        result = attack(x, y, share)
        shares.append(share)
        farthest.append(float((result - x).abs().max()))
        return result

    monkeypatch.setattr(defense, "attacked", attacked)
    list(defense.fit(Batches(digits[0][:32], digits[1][:32], epochs=5, batch_size=32), classifier))
    assert shares == [0.25, 0.5, 0.75, 1, 1] and farthest == pytest.approx([0.2 * share for share in shares])
    shares.clear()
    list(defense.fit(Batches(digits[0][:32], digits[1][:32], epochs=5, batch_size=32, start=2), classifier))
    assert shares == [0.75, 1, 1]  # a resumed fit goes on where it was


def test_the_defaults_are_advaes_on_mnist(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> None:
    monkeypatch.setattr(torchattacks.PGD, "__call__", lambda attack, x, y: attack)
    used: Any = adopted(small()).attacked(*digits)
    assert (used.eps, used.alpha, used.steps, used.random_start) == (0.3, 0.01, 40, True)


def test_the_attack_sees_no_dropout_and_the_step_does(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = small(dropout=0.5)
    defense = adopted(classifier, attack="fgsm")
    attack, loss, dropout = defense.attacked, defense.loss, list(defense.network.children())[2]
    modes: list[tuple[bool, bool]] = []

    def attacked(x: Tensor, y: Tensor, share: float) -> Tensor:
        hook = defense.network.register_forward_pre_hook(lambda *_: modes.append((True, dropout.training)))
        result = attack(x, y, share)
        hook.remove()
        return result

    def stepped(x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        modes.append((False, all(part.training for part in defense.network.modules())))
        return loss(x, adversarial, y)

    monkeypatch.setattr(defense, "attacked", attacked)
    monkeypatch.setattr(defense, "loss", stepped)
    list(defense.fit(Batches(digits[0][:64], digits[1][:64], epochs=1, batch_size=32), classifier))
    assert modes == [(True, False), (False, True)] * 2


def test_the_protected_classifier_is_neither_trained_nor_asked(digits: Digits, classifier: nn.Module) -> None:
    before = copy.deepcopy(classifier)
    defense = adopted(classifier, attack="fgsm")
    for _ in defense.fit(Batches(digits[0][:64], digits[1][:64], epochs=1, batch_size=32), classifier):
        pass
    assert weights_equal(classifier, before) and not weights_equal(classifier, defense.network)
    defense.eval()
    x = digits[0][:5]
    assert torch.equal(defense.classify(x, nn.Flatten()), defense.network(x)) and torch.equal(defense.purify(x), x)
    assert defense.gradients == ("exact",)


def test_scratch_forgets_the_weights_and_pretrained_keeps_them(digits: Digits, classifier: nn.Module) -> None:
    """A learning rate near zero leaves what the training began with."""
    still: dict[str, Any] = {"attack": "fgsm", "learning_rate": 1e-5, "eps": 0.0}
    x, y = digits[0][1400:], digits[1][1400:]
    right = {
        start: float((fitted(classifier, digits, start=start, **still)(x).argmax(1) == y).float().mean())
        for start in ("scratch", "pretrained")
    }
    assert right["scratch"] < 0.4 and right["pretrained"] > 0.75


def test_a_fresh_start_depends_on_the_seed_of_the_fit_alone(digits: Digits, classifier: nn.Module) -> None:
    """What was drawn between building and fitting, such as another classifier's training, changes nothing."""
    first = fitted(classifier, digits, attack="pgd", pgd_steps=2)
    defense = adopted(classifier, attack="pgd", pgd_steps=2)
    torch.randn(5)
    for _ in defense.fit(Batches(digits[0][:64], digits[1][:64], epochs=1, batch_size=32), classifier):
        pass
    assert weights_equal(first, defense.network)


@pytest.mark.parametrize("start", ["scratch", "pretrained"])
def test_a_resumed_fit_keeps_what_it_learnt(start: str, digits: Digits, classifier: nn.Module) -> None:
    knobs: dict[str, Any] = {"attack": "pgd", "pgd_steps": 2, "start": start}
    whole = fitted(classifier, digits, epochs=2, **knobs)
    x, y = digits[0][:64], digits[1][:64]
    half, rest = adopted(classifier, **knobs), adopted(classifier, **knobs)
    next(iter(half.fit(Batches(x, y, epochs=2, batch_size=32), classifier)))
    rest.resume(half.progress())
    list(rest.fit(Batches(x, y, epochs=2, batch_size=32, start=1), classifier))
    assert weights_equal(whole, rest.network)


@pytest.mark.parametrize(("attack", "norm", "eps"), [("fgsm", "Linf", 0.15), ("pgd", "Linf", 0.15), ("pgd", "L2", 1.0)])
def test_it_withstands_a_white_box_attack_that_breaks_the_classifier(
    attack: str, norm: str, eps: float, digits: Digits, classifier: nn.Module
) -> None:
    x, y = digits[0][1400:], digits[1][1400:]
    pgd: dict[str, Any] = {"norm": norm, "eps": eps, "pgd_steps": 5, "pgd_step_size": eps / 3}
    network = fitted(classifier, digits, images=1400, epochs=7, attack=attack, start="pretrained", **pgd)

    def right(model: nn.Module, images: Tensor) -> float:
        return float((model(images).argmax(1) == y).float().mean())

    def left(model: nn.Module) -> float:
        pgd = torchattacks.PGD if norm == "Linf" else torchattacks.PGDL2
        return right(model, pgd(model, eps=eps, alpha=eps / 5, steps=20)(x, y))

    assert left(network) > left(classifier) + 0.1 and right(network, x) > right(classifier, x) - 0.02
