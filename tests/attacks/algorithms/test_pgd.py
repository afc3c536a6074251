"""An image's own random numbers, and PGD: closed forms, the stock classes where they are right, and what is mended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.algorithms.pgd import PGD
from attacks.seeding import Draws
from attacks.threat import Norm
from tests.attacks.algorithms.test_corrected import Score, Sealed, fooled, l2, linear

Digits = tuple[Tensor, Tensor]
NORMS: tuple[Norm, ...] = get_args(Norm)
BOUNDS: dict[Norm, tuple[float, float]] = {"Linf": (0.1, 0.025), "L2": (0.6, 0.15)}
both_norms = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture
def held_out(digits: Digits) -> Digits:
    return digits[0][1400:1464], digits[1][1400:1464]


def size(step: Tensor, norm: Norm) -> Tensor:
    return l2(step, torch.zeros_like(step)) if norm == "L2" else step.abs().flatten(1).amax(1)


def rights(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y


class Counting(nn.Module):
    """A classifier that counts the images that it is asked about."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier, self.passes = classifier, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += len(x)
        return self.classifier(x)


DRAWN: dict[str, Callable[[Draws], Tensor]] = {
    "uniform": lambda draws: draws.uniform(2, 9),
    "normal": lambda draws: draws.normal(2, 9),
    "sign": lambda draws: draws.sign(2, 9),
    "below": lambda draws: draws.below(7, 2, 9),
}
MOMENTS = {"uniform": (0.5, 1 / 12, 1.8), "normal": (0, 1, 3), "sign": (0, 1, 1), "below": (3, 4, 1.75)}


@pytest.mark.parametrize("kind", DRAWN)
def test_numbers_have_the_moments_of_their_law(kind: str) -> None:
    """Mean, variance and kurtosis over 180,000 numbers; over the images of each cell; and over the cells of each."""
    drawn = DRAWN[kind](Draws(3, torch.arange(10_000))).double().flatten(1)
    mean, variance, kurtosis = MOMENTS[kind]
    centred = drawn - mean
    assert drawn.shape == (10_000, 18)
    assert float(centred.mean()) == pytest.approx(0, abs=0.01 * variance**0.5)
    assert float(centred.square().mean()) == pytest.approx(variance, rel=0.02)
    assert float(centred.pow(4).mean()) == pytest.approx(kurtosis * variance**2, rel=0.03)
    assert float(centred.mean(0).abs().max()) < 0.05 * variance**0.5
    assert float(centred.mean(1).std()) == pytest.approx((variance / 18) ** 0.5, rel=0.05)


def test_integers_reach_every_value_below_the_bound_and_uniform_numbers_stay_below_1() -> None:
    draws = Draws(0, torch.arange(7000))
    counts = draws.below(7).bincount(minlength=7)
    assert len(counts) == 7 and 900 < int(counts.min()) and int(counts.max()) < 1100
    assert draws.below(7).ndim == 1 and draws.below(7).dtype == torch.long
    low, high = draws.uniform(50).aminmax()
    assert 0 <= float(low) < 1e-4 and 1 - 1e-4 < float(high) < 1
    assert bool(draws.normal(50).isfinite().all())


@pytest.mark.parametrize("kind", DRAWN)
def test_an_image_has_the_same_numbers_in_every_batch_and_others_at_each_call(kind: str) -> None:
    draw, some = DRAWN[kind], torch.tensor([7, 3, 11])
    whole, part = Draws(5, torch.arange(12)), Draws(5, some)
    first, second = draw(whole), draw(whole)
    assert torch.equal(draw(part), first[some]) and torch.equal(draw(part), second[some])
    assert not torch.equal(first, second)
    for other in (Draws(6, torch.arange(12)), Draws(5, torch.arange(1, 13)), Draws(6, torch.arange(-1, 11))):
        assert not torch.equal(draw(other), first)


