"""Attacks on the choice between candidates and on the latent space: against known answers, and where PGD fails."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.algorithms.choice_pgd import ChoicePGD
from attacks.algorithms.latent_pgd import LEAD, LatentPGD
from attacks.algorithms.pgd import PGD
from attacks.gradient_view import View
from attacks.threat import Norm
from defenses.base import Batches, Defended, Shape
from defenses.defense_gan import DefenseGAN
from defenses.puvae import PuVAE
from spaces.domain import Scalar
from tests.attacks.algorithms.test_corrected import Score, fooled, l2, one_by_one

Digits = tuple[Tensor, Tensor]


class Model(nn.Module):
    """A classifier behind a defense."""

    def __init__(self, defense: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.defense: Any = defense
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.defense.purify(x))


# The choice between candidates.


class Nearest(nn.Module):
    """Purifies into the nearest of two flat images; in units of `temperature` far from each other."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.candidates = torch.tensor([0.4, 0.6])
        self.temperature = temperature

    def distances(self, x: Tensor) -> Tensor:
        return (x.flatten(1).mean(1)[:, None] - self.candidates).abs()

    def purify(self, x: Tensor) -> Tensor:
        return self.candidates[self.distances(x).argmin(1)][:, None, None, None].expand_as(x)

    def surrogate(self, x: Tensor) -> Tensor:
        weight = F.softmax(-self.distances(x) / self.temperature, dim=1)
        return (weight @ self.candidates)[:, None, None, None].expand_as(x)

    def strain(self, x: Tensor, y: Tensor) -> Tensor:
        distances = self.distances(x)
        own = distances.gather(1, y[:, None])[:, 0]
        return (own - distances.gather(1, 1 - y[:, None])[:, 0]) / self.temperature


def nearest(temperature: float = 1e-4) -> Model:
    return Model(Nearest(temperature), Score(lambda x: 50 * (0.5 - x.flatten(1).mean(1))))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_a_choice_without_a_gradient_stops_pgd_and_not_choice_pgd(norm: Norm, targeted: bool) -> None:
    target, x, y = nearest(), torch.full((3, 1, 4, 4), 0.45), torch.zeros(3, dtype=torch.long)
    eps = 0.1 if norm == "Linf" else 0.4
    stock = torchattacks.PGD if norm == "Linf" else torchattacks.PGDL2
    options: dict[str, Any] = {"eps": eps, "alpha": eps / 5, "steps": 8, "random_start": False}
    plain, ours = (
        stock(View(target, "surrogate"), **options),
        ChoicePGD(View(target, "surrogate"), norm=norm, **options),
    )
    aim = y
    if targeted:
        for attack in (plain, ours):
            attack.set_mode_targeted_by_label(quiet=True)
        aim = 1 - y
    assert torch.equal(plain(x, aim), x)
    moved = ours(x, aim)
    assert fooled(target, moved, y) == 1
    assert float((l2(moved, x) if norm == "L2" else (moved - x).flatten(1).abs().amax(1)).max()) <= eps + 1e-6


def test_the_gain_is_the_cross_entropy_and_the_strain_below_zero() -> None:
    target = nearest(0.05)
    x = torch.tensor([0.42, 0.49, 0.55]).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    y, logits = torch.tensor([0, 0, 0]), torch.randn(3, 2)
    attack = ChoicePGD(View(target, "surrogate"))
    strain = torch.tensor([(0.02 - 0.18) / 0.05, (0.09 - 0.11) / 0.05, 0.0])
    ce = F.cross_entropy(logits, y, reduction="none")
    assert torch.allclose(attack._gain(x, y, logits), ce + strain, atol=1e-4)
    attack.set_mode_targeted_by_label(quiet=True)
    strain = torch.tensor([0.0, 0.0, -(0.15 - 0.05) / 0.05])  # that of the target 0 falls, as far as to zero
    assert torch.allclose(attack._gain(x, y, logits), -ce + strain, atol=1e-4)


def test_choice_pgd_breaks_about_as_many_images_of_a_puvae_as_pgd(digits: Digits, classifier: nn.Module) -> None:
    """On digits the soft choice of PGD's own surrogate has a gradient; what it saturates on is tested above."""
    torch.manual_seed(0)
    knobs: dict[str, Scalar] = {"lambda_rc": 0.3, "lambda_kl": 0.1, "lambda_ce": 10.0, "learning_rate": 4e-3}
    knobs |= {"conv_maps": 4, "decoder_maps": 6, "dense": 32, "latent": 8, "epochs": 2, "batch_size": 16}
    puvae = PuVAE(knobs, {"sigma_eps": 0.0}, Shape(1, 8, 8, 10))
    for _ in puvae.fit(Batches(digits[0][:1400], digits[1][:1400], epochs=2, batch_size=16), classifier):
        pass
    target = Defended(puvae.eval().requires_grad_(False), classifier)
    assert puvae.openings == ("choice",)
    x, y = digits[0][1400:1500], digits[1][1400:1500]
    options: dict[str, Any] = {"eps": 0.15, "alpha": 0.02, "steps": 15}
    plain, ours = (fooled(target, a(View(target, "surrogate"), **options)(x, y), y) for a in (PGD, ChoicePGD))
    assert ours >= plain - 0.05 and ours > fooled(target, x, y) + 0.4


