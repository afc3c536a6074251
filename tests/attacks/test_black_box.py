"""The black-box attacker: what it asks, what it may know, and what it comes to."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.algorithms.pgd import PGD
from attacks.black_box import Substitute, augmented, train_substitute
from spaces.exceptions import InputError

Digits = tuple[Tensor, Tensor]


def dense() -> nn.Module:
    """Two dense layers of 200, Defense-GAN's substitute E, on digits."""
    layers = nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def small() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 10)
    )


class Asked(nn.Module):
    """A classifier that keeps what it was asked."""

    def __init__(self, classifier: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.classifier = classifier
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.classifier(x)


class Picky(Asked):
    """It rejects images with a light left upper quarter."""

    def accept(self, x: Tensor) -> Tensor:
        return x[:, 0, :4, :4].mean(dim=(1, 2)) < 0.35


@pytest.fixture
def own(digits: Digits) -> Tensor:
    """The attacker's images, on which the target was not trained."""
    return digits[0][1400:1550]


def same(ours: Substitute, other: Substitute) -> bool:
    pairs = zip(ours.network.state_dict().values(), other.network.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def fooled(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) != y).double().mean())


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_it_asks_once_for_every_image_of_a_set_that_doubles(rounds: int, own: Tensor, classifier: nn.Module) -> None:
    target = Asked(classifier)
    found = train_substitute(target, own, small, rounds=rounds, epochs=1, seed=0)
    seen = torch.cat(target.seen)
    assert found.queries == len(seen) == 150 * 2**rounds
    assert max(len(x) for x in target.seen) <= 256
    assert torch.equal(seen[:150], own)
    for n in (150 * 2**rho for rho in range(rounds)):  # each set is the one before, each image moved once
        moved = (seen[n : 2 * n] - seen[:n]).abs()
        assert float(moved.max()) == pytest.approx(0.1) and float(moved.flatten(1).amax(1).min()) > 0.09
    assert not rounds or [float(edge) for edge in seen.aminmax()] == [0, 1]


def test_the_augmented_images_are_those_of_a_slow_loop(own: Tensor, classifier: nn.Module) -> None:
    network = copy.deepcopy(classifier).double()
    x, y = own[:20].double(), torch.arange(20) % 10
    for step in (0.1, -0.1):
        slow = [
            image + step * torch.autograd.functional.jacobian(lambda a: network(a).softmax(1)[0], image)[label].sign()
            for image, label in zip(x.split(1), y, strict=True)
        ]
        assert torch.equal(augmented(network, x, y, step), torch.cat(slow).clamp(0, 1))


def test_an_image_that_the_substitute_is_sure_of_is_moved_all_the_same() -> None:
    layer = nn.Linear(16, 2)
    layer.weight.data *= 1000
    sure = nn.Sequential(nn.Flatten(), layer)
    x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 2
    row_2D = layer.weight - layer.weight.flip(0)
    leaning = x.clone().requires_grad_()
    (probability_NCHW,) = torch.autograd.grad(sure(leaning).softmax(1).gather(1, y[:, None]).sum(), leaning)
    assert bool((probability_NCHW.flatten(1) == 0).all(1).any())
    assert torch.equal(augmented(sure, x, y, 0.1), (x + 0.1 * row_2D[y].sign().view_as(x)).clamp(0, 1))


def test_it_moves_the_images_by_the_network_as_it_stands_with_dropout_off(own: Tensor, classifier: nn.Module) -> None:
    target = Asked(classifier)
    network = train_substitute(target, own, small, rounds=1, epochs=0, seed=0).network
    assert torch.equal(torch.cat(target.seen[1:]), augmented(network, own, classifier(own).argmax(1), 0.1))


@pytest.fixture(scope="module")
def stolen(digits: Digits, classifier: nn.Module) -> dict[float, Substitute]:
    """Substitutes after six rounds, by the step."""
    x = digits[0][1400:1550]
    return {step: train_substitute(classifier, x, dense, step=step, seed=0) for step in (0.1, -0.1)}


def test_it_says_what_the_target_says_of_most_images_that_neither_has_seen(
    stolen: dict[float, Substitute], digits: Digits, classifier: nn.Module
) -> None:
    unseen = digits[0][1550:], classifier(digits[0][1550:]).argmax(1)
    assert fooled(stolen[0.1].network, *unseen) < 0.35
    assert fooled(stolen[-0.1].network, *unseen) < 0.1
    assert all(found.queries == 9600 and found.agreement > 0.9 for found in stolen.values())


def test_what_fools_it_fools_the_target_far_more_often_than_noise_of_the_same_size(
    stolen: dict[float, Substitute], digits: Digits, classifier: nn.Module
) -> None:
    x, y = digits[0][1550:], digits[1][1550:]
    noise = fooled(classifier, (x + 0.3 * torch.randn_like(x).sign()).clamp(0, 1), y)
    toward, away = (fooled(classifier, PGD(stolen[step].network, 0.3, 0.05, steps=20)(x, y), y) for step in (0.1, -0.1))
    assert 2 * noise < toward < 0.9 < away


