"""Each mended fault on the stock class, where it shows, and on ours, where it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from attacks.algorithms.base import CorrectedAttack
from attacks.algorithms.carlini_wagner import CW
from attacks.algorithms.deepfool import DeepFool
from attacks.algorithms.mim import MIM
from attacks.algorithms.pgd import PGD
from attacks.algorithms.rand_fgsm import RandFGSM
from attacks.seeding import Draws

Digits = tuple[Tensor, Tensor]
Make = Callable[[nn.Module], Any]
OURS: dict[str, Make] = {
    "rand-fgsm": RandFGSM,
    "cw": lambda model: CW(model, lr=0.2, steps=20),
    "deepfool": DeepFool,
    "mim": lambda model: MIM(model, eps=0.3, alpha=0.05),
    "pgd": lambda model: PGD(model, eps=0.3, alpha=0.05),
    "pgd-l2": lambda model: PGD(model, eps=2, alpha=0.4, norm="L2"),
}
STOCK: dict[str, Make] = {
    "rand-fgsm": torchattacks.RFGSM,
    "cw": torchattacks.CW,
    "deepfool": torchattacks.DeepFool,
    "mim": torchattacks.MIFGSM,
    "pgd": torchattacks.PGD,
    "pgd-l2": torchattacks.PGDL2,
}
TARGETED = [name for name in OURS if name != "deepfool"]


@pytest.fixture
def held_out(digits: Digits) -> Digits:
    return digits[0][1400:1432], digits[1][1400:1432]


class Score(nn.Module):
    """Logits [s, 0] of the score s that a function gives each image."""

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))  # where torchattacks looks for the device
        self.score = score

    def forward(self, x: Tensor) -> Tensor:
        score_N = self.score(x)
        return torch.stack((score_N, torch.zeros_like(score_N)), dim=1)


def linear(channels: int = 1, height: int = 4, width: int = 4) -> tuple[Score, Tensor]:
    """A linear model and its weights; images of 0.5 have the score 1."""
    w_CHW = torch.randn(channels, height, width, generator=torch.Generator().manual_seed(1))
    return Score(lambda x: ((x - 0.5) * w_CHW).flatten(1).sum(1) + 1), w_CHW


def one_by_one(attack: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([attack(a, b) for a, b in zip(x.split(1), y.split(1), strict=True)]).detach()


def fooled(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) != y).double().mean())


def lead(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """By how much the best wrong logit exceeds the label's."""
    own_N1 = logits_NK.gather(1, y_N[:, None])
    return (logits_NK.scatter(1, y_N[:, None], -torch.inf).amax(1, keepdim=True) - own_N1)[:, 0]


def l2(moved: Tensor, x: Tensor) -> Tensor:
    return (moved.detach() - x).flatten(1).norm(dim=1)


def test_rand_fgsm_spends_all_of_eps_where_the_stock_class_moves_a_pixel_by_twice_alpha() -> None:
    model, x, y = linear()[0], torch.full((8, 1, 4, 4), 0.5), torch.zeros(8, dtype=torch.long)
    stock = torchattacks.RFGSM(model, eps=0.3, alpha=0.05, steps=1)(x, y)
    assert float((stock - x).abs().max()) == pytest.approx(0.1)
    assert float((RandFGSM(model, eps=0.3, alpha=0.05)(x, y) - x).abs().max()) == pytest.approx(0.3)


def test_rand_fgsm_is_a_random_sign_step_and_then_fgsm_with_the_rest() -> None:
    (model, w_CHW), x = linear(), torch.full((8, 1, 4, 4), 0.5)
    attack = RandFGSM(model, eps=0.3, alpha=0.05)
    attack.draws = Draws(5, torch.arange(8))
    found = attack(x, torch.zeros(8, dtype=torch.long))
    by_hand = x + 0.05 * Draws(5, torch.arange(8)).sign(1, 4, 4) - 0.25 * w_CHW.sign()  # down the score of class 0
    assert torch.allclose(found, by_hand, atol=1e-6)


@pytest.mark.parametrize("name", ["rand-fgsm", "mim", "pgd"])
def test_images_stay_within_eps(name: str, held_out: Digits, classifier: nn.Module) -> None:
    moved = OURS[name](classifier)(*held_out)
    assert float((moved - held_out[0]).abs().max()) <= 0.3 + 1e-6


@pytest.mark.parametrize("name", OURS)
def test_images_are_valid_many_are_fooled_and_the_given_ones_stay(
    name: str, held_out: Digits, classifier: nn.Module
) -> None:
    x, y = held_out
    kept = x.clone()
    moved = OURS[name](classifier)(x, y)
    assert moved.shape == x.shape and moved.dtype == x.dtype and not moved.requires_grad
    assert 0 <= float(moved.min()) and float(moved.max()) <= 1
    assert fooled(classifier, moved, y) > 0.8
    assert torch.equal(x, kept) and not x.requires_grad