def test_numbers_of_two_images_are_not_alike() -> None:
    normal = Draws(0, torch.arange(200)).normal(64)
    together = normal @ normal.T / 64
    assert float(together.fill_diagonal_(0).abs().max()) < 0.75  # 6 standard errors of a correlation of 0
    assert len(normal.flatten().unique()) > 0.999 * normal.numel()


def test_numbers_leave_the_generators_of_torch_alone() -> None:
    before = torch.get_rng_state()
    for draw in DRAWN.values():
        draw(Draws(1, torch.arange(5)))
    assert torch.equal(torch.get_rng_state(), before)


@both_norms
@pytest.mark.parametrize("start", [False, True])
def test_it_reaches_the_optimum_of_a_linear_model(norm: Norm, start: bool) -> None:
    (model, w_CHW), x, y = linear(), torch.full((4, 1, 4, 4), 0.5), torch.tensor([0, 1, 0, 1])
    eps = BOUNDS[norm][0]
    way_CHW = w_CHW.sign() if norm == "Linf" else w_CHW / w_CHW.norm()
    down_N111 = torch.tensor([-1.0, 1, -1, 1])[:, None, None, None]  # class 0 has the score, class 1 has 0
    for steps, alpha in ((1, eps), (40, eps)):
        moved = PGD(model, eps, alpha, steps, start and steps > 1, norm)(x, y)
        assert torch.allclose(moved, x + eps * down_N111 * way_CHW, atol=1e-5)


@both_norms
def test_targeted_it_lowers_the_loss_of_the_target(norm: Norm) -> None:
    (model, w_CHW), x = linear(), torch.full((2, 1, 4, 4), 0.5)
    attack = PGD(model, 0.1, 0.1, 1, False, norm)
    attack.set_mode_targeted_by_label(quiet=True)
    way_CHW = w_CHW.sign() if norm == "Linf" else w_CHW / w_CHW.norm()
    assert torch.allclose(attack(x, torch.tensor([0, 1])) - x, 0.1 * torch.stack((way_CHW, -way_CHW)), atol=1e-6)


STOCK: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = {
    "fgsm": (lambda m: torchattacks.FGSM(m, 0.1), lambda m: PGD(m, 0.1, 0.1, 1, False)),
    "ifgsm": (lambda m: torchattacks.BIM(m, 0.1, 0.01, 10), lambda m: PGD(m, 0.1, 0.01, 10, False)),
    "pgd": (
        lambda m: torchattacks.PGD(m, 0.1, 0.025, 10, random_start=False),
        lambda m: PGD(m, 0.1, 0.025, 10, False),
    ),
    "pgd-l2": (
        lambda m: torchattacks.PGDL2(m, 0.6, 0.15, 10, random_start=False),
        lambda m: PGD(m, 0.6, 0.15, 10, False, "L2"),
    ),
}


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("targeted", [False, True])
def test_it_is_the_stock_class_where_nothing_is_random(
    name: str, targeted: bool, held_out: Digits, classifier: nn.Module
) -> None:
    stock, ours = (make(classifier) for make in STOCK[name])
    x, y = held_out[0].clamp(0.01, 0.99), held_out[1]
    if targeted:
        y = (y + 1) % 10
        for attack in (stock, ours):
            attack.set_mode_targeted_by_label(quiet=True)
    moved, theirs = ours(x, y), stock(x, y)
    assert float((moved - x).abs().amax()) > 0.05
    assert torch.allclose(moved, theirs, atol=1e-5)


class Scaled(nn.Module):
    """Logits of which all but a trace is taken."""

    def __init__(self, model: nn.Module, by: float) -> None:
        super().__init__()
        self.model, self.by = model, by

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.by


