"""HGD against the paper: the residual form, the three guides, and the pairs that it is trained on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks.catalog import IFGSM
from attacks.threat import ThreatModel
from defenses.base import Batches, Shape, Tensors, halved
from defenses.hgd import HGD
from spaces.exceptions import InputError

MNIST, CIFAR, DIGITS = Shape(1, 28, 28, 10), Shape(3, 32, 32, 10), Shape(1, 8, 8, 10)
COIL, ODD = Shape(3, 128, 128, 100), Shape(2, 9, 13, 4)
SMALL = {"maps": 4, "levels": 2}


def build(shape: Shape = ODD, **train: object) -> HGD:
    torch.manual_seed(0)
    return HGD(SMALL | train, {}, shape).eval()  # type: ignore[arg-type]


def images(shape: Shape, n: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, shape.channels, shape.height, shape.width, generator=generator)


def linear(shape: Shape = ODD) -> nn.Module:
    """A frozen classifier."""
    torch.manual_seed(3)
    pixels = shape.channels * shape.height * shape.width
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, shape.classes)).eval().requires_grad_(False)


def test_the_denoiser_is_a_u_net_whose_parameters_count_as_by_hand() -> None:
    def level(inputs: int, outputs: int) -> int:
        """Two 3 x 3 convolutions without bias, each with BatchNorm's scale and shift."""
        return 9 * inputs * outputs + 9 * outputs * outputs + 4 * outputs

    down = level(1, 32) + level(32, 64) + level(64, 128) + level(128, 256)
    up = level(256 + 128, 128) + level(128 + 64, 64) + level(64 + 32, 32)
    assert sum(p.numel() for p in HGD({}, {}, MNIST).parameters()) == down + up + (32 + 1)


@pytest.mark.parametrize("shape", [MNIST, CIFAR, DIGITS, COIL, ODD], ids=str)
def test_purified_images_keep_shape_dtype_and_range(shape: Shape) -> None:
    x = images(shape, 2)
    purified = build(shape).purify(x).detach()
    assert purified.shape == x.shape and purified.dtype == x.dtype
    assert 0 <= float(purified.min()) and float(purified.max()) <= 1


def test_what_the_network_takes_for_noise_is_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x = build(), images(ODD)
    noise = torch.randn_like(x)
    monkeypatch.setattr(defense.denoiser, "forward", lambda x_NCHW: noise)
    by_hand = [min(max(a - b, 0.0), 1.0) for a, b in zip(x.flatten().tolist(), noise.flatten().tolist(), strict=True)]
    assert defense.purify(x).flatten().tolist() == pytest.approx(by_hand, abs=1e-6)


def test_too_many_levels_for_the_images_are_refused() -> None:
    assert build(DIGITS, levels=4).purify(images(DIGITS)).shape == (6, 1, 8, 8)
    with pytest.raises(InputError, match=re.escape("at least 16 pixels a side, but they have 8")):
        build(DIGITS, levels=5)


@pytest.mark.parametrize("guide", ["logits", "pixels", "labels"])
def test_each_guides_loss_is_the_papers(guide: str) -> None:
    defense, f, x, y = build(guide=guide), linear(), images(ODD), torch.tensor([0, 1, 2, 3, 0, 1])
    adversarial = (x + 0.1).clamp(0, 1)
    found = float(defense.loss(adversarial, defense.targets(x, y, f), f).detach())
    purified = defense.purify(adversarial).detach()
    terms = []
    for n in range(len(x)):
        if guide == "pixels":
            pairs = zip(purified[n].double().flatten().tolist(), x[n].double().flatten().tolist(), strict=True)
            terms += [abs(a - b) for a, b in pairs]
            continue
        logits = f(purified[n : n + 1])[0].double().tolist()
        if guide == "logits":
            terms += [abs(a - b) for a, b in zip(logits, f(x[n : n + 1])[0].double().tolist(), strict=True)]
        else:
            terms.append(math.log(sum(math.exp(a) for a in logits)) - logits[int(y[n])])
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_the_papers_attacks_are_fgsm_and_ifgsm_of_two_four_and_eight_steps() -> None:
    threat, still = ThreatModel("Linf", 0.16, "oblivious"), {"norm": "Linf", "random_start": False}
    found = {attack.name: attack.options(threat) for attack in build().attacks()}
    assert found == {
        "fgsm": {"eps": 0.16, "alpha": 0.16, "steps": 1, **still},
        "ifgsm-2": {"eps": 0.16, "alpha": 0.08, "steps": 2, **still},
        "ifgsm-4": {"eps": 0.16, "alpha": 0.04, "steps": 4, **still},
        "ifgsm-8": {"eps": 0.16, "alpha": 0.02, "steps": 8, **still},
    }
    assert [attack.name for attack in build(attack="fgsm").attacks()] == ["fgsm"]
    (pgd,) = build(attack="pgd").attacks()
    options = pgd.options(replace(threat, eps=0.3))
    assert options.pop("norm") == "Linf" and options == pytest.approx({"eps": 0.3, "alpha": 0.01, "steps": 40})