@pytest.mark.parametrize("name", TARGETED)
def test_targeted_attacks_reach_the_target(name: str, held_out: Digits, classifier: nn.Module) -> None:
    attack = CW(classifier, lr=0.2, steps=100) if name == "cw" else OURS[name](classifier)
    attack.set_mode_targeted_by_label(quiet=True)
    x, y = held_out
    target = (y + 1) % 10
    assert fooled(classifier, attack(x, target), target) < 0.4 < fooled(classifier, x, target)
    attack.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 10, quiet=True)
    assert fooled(classifier, attack(x, y), target) < 0.4


@pytest.mark.parametrize("name", OURS)
def test_any_shape_of_image_is_attacked(name: str) -> None:
    model, _ = linear(2, 9, 13)
    x, y = torch.full((3, 2, 9, 13), 0.5), torch.zeros(3, dtype=torch.long)
    assert fooled(model, OURS[name](model)(x, y), y) == 1


def test_cw_moves_pixels_at_0_and_1(held_out: Digits, classifier: nn.Module) -> None:
    x = (held_out[0] > 0.5).float()
    right = classifier(x).argmax(1) == held_out[1]
    x, y = x[right], held_out[1][right]
    assert fooled(classifier, torchattacks.CW(classifier, lr=0.2, steps=50)(x, y), y) == 0
    assert fooled(classifier, CW(classifier, lr=0.2, steps=50)(x, y), y) > 0.9


class Shifted(nn.Module):
    """The same classifier, since a softmax ignores what is added to all logits."""

    def __init__(self, model: nn.Module, by: float) -> None:
        super().__init__()
        self.model, self.by = model, by

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + self.by


def test_cw_sees_margins_among_negative_logits(held_out: Digits, classifier: nn.Module) -> None:
    x, y = held_out[0].clamp(0.05, 0.95), held_out[1]
    for family in (torchattacks.CW, CW):
        assert fooled(classifier, family(classifier, lr=0.05, steps=60)(x, y), y) > 0.9
    stock, ours = (family(Shifted(classifier, -100), lr=0.05, steps=60)(x, y) for family in (torchattacks.CW, CW))
    assert fooled(classifier, stock, y) == fooled(classifier, x, y) < 0.2
    assert fooled(classifier, ours, y) > 0.9


def test_cw_of_an_image_does_not_depend_on_the_others(held_out: Digits, classifier: nn.Module) -> None:
    x, y = held_out[0][:12].clamp(0.05, 0.95), held_out[1][:12]
    stock, ours = torchattacks.CW(classifier, lr=0.2), CW(classifier, lr=0.2, binary_search_steps=2)
    assert float((stock(x, y) - one_by_one(stock, x, y)).abs().max()) > 0.05
    assert torch.allclose(ours(x, y), one_by_one(ours, x, y), atol=1e-4)


def test_cw_finds_images_of_the_confidence_that_is_asked_for(held_out: Digits, classifier: nn.Module) -> None:
    x, y = held_out[0].clamp(0.05, 0.95), held_out[1]

    stock, ours = (
        lead(classifier(family(classifier, c=5, kappa=3, lr=0.1, steps=80)(x, y)), y)
        for family in (torchattacks.CW, CW)
    )
    assert float(stock.median()) < 1 and float(ours.min()) >= 3 - 1e-4


def test_a_search_for_c_finds_more_images_and_nearer_ones(held_out: Digits, classifier: nn.Module) -> None:
    x, y = held_out
    for c in (0.05, 20.0):
        plain, searched = (CW(classifier, c=c, lr=0.2, steps=40, binary_search_steps=n)(x, y) for n in (0, 4))
        alone, both = classifier(plain).argmax(1) != y, classifier(searched).argmax(1) != y
        assert bool((alone <= both).all())
        assert bool((l2(searched, x) <= l2(plain, x))[alone].all())
        assert fooled(classifier, searched, y) > 0.9
        assert c < 1 or float(l2(searched, x).mean()) < 0.95 * float(l2(plain, x).mean())


def test_where_cw_finds_nothing_the_image_stays() -> None:
    flat, x = Score(lambda x: 0 * x.flatten(1).sum(1) + 1), torch.rand(3, 1, 4, 4)
    assert torch.equal(CW(flat, binary_search_steps=3)(x, torch.zeros(3, dtype=torch.long)), x)