def test_in_l2_it_goes_as_far_on_small_gradients_where_the_stock_class_divides_by_more(
    held_out: Digits, classifier: nn.Module
) -> None:
    x, y = held_out
    stock, ours = (
        [attack(Scaled(classifier, by))(x, y) for by in (1, 1e-10)]
        for attack in (
            lambda model: torchattacks.PGDL2(model, 0.6, 0.06, 10, random_start=False),
            lambda model: PGD(model, 0.6, 0.06, 10, False, "L2"),
        )
    )
    plain, small = (float(l2(moved, x).mean()) for moved in stock)
    assert small < 0.2 * plain
    plain, small = (float(l2(moved, x).mean()) for moved in ours)
    assert small > 0.9 * plain and fooled(classifier, ours[1], y) > fooled(classifier, stock[1], y) + 0.2


@pytest.mark.parametrize(("norm", "alpha"), [("Linf", 0.05), ("L2", 0.2)])
def test_an_image_that_an_earlier_step_has_fooled_is_returned_as_found(norm: Norm, alpha: float) -> None:
    """The score falls to a narrow valley, where it is negative; steps of 0.05 a pixel go there and beyond, in turn."""
    valley = Score(lambda x: 10 * ((x.flatten(1).mean(1) - 0.56).abs() - 0.02))
    x, y = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.long)
    stock = (torchattacks.PGD if norm == "Linf" else torchattacks.PGDL2)(valley, 1, alpha, 2, random_start=False)
    ours = PGD(valley, 1, alpha, 2, False, norm)
    assert fooled(valley, stock(x, y), y) == fooled(valley, ours(x, y), y) == 0
    ours.stops = True
    assert torch.allclose(ours(x, y), torch.full_like(x, 0.55)) and fooled(valley, ours(x, y), y) == 1


@both_norms
def test_stopping_costs_fewer_passes_and_spares_nobody(norm: Norm, held_out: Digits, classifier: nn.Module) -> None:
    (x, y), found = held_out, []
    eps, alpha = BOUNDS[norm]
    for stops in (False, True):
        model = Counting(classifier)
        attack = PGD(model, eps, alpha, norm=norm)
        attack.stops = stops
        found.append((rights(classifier, attack(x, y), y), model.passes))
    (plain, every), (stopped, fewer) = found
    assert bool((stopped <= plain).all()) and 0 < int(stopped.sum()) < int(rights(classifier, x, y).sum())
    assert every == 640 and fewer < 0.8 * every


def test_an_image_that_is_wrong_as_given_stays_where_the_attack_stops(held_out: Digits, classifier: nn.Module) -> None:
    x, y = held_out[0], (held_out[1] + torch.arange(64) % 2) % 10
    attack = PGD(classifier, 0.1, random_start=False)
    attack.stops = True
    wrong, moved = ~rights(classifier, x, y), attack(x, y)
    assert 20 < int(wrong.sum()) < 44 and torch.equal(moved[wrong], x[wrong])
    assert bool((moved != x).flatten(1).any(1)[~wrong].all())


@both_norms
@pytest.mark.parametrize("stops", [False, True])
def test_an_image_does_not_depend_on_those_beside_it(
    norm: Norm, stops: bool, held_out: Digits, classifier: nn.Module
) -> None:
    (x, y), ids, eps = held_out, torch.arange(64), BOUNDS[norm][0]
    attack = PGD(classifier, eps, eps / 10, steps=3, norm=norm)  # so short that the start shows
    attack.stops = stops

    def drawn(chosen: Tensor) -> Tensor:
        attack.draws = Draws(5, chosen)
        moved: Tensor = attack(x[chosen], y[chosen])
        return moved

    whole = drawn(ids)
    for parts in (ids.split(5), [ids.flip(0)]):
        assert torch.allclose(whole[torch.cat(list(parts))], torch.cat([drawn(part) for part in parts]), atol=1e-5)
    stock = (torchattacks.PGD if norm == "Linf" else torchattacks.PGDL2)(classifier, eps, eps / 10, 3)
    torch.manual_seed(0)
    together = stock(x, y)
    torch.manual_seed(0)
    assert not torch.allclose(together[32:], stock(x[32:], y[32:]), atol=eps / 10)