# The latent space.


class Linear(nn.Module):
    """G(z) = 0.5 + A z with orthonormal columns, and its encoder A^T (x - 0.5), with or without a gradient."""

    def __init__(self, a_PZ: Tensor, encodes: bool = True) -> None:
        super().__init__()
        self.a_PZ = a_PZ
        self.encodes = encodes

    def latent(self, x: Tensor) -> Tensor:
        return (x if self.encodes else x.detach()).flatten(1).sub(0.5) @ self.a_PZ

    def generate(self, z: Tensor) -> Tensor:
        return (0.5 + z @ self.a_PZ.T).view(-1, 1, 4, 4)

    def purify(self, x: Tensor) -> Tensor:
        return self.generate(self.latent(x))


def first(pixels: int) -> Tensor:
    """G sets the first pixels and leaves the others at 0.5."""
    return torch.eye(16)[:, :pixels]


def weighed(w_P: Tensor, score: float) -> Score:
    return Score(lambda x: (x.flatten(1) - 0.5) @ w_P + score)


@pytest.mark.parametrize("encodes", [True, False])
def test_the_image_goes_to_the_corner_of_the_ball_that_the_latent_space_reaches(encodes: bool) -> None:
    w, eps = 20 * torch.tensor([3.0, -2.0, 1.0, 1.5, *[9.0] * 12]), 0.1
    target, x = Model(Linear(first(4), encodes), weighed(w, 11.0)), torch.full((2, 1, 4, 4), 0.5)
    x[:, 0, 3, 3] = 0.53
    moved = LatentPGD(View(target), eps=eps, steps=200, lr=0.01)(x, torch.zeros(2, dtype=torch.long))
    assert fooled(target, moved, torch.zeros(2, dtype=torch.long)) == 1
    assert torch.allclose(moved.flatten(1)[:, :4], 0.5 - eps * w[:4].sign(), atol=1e-3)
    # The others are no concern of the encoder's: they go where G(z*) has them.
    assert torch.allclose(moved.flatten(1)[:, 4:], torch.full((2, 12), 0.5))


def test_what_bpda_does_is_purified_away_and_what_is_found_in_the_latent_space_is_not() -> None:
    """G makes flat images; the classifier looks for a pattern, and a little for flat ones."""
    sign = torch.tensor([1.0, -1.0] * 8)
    target = Model(Linear(torch.full((16, 1), 0.25)), weighed(100 * sign + 10, 8.0))
    x, y = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.long)
    assert fooled(target, torchattacks.PGD(View(target, "bpda"), eps=0.1, alpha=0.02)(x, y), y) == 0
    moved = LatentPGD(View(target), eps=0.1)(x, y)
    assert fooled(target, moved, y) == 1 and torch.allclose(moved, x - 0.1, atol=1e-3)


class Shrinking(Linear):
    """An encoder that reads the image at half its contrast, but for its upper left corner: that adds as much."""

    def latent(self, x: Tensor) -> Tensor:
        x = x if self.encodes else x.detach()
        return super().latent(x) / 2 + x[:, 0, 0, :1] - 0.5


def test_the_encoder_and_not_the_distance_decides() -> None:
    a, y = torch.zeros(16, 1), torch.zeros(1, dtype=torch.long)
    a[15] = 1.0  # G sets the last pixel alone
    x = torch.full((1, 1, 4, 4), 0.5)
    classifier = weighed(100 * a[:, 0], 8.0)  # wrong where the last pixel of G(z) is below 0.42
    found = {}
    for encodes in (True, False):
        target = Model(Shrinking(a, encodes), classifier)
        found[encodes] = LatentPGD(View(target), eps=0.1, steps=60, lr=0.01)(x, y)
        assert (fooled(target, found[encodes], y) == 1) == encodes
    assert float(found[False][0, 0, 0, 0]) == pytest.approx(0.5)
    assert float(found[True][0, 0, 0, 0]) < 0.45


def test_a_retrained_classifier_is_the_one_that_is_searched() -> None:
    defense = Linear(first(4))
    target = Model(defense, weighed(torch.zeros(16), 8.0))
    cast(Any, defense).own = weighed(20 * torch.tensor([3.0, *[0.0] * 15]), 4.0)
    target.forward = lambda x: cast(Any, defense).own(defense.purify(x))  # type: ignore[method-assign]
    x, y = torch.full((1, 1, 4, 4), 0.5), torch.zeros(1, dtype=torch.long)
    assert fooled(target, LatentPGD(View(target), eps=0.1)(x, y), y) == 1