class Sealed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NK: Tensor) -> Tensor:
        return logits_NK

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        raise AssertionError("the attacker asked for a gradient")


def test_it_sees_the_class_alone_neither_gradient_nor_logits(own: Tensor, classifier: nn.Module) -> None:
    def label_only(x: Tensor) -> Tensor:
        return nn.functional.one_hot(classifier(x).argmax(1), 10).float()

    targets = classifier, Asked(lambda x: Sealed.apply(classifier(x))), Asked(label_only)  # type: ignore[no-untyped-call]
    open_, sealed, labels = (train_substitute(t, own, small, rounds=2, seed=0) for t in targets)
    assert same(open_, sealed) and same(open_, labels)


def test_rejected_images_count_as_queries_and_teach_nothing(own: Tensor, classifier: nn.Module) -> None:
    def wrong_where_rejected(x: Tensor) -> Tensor:
        return torch.where(picky.accept(x)[:, None], classifier(x), -classifier(x))

    picky, liar = Picky(classifier), Picky(wrong_where_rejected)
    ours, other = (train_substitute(target, own, small, rounds=2, epochs=3, seed=0) for target in (picky, liar))
    assert same(ours, other) and ours.agreement == other.agreement
    seen, answered, asked = torch.cat(picky.seen), 0, 150
    for _ in range(3):
        new = seen[:asked]
        answered += int(picky.accept(new).sum())
        seen, asked = seen[asked:], answered
    assert len(seen) == 0 and ours.queries == sum(len(x) for x in picky.seen) < 500


def test_a_target_that_rejects_everything_teaches_nothing(own: Tensor, classifier: nn.Module) -> None:
    target = Picky(classifier)
    found = train_substitute(target, own * 0 + 1, small, seed=0)
    assert (found.queries, found.agreement, len(target.seen)) == (150, 0.0, 1)
    assert fooled(found.network, own, classifier(own).argmax(1)) > 0.5


def test_a_single_image_left_over_does_not_break_batch_norm(own: Tensor, classifier: nn.Module) -> None:
    assert train_substitute(classifier, own[:129], small, rounds=0, epochs=1, seed=0).queries == 129


def test_the_seed_alone_decides_also_where_the_target_draws_noise(own: Tensor, classifier: nn.Module) -> None:
    noisy = Asked(lambda x: classifier(x + 0.2 * torch.randn_like(x)))
    for target in (classifier, noisy):
        found = []
        for seed in (5, 5, 6):
            torch.rand(7)
            found.append(train_substitute(target, own, small, rounds=1, epochs=2, seed=seed))
        assert same(found[0], found[1]) and not same(found[0], found[2])


def test_it_trains_the_architecture_that_is_asked_for_and_returns_it_frozen(own: Tensor, classifier: nn.Module) -> None:
    built: list[nn.Module] = []

    def build() -> nn.Module:
        built.append(small())
        return built[-1]

    with torch.no_grad():
        network = train_substitute(classifier, own, build, rounds=1, seed=0).network
        assert not torch.is_grad_enabled()
    assert built == [network]  # each round goes on from where the one before ended
    assert not any(module.training for module in network.modules())
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())


@pytest.mark.parametrize("breaks", [False, True])
def test_generators_and_modes_are_as_before_also_when_the_target_raises(breaks: bool, own: Tensor) -> None:
    calls = itertools.count(1)

    def answer(x: Tensor) -> Tensor:
        assert not any(part.training for part in target.modules())
        if breaks and next(calls) == 2:
            raise RuntimeError("on purpose")
        return body(x) + torch.rand(len(x), 10)

    body = small().train()
    body[1].eval()  # type: ignore[index]
    target = Asked(answer).train()
    target.body = body
    modes, state = [part.training for part in target.modules()], torch.get_rng_state()
    if breaks:
        with pytest.raises(RuntimeError, match="on purpose"):
            train_substitute(target, own, small, rounds=1, epochs=1, seed=3)
    else:
        train_substitute(target, own, small, rounds=1, epochs=1, seed=3)
    assert [part.training for part in target.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in target.parameters())


@pytest.mark.parametrize(
    ("x", "rounds", "said"),
    [
        (torch.rand(1, 1, 8, 8), 6, "at least 2 images, but is given 1"),
        (torch.rand(3, 1, 8, 8) + 0.5, 6, r"\[0, 1\], but a substitute's start in \["),
        (torch.full((3, 1, 8, 8), torch.nan), 6, r"\[0, 1\], but a substitute's start in \[nan, nan\]"),
        (torch.rand(3, 1, 8, 8), -1, "at least 0 rounds of augmentation, but rounds is -1"),
    ],
)
def test_bad_input_is_named_before_anything_is_asked(x: Tensor, rounds: int, said: str) -> None:
    target = Asked(nn.Identity())
    with pytest.raises(InputError, match=said):
        train_substitute(target, x, small, rounds=rounds, seed=0)
    assert not target.seen