@both_norms
def test_a_random_start_fills_the_ball(norm: Norm) -> None:
    x, eps = torch.full((500, 1, 8, 8), 0.5), 0.4
    start = PGD(linear(1, 8, 8)[0], eps, steps=0, norm=norm)(x, torch.zeros(500, dtype=torch.long)) - x
    sizes = size(start, norm)
    assert float(sizes.max()) <= eps + 1e-6 and float(start.mean().abs()) < 0.01
    if norm == "Linf":  # uniform in each pixel
        assert float(sizes.min()) > 0.8 * eps
        assert float(start.std()) == pytest.approx(eps / 3**0.5, rel=0.02)
    else:  # the radius is uniform, the direction is
        assert float(sizes.min()) < 0.02 * eps and float(sizes.mean()) == pytest.approx(eps / 2, rel=0.1)
        spread_D = (start.flatten(1) / sizes[:, None]).square().mean(0)
        assert float(spread_D.min()) > 0.5 / 64 and float(spread_D.max()) < 1.6 / 64
    assert torch.equal(PGD(linear(1, 8, 8)[0], eps, steps=0, random_start=False, norm=norm)(x, x[:, 0, 0, 0].long()), x)


@both_norms
def test_without_draws_an_image_takes_the_numbers_of_its_place(norm: Norm) -> None:
    x, y = torch.full((6, 1, 4, 4), 0.5), torch.zeros(6, dtype=torch.long)
    attack = PGD(linear()[0], 0.1, steps=0, norm=norm)
    moved = attack(x, y)
    assert torch.equal(attack(x, y), moved) and len(moved.flatten(1).unique(dim=0)) == 6


def test_images_stay_in_the_range_of_pixels(held_out: Digits, classifier: nn.Module) -> None:
    for norm, eps in (("Linf", 0.9), ("L2", 9.0)):
        moved = PGD(classifier, eps, eps / 2, norm=norm)(*held_out)  # type: ignore[arg-type]
        assert [float(edge) for edge in moved.aminmax()] == [0, 1]


@both_norms
def test_gains_are_the_mean_losses_before_each_step_of_those_still_attacked(
    norm: Norm, held_out: Digits, classifier: nn.Module
) -> None:
    (x, y), (eps, alpha) = held_out, BOUNDS[norm]

    def gains(steps: int, stops: bool = False) -> list[float]:
        attack.steps, attack.stops = steps, stops
        attack(x, y)
        return [float(gain) for gain in attack.gains]

    attack = PGD(classifier, eps, alpha, random_start=False, norm=norm)
    rises = gains(10)
    assert len(rises) == 10 and rises[-1] > 2 * rises[0]
    attack.steps = 3
    assert rises[3] == pytest.approx(float(F.cross_entropy(classifier(attack(x, y)), y)), rel=1e-4)
    right = rights(classifier, x, y)
    standing = F.cross_entropy(classifier(PGD(classifier, eps, alpha, 1, False, norm)(x[right], y[right])), y[right])
    assert gains(2, stops=True) == [pytest.approx(rises[0]), pytest.approx(float(standing), rel=1e-4)]
    assert len(gains(3)) == 3  # of this call alone


@both_norms
def test_where_no_gradient_flows_images_stay_and_where_it_is_zero(
    norm: Norm, held_out: Digits, classifier: nn.Module
) -> None:
    flat = Score(lambda x: 0 * x.flatten(1).sum(1) + 1)
    for model, y in ((Sealed(classifier), held_out[1]), (flat, held_out[1] % 2)):
        assert torch.equal(PGD(model, 0.3, random_start=False, norm=norm)(held_out[0], y), held_out[0])


@both_norms
@pytest.mark.parametrize("stops", [False, True])
def test_no_image_is_an_answer_to_none(norm: Norm, stops: bool, held_out: Digits, classifier: nn.Module) -> None:
    attack = PGD(classifier, norm=norm)
    attack.stops = stops
    assert attack(held_out[0][:0], held_out[1][:0]).shape == (0, 1, 8, 8)