def test_an_image_whose_logits_are_nan_is_no_success_of_cw() -> None:
    """The score of class 0 is negative and rises up to a pixel of .501; beyond it is NaN, for argmax the highest."""
    broken = Score(lambda x: -1 - (0.501 - x[:, 0, 0, 0]).sqrt())
    x, y = torch.full((2, 1, 4, 4), 0.5), torch.ones(2, dtype=torch.long)
    stock = torchattacks.CW(Shifted(broken, 2))(x, y)  # logits above 0, where the stock class sees a margin
    assert fooled(broken, stock, y) == 1 and bool(broken(stock).isnan().any())
    assert torch.equal(CW(broken)(x, y), x)


def test_deepfool_finds_the_stock_images_all_at_once(held_out: Digits, classifier: nn.Module) -> None:
    for x, y in (held_out, (held_out[0].clamp(0.2, 0.8), held_out[1])):
        stock, ours = torchattacks.DeepFool(classifier)(x, y), DeepFool(classifier)(x, y)
        assert torch.allclose(l2(ours, x), l2(stock, x), rtol=0.01, atol=1e-3)
        assert torch.allclose(ours, one_by_one(DeepFool(classifier), x, y), atol=1e-3)
    assert fooled(classifier, stock, y) > 0.9 and fooled(classifier, ours, y) > 0.9  # grey pixels, that can move


def test_deepfool_crosses_the_boundary_where_rounding_decides_for_the_stock_class(
    held_out: Digits, classifier: nn.Module
) -> None:
    exact = copy.deepcopy(classifier).double()
    on_it = {
        family: float((lead(exact(family(classifier)(*held_out).double()), held_out[1]) < 1e-6).double().mean())
        for family in (torchattacks.DeepFool, DeepFool)
    }
    assert on_it[torchattacks.DeepFool] > 0.5 and on_it[DeepFool] < 0.2


@pytest.mark.parametrize("label", [0, 1])
def test_where_the_gradient_is_zero_deepfool_stops_and_returns_no_nan(label: int) -> None:
    flat, x = Score(lambda x: 0 * x.flatten(1).sum(1) + (1 - 2 * label)), torch.rand(3, 1, 4, 4)
    y = torch.full((3,), label)
    stock = torchattacks.DeepFool(flat)(x, y)
    assert bool(stock.isnan().all())
    assert fooled(flat, stock, y) == label  # argmax takes the NaN of class 0 for the highest logit
    assert torch.equal(DeepFool(flat)(x, y), x)


def test_where_the_gradient_is_infinite_deepfool_stops_at_once_and_returns_no_nan() -> None:
    calls = []

    def score(x: Tensor) -> Tensor:
        calls.append(len(x))
        return 1 + x[:, 0, 0, 0].sqrt()

    x = torch.zeros(3, 1, 4, 4)
    assert torch.equal(DeepFool(Score(score))(x, torch.zeros(3, dtype=torch.long)), x)
    assert len(calls) == 3  # the given images, one step, and what it led to


def test_one_image_without_a_gradient_does_not_stop_the_others() -> None:
    _, w_CHW = linear()
    model = Score(lambda x: ((x - 0.5) * w_CHW).flatten(1).sum(1) * (x[:, 0, 0, 0] < 0.9) + 1)
    x, y = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.long)
    x[1, 0, 0, 0] = 1
    moved = DeepFool(model)(x, y)
    assert torch.equal(moved[1], x[1])
    assert (model(moved).argmax(1) != y).tolist() == [True, False, True]


def test_deepfool_leaves_what_is_wrong_already_and_names_the_class_that_it_reached(
    held_out: Digits, classifier: nn.Module
) -> None:
    x, y = held_out
    assert torch.equal(DeepFool(classifier)(x, (classifier(x).argmax(1) + 1) % 10), x)
    for steps in (1, 50):
        moved, reached = DeepFool(classifier, steps=steps).forward_return_target_labels(x, y)
        assert float((reached == classifier(moved).argmax(1)).double().mean()) > 0.9  # but where rounding decides


