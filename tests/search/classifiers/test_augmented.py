"""The recipe with random crops and flips, against what it is to do image by image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search.classifiers import augmented as module
from search.classifiers.architectures import ARCHITECTURES
from search.classifiers.augmented import PAD, augmented, train_augmented
from search.data.datasets import DATASETS
from search.trial.assets import Assets
from tests.conftest import digits_study


def test_an_image_is_shifted_by_at_most_two_pixels_and_mirrored_or_not() -> None:
    torch.manual_seed(0)
    x_NCHW = torch.rand(300, 3, 6, 7)
    seen = set()
    for x, made in zip(F.pad(x_NCHW, 4 * (PAD,)), augmented(x_NCHW), strict=True):
        crops = {(i, j): x[:, i : i + 6, j : j + 7] for i in range(5) for j in range(5)}
        forms = {(*place, flip): crop.flip(2) if flip else crop for place, crop in crops.items() for flip in (0, 1)}
        (found,) = [name for name, form in forms.items() if torch.equal(form, made)]
        seen.add(found)
    assert PAD == 2 and len(seen) == 50


def small(digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return digits[0][:400], digits[1][:400]


def test_it_learns_the_digits_and_depends_on_nothing_before(digits: tuple[Tensor, Tensor]) -> None:
    networks = [ARCHITECTURES["defensegan-E"].build(DATASETS["digits"].shape) for _ in range(2)]
    for network in networks:
        assert train_augmented(network, *small(digits), epochs=12, seed=0) > 0.2
        assert all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True))


def test_the_rate_is_halved_where_held_out_loss_stalls_and_the_best_weights_are_kept(
    digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, rates, weights = ARCHITECTURES["defensegan-E"].build(DATASETS["digits"].shape), list[float](), []
    given = iter([1.0, 0.5, *10 * [0.7]])
    adam = torch.optim.Adam

    def made(*given: object, **named: object) -> torch.optim.Adam:
        rates_of.append(adam(*given, **named))  # type: ignore[arg-type]
        return rates_of[0]

    def loss(network: nn.Module, x_NCHW: Tensor, y_N: Tensor) -> float:
        assert len(x_NCHW) == 40  # a tenth
        rates.append(rates_of[0].param_groups[0]["lr"])
        weights.append([tensor.clone() for tensor in network.state_dict().values()])
        return next(given)

    rates_of: list[torch.optim.Adam] = []
    monkeypatch.setattr(torch.optim, "Adam", made)
    monkeypatch.setattr(module, "_loss", loss)
    train_augmented(network, *small(digits), epochs=50, seed=0)
    assert rates == [1e-3] * 6 + [5e-4] * 4 + [2.5e-4] * 2  # 12 epochs: the best is the second, then ten worse
    assert all(torch.equal(a, b) for a, b in zip(weights[1], network.state_dict().values(), strict=True))


def test_a_study_s_classifiers_are_trained_by_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = [
        digits_study(tmp_path, train_images=200, classifier_epochs=1, classifier_recipe=recipe)
        for recipe in ("plain", "augmented")
    ]
    plain, other = (Assets(study, study.store) for study in studies)
    assert plain.classifier_key("A") != other.classifier_key("A")
    called = list[int]()

    def spied(network: nn.Module, x_NCHW: Tensor, y_N: Tensor, epochs: int, seed: int) -> float:
        called.append(len(x_NCHW))
        return train_augmented(network, x_NCHW, y_N, epochs, seed)

    monkeypatch.setattr(module, "train_augmented", spied)
    plain.classifier("A")
    assert called == []
    other.classifier("A")
    assert called == [200]