@pytest.fixture(scope="module")
def reduced(digits: Digits, classifier: nn.Module) -> Model:
    """The classifier behind the digits' first principal components."""

    class Components(nn.Module):
        def __init__(self, x: Tensor) -> None:
            super().__init__()
            self.mean = x.flatten(1).mean(0)
            self.basis = torch.linalg.svd(x.flatten(1) - self.mean, full_matrices=False).Vh[:16]

        def latent(self, x: Tensor) -> Tensor:
            return (x.flatten(1) - self.mean) @ self.basis.T

        def generate(self, z: Tensor) -> Tensor:
            return (z @ self.basis + self.mean).view(-1, 1, 8, 8)

        def purify(self, x: Tensor) -> Tensor:
            return self.generate(self.latent(x))

    return Model(Components(digits[0][:1400]), classifier)


@pytest.fixture
def held_out(digits: Digits) -> Digits:
    return digits[0][1400:1464], digits[1][1400:1464]


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.2), ("L2", 1.2)])
def test_digits_are_fooled_within_the_ball_and_each_as_if_alone(
    norm: Norm, eps: float, held_out: Digits, reduced: Model
) -> None:
    x, y = held_out
    attack = LatentPGD(View(reduced), eps=eps, norm=norm)
    moved = attack(x, y)
    assert fooled(reduced, moved, y) > 0.8 > 0.4 > fooled(reduced, x, y)
    off = l2(moved, x) if norm == "L2" else (moved - x).flatten(1).abs().amax(1)
    assert float(off.max()) <= eps + 1e-6 and 0 <= float(moved.min()) and float(moved.max()) <= 1
    assert torch.allclose(moved[:8], one_by_one(attack, x[:8], y[:8]), atol=1e-3)
    assert len(attack(x[:0], y[:0])) == 0 and not moved.requires_grad


def test_a_target_is_reached(held_out: Digits, reduced: Model) -> None:
    attack = LatentPGD(View(reduced), eps=0.4)
    attack.set_mode_targeted_by_label(quiet=True)
    aim = (held_out[1] + 1) % 10
    assert fooled(reduced, attack(held_out[0], aim), aim) < 0.3


def counted(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of images at each call of a method."""
    calls, method = list[int](), getattr(owner, name)

    def spy(x: Tensor, *more: Any) -> Tensor:
        calls.append(len(x))
        return method(x, *more)

    monkeypatch.setattr(owner, name, spy)
    return calls


def test_an_image_that_is_found_wrong_goes_no_further(
    held_out: Digits, reduced: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = held_out
    wrong, latent = reduced(x).argmax(1) != y, reduced.defense.latent
    monkeypatch.setattr(reduced.defense, "purify", lambda x: reduced.defense.generate(latent(x)))
    encoded = counted(reduced.defense, "latent", monkeypatch)
    attack = LatentPGD(View(reduced), eps=0.2, steps=5)
    attack.stops = True
    moved = attack(x, y)
    assert int(wrong.sum()) > 0 and torch.equal(moved[wrong], x[wrong])
    first, *later = encoded
    assert first == int((~wrong).sum()) and len(later) == 5 and 0 < max(later) == min(later) < first
    encoded.clear()
    attack(x[wrong], y[wrong])
    assert encoded == []


def test_defense_gan_is_attacked_by_its_generator_alone(
    held_out: Digits, classifier: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its projection has no gradient: one descent finds where to start, and no other is made."""
    torch.manual_seed(0)
    gan = DefenseGAN({"latent": 5, "maps": 3}, {"steps": 3, "restarts": 2}, Shape(1, 8, 8, 10)).eval()
    calls = counted(gan, "latents", monkeypatch)
    assert gan.openings == ("latent",)
    moved = LatentPGD(View(Defended(gan, classifier)), eps=0.1, steps=4)(*held_out)
    assert calls == [len(moved)] and float((moved - held_out[0]).abs().max()) <= 0.1 + 1e-6
    assert all(p.grad is None for p in gan.parameters())


def test_the_lead_is_that_of_the_best_wrong_class_or_of_the_target() -> None:
    attack, logits = LatentPGD(View(nearest())), torch.tensor([[3.0, 1.0, -2.0], [0.0, -7.0, -1.0]])
    assert attack._lead(logits, torch.tensor([0, 1])).tolist() == [-2.0, 7.0] and LEAD > 0
    attack.set_mode_targeted_by_label(quiet=True)
    assert attack._lead(logits, torch.tensor([0, 1])).tolist() == [2.0, -7.0]