def test_deepfool_pays_only_for_the_classes_it_considers(
    held_out: Digits, classifier: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, grad = list[Any](), torch.autograd.grad

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    for classes in (2, 5, 10, 99):
        calls.clear()
        DeepFool(classifier, steps=1, classes=classes)(*held_out)
        assert len(calls) == min(classes, 10) - 1
    assert fooled(classifier, DeepFool(classifier, classes=2)(*held_out), held_out[1]) > 0.9


def test_deepfool_and_cw_find_the_nearest_image_of_a_linear_model() -> None:
    """A planted neighbour: the distance to the boundary w.x = 0 is |s| / |w|, along w."""
    (model, w_CHW), x = linear(), torch.full((4, 1, 4, 4), 0.5)
    x += 0.1 * torch.rand(x.shape, generator=torch.Generator().manual_seed(2))
    y, distance = model(x).argmax(1), model.score(x).abs() / w_CHW.norm()
    for attack in (DeepFool(model), CW(model, lr=0.02, steps=200, binary_search_steps=5)):
        moved = attack(x, y)
        assert fooled(model, moved, y) == 1
        assert torch.allclose(l2(moved, x), distance, rtol=0.03)


def plateau() -> Score:
    """A score that falls with the image's mean, is flat from .53 to .56, and turns negative at .58."""

    def score(x: Tensor) -> Tensor:
        mean_N = x.flatten(1).mean(1)
        return 1 - 10 * (mean_N - 0.5).clamp(max=0.03) - 50 * (mean_N - 0.56).clamp(min=0)

    return Score(score)


def test_mim_carries_its_momentum_over_a_plateau_where_the_stock_class_stays() -> None:
    model, x, y = plateau(), torch.full((2, 1, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
    budget: dict[str, Any] = {"eps": 0.1, "alpha": 0.02, "steps": 10, "decay": 1.0}
    assert fooled(model, torchattacks.MIFGSM(model, **budget)(x, y), y) == 0
    assert fooled(model, MIM(model, **budget)(x, y), y) == 1


def test_mim_is_the_stock_class_where_no_gradient_is_zero(held_out: Digits, classifier: nn.Module) -> None:
    stock, ours = torchattacks.MIFGSM(classifier)(*held_out), MIM(classifier)(*held_out)
    assert float((stock - ours).abs().gt(1e-6).double().mean()) < 1e-3  # signs of gradients that cancel to rounding


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("on purpose")


def composite(*modules: nn.Module) -> tuple[nn.Sequential, list[bool]]:
    """A training composite with a frozen first module, and every module's mode."""
    model = nn.Sequential(nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(64, 10)), *modules).train()
    model[0].eval()
    return model, [module.training for module in model.modules()]


@pytest.mark.parametrize("name", OURS)
def test_every_submodule_keeps_its_mode_and_parameters_get_no_gradient(name: str, held_out: Digits) -> None:
    for family, kept in ((STOCK, False), (OURS, True)):
        model, modes = composite(nn.Dropout())
        family[name](model)(*held_out)
        assert ([module.training for module in model.modules()] == modes) is kept
        touched = any(p.grad is not None for p in model.parameters())
        assert touched is (not kept and name in ("cw", "deepfool"))


@pytest.mark.parametrize("name", OURS)
def test_modes_and_the_normalisation_are_restored_when_the_model_raises(name: str, held_out: Digits) -> None:
    for family, kept in ((STOCK, False), (OURS, True)):
        model, modes = composite(Raises())
        attack = family[name](model)
        attack.set_normalization_used([0.0], [1.0])
        with pytest.raises(RuntimeError, match="on purpose"):
            attack(*held_out)
        assert ([module.training for module in model.modules()] == modes) is kept
        assert attack._normalization_applied is kept


class Sealed(nn.Module):
    """A classifier that lets no gradient through."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.classifier(x)


@pytest.mark.parametrize("name", OURS)
def test_where_no_gradient_flows_an_attack_has_no_aim_and_the_stock_class_raises(
    name: str, held_out: Digits, classifier: nn.Module
) -> None:
    sealed, (x, y) = Sealed(classifier), held_out
    if name != "cw":  # its distance has a gradient
        with pytest.raises(RuntimeError, match="does not require grad"):
            STOCK[name](sealed)(x, y)
    moved = OURS[name](sealed)(x, y)
    assert fooled(classifier, moved, y) < fooled(classifier, x, y) + 0.15
    assert name in ("rand-fgsm", "pgd", "pgd-l2") or torch.allclose(moved, x, atol=1e-5)  # but for a random start


@pytest.mark.parametrize("name", OURS)
def test_an_attack_also_runs_under_no_grad(name: str, held_out: Digits, classifier: nn.Module) -> None:
    with torch.no_grad():
        moved = OURS[name](classifier)(*held_out)
        assert not torch.is_grad_enabled()
    assert fooled(classifier, moved, held_out[1]) > 0.8


@pytest.mark.parametrize("name", OURS)
def test_each_has_the_interface_of_torchattacks(name: str) -> None:
    attack = OURS[name](linear()[0])
    assert isinstance(attack, CorrectedAttack) and isinstance(attack, torchattacks.attack.Attack)
    assert attack.supported_mode == (["default", "targeted"] if name in TARGETED else ["default"])
    assert repr(attack).startswith(type(attack).__name__ + "(")