def test_images_are_spread_evenly_over_the_strengths_of_every_attack() -> None:
    """On grey images FGSM moves every pixel by the bound itself."""
    defense, x, y = build(eps=0.4, strengths=4), torch.full((8, 2, 9, 13), 0.5), torch.zeros(8).long()
    made = defense.adversarial(x, y, linear())
    moved = {name: (adversarial - x).abs().amax((1, 2, 3)).tolist() for name, adversarial in made.items()}
    assert moved["fgsm"] == pytest.approx([0.1, 0.2, 0.3, 0.4] * 2, abs=1e-6)
    assert moved["ifgsm-2"] == pytest.approx([0.2, 0.3, 0.4, 0.1] * 2, abs=1e-6)
    assert moved["ifgsm-8"] == pytest.approx([0.4, 0.1, 0.2, 0.3] * 2, abs=1e-6)


@pytest.mark.parametrize("strengths", [1, 16])
def test_fewer_images_than_strengths_are_attacked_too(strengths: int) -> None:
    made = build(strengths=strengths).adversarial(images(ODD, 3), torch.tensor([0, 1, 2]), linear())
    assert all(bool((adversarial != images(ODD, 3)).flatten(1).any(1).all()) for adversarial in made.values())


def test_every_image_and_its_adversarial_versions_meet_their_own_clean_image(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x, asked = build(guide="pixels", eps=0.05, strengths=1), images(ODD, 20), list[str]()
    met = list[tuple[Tensor, Tensor]]()
    loss = defense.loss

    def spied(x_NCHW: Tensor, target: Tensor, classifier: nn.Module) -> Tensor:
        met.append((x_NCHW, target))
        return loss(x_NCHW, target, classifier)

    def once(shaped_by: str, make: Callable[[], Tensors]) -> Tensors:
        asked.append(shaped_by)
        return halved(make())

    monkeypatch.setattr(defense, "loss", spied)
    batches = Batches(x, torch.arange(20) % 4, epochs=1, batch_size=30, once=once)
    (metrics,) = defense.fit(batches, linear())
    inputs, targets = (torch.cat(parts) for parts in zip(*met, strict=True))
    distance = (inputs - targets).abs().amax((1, 2, 3))
    assert len(inputs) == 5 * 20 and inputs.dtype == x.dtype
    assert float(distance.max()) <= 0.05 + 1e-3  # float16 rounds by up to 1 / 2048
    assert int((distance < 1e-3).sum()) == 20  # the clean images
    assert all(int((targets == image).all(dim=(1, 2, 3)).sum()) == 5 for image in x)
    assert len(asked) == 1 and math.isfinite(metrics["loss"])


def test_the_learning_rate_falls_to_a_tenth_once_when_the_loss_has_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    defense = build(attack="fgsm", strengths=1)
    flat = next(defense.parameters())
    monkeypatch.setattr(defense, "loss", lambda x_NCHW, target, classifier: 1 + 0 * flat.sum())
    batches = Batches(images(ODD), torch.tensor([0, 1, 2, 3, 0, 1]), epochs=9, batch_size=12)
    rates = [defense.progress()["adam"]["param_groups"][0]["lr"] for _ in defense.fit(batches, linear())]
    assert rates == pytest.approx([1e-3] * 3 + [1e-4] * 6)


def test_the_surrogate_is_the_purifier_with_a_gradient_for_clipped_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    defense = build()
    monkeypatch.setattr(defense.denoiser, "forward", lambda x_NCHW: torch.full_like(x_NCHW, 0.5))
    x = images(ODD).requires_grad_()
    assert torch.equal(defense.surrogate(x), defense.purify(x))
    (exact,) = torch.autograd.grad(defense.purify(x).sum(), x)
    (slope,) = torch.autograd.grad(defense.surrogate(x).sum(), x)
    black = x < 0.5
    assert set(exact[black].tolist()) == {0.0} and set(exact[~black].tolist()) == {1.0}
    assert slope[black].tolist() == pytest.approx([0.1] * int(black.sum()))
    assert set(slope[~black].tolist()) == {1.0}
    assert defense.gradients == ("surrogate", "bpda", "exact")


def test_an_image_that_alone_stands_in_a_batch_is_purified_alike() -> None:
    defense, x = build(), images(ODD)
    assert not defense.stochastic
    assert torch.allclose(defense.purify(x), torch.cat([defense.purify(one) for one in x.split(1)]), atol=1e-5)


def test_obliviously_attacked_digits_are_restored(digits: tuple[Tensor, Tensor], classifier: nn.Module) -> None:
    defense = build(DIGITS, maps=8, attack="fgsm", strengths=4, learning_rate=3e-3)
    before = [parameter.clone() for parameter in classifier.parameters()]
    batches = Batches(digits[0][:1400], digits[1][:1400], epochs=3, batch_size=32)
    losses = [metrics["loss"] for metrics in defense.fit(batches, classifier)]
    assert losses[-1] < 0.7 * losses[0]
    x, y = digits[0][1400:], digits[1][1400:]
    attacked = IFGSM.craft(classifier, x, y, ThreatModel("Linf", 0.2, "oblivious"), seed=0)

    def accuracy(x_NCHW: Tensor) -> float:
        return float((classifier(x_NCHW).argmax(1) == y).float().mean())

    with torch.no_grad():
        clean, bare, restored = (accuracy(i) for i in (defense.eval().purify(x), attacked, defense.purify(attacked)))
    assert clean > accuracy(x) - 0.03
    assert bare < 0.2 and restored > bare + 0.3
    assert all(torch.equal(a, b) for a, b in zip(before, classifier.parameters(), strict=True))
