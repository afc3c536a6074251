"""The parts of AutoAttack: against closed forms and slow loops, and each mended fault on the stock class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast, get_args

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torchattacks.attacks.fab import projection_l2, projection_linf

from attacks.algorithms.apgd import APGD, Loss, _checkpoints
from attacks.algorithms.base import CorrectedAttack
from attacks.algorithms.fab import FAB, to_plane
from attacks.algorithms.square import Square, _eta
from attacks.gradient_view import View
from attacks.seeding import Draws
from attacks.threat import Norm
from spaces.exceptions import InputError

Digits = tuple[Tensor, Tensor]
NORMS: tuple[Norm, ...] = get_args(Norm)
EPS: dict[Norm, float] = {"Linf": 0.1, "L2": 0.5}
OURS: dict[str, Callable[[nn.Module, float, Norm], Any]] = {
    "apgd-ce": lambda model, eps, norm: APGD(model, eps, 20, norm),
    "apgd-dlr": lambda model, eps, norm: APGD(model, eps, 20, norm, "dlr", restarts=2),
    "apgd-t": lambda model, eps, norm: APGD(model, eps, 12, norm, "targeted"),
    "fab-t": lambda model, eps, norm: FAB(model, eps, 10, norm),
    "square": lambda model, eps, norm: Square(model, eps, 150, norm),
}
STOCK: dict[str, Callable[[nn.Module, float, Norm], Any]] = {
    "apgd-ce": lambda model, eps, norm: torchattacks.APGD(model, norm, eps, 20),
    "apgd-dlr": lambda model, eps, norm: torchattacks.APGD(model, norm, eps, 20, 2, loss="dlr"),
    "apgd-t": lambda model, eps, norm: torchattacks.APGDT(model, norm, eps, 12),
    "fab-t": lambda model, eps, norm: torchattacks.FAB(model, norm, eps, 10, multi_targeted=True),
    "square": lambda model, eps, norm: torchattacks.Square(model, norm, eps, 150),
}
every_part = pytest.mark.parametrize("name", OURS)
both_norms = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture
def held_out(digits: Digits) -> Digits:
    return digits[0][1400:1432], digits[1][1400:1432]


class Seen(nn.Module):
    """A model of which every image that it is asked about is kept; some of its logits, and scaled."""

    def __init__(
        self, model: Callable[[Tensor], Tensor], classes: Sequence[int] | slice = slice(None), scale: float = 1
    ) -> None:
        super().__init__()
        self.device = nn.Parameter(torch.zeros(1))  # where torchattacks looks for the device
        self.model, self.classes, self.scale = model, classes, scale
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        return self.scale * self.model(x)[:, self.classes]

    @property
    def passes(self) -> int:
        return sum(map(len, self.asked))


def linear(height: int = 4, width: int = 4) -> tuple[Seen, Tensor]:
    """A linear model of two classes, and its weights: images of 0.5 are of class 0, by a lead of 1."""
    w_CHW = torch.randn(1, height, width, generator=torch.Generator().manual_seed(1))

    def logits(x: Tensor) -> Tensor:
        score_N = ((x - 0.5) * w_CHW).flatten(1).sum(1) + 1
        return torch.stack((score_N, torch.zeros_like(score_N)), dim=1)

    return Seen(logits), w_CHW


def grey(images: int, height: int = 4, width: int = 4) -> Digits:
    return torch.full((images, 1, height, width), 0.5), torch.zeros(images, dtype=torch.long)


def wrong(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) != y


def size(step: Tensor, norm: Norm) -> Tensor:
    return torch.linalg.vector_norm(step.detach().flatten(1), ord=math.inf if norm == "Linf" else 2, dim=1)


@both_norms
@every_part
def test_images_stay_within_eps_many_are_fooled_and_the_given_ones_stay(
    name: str, norm: Norm, held_out: Digits, classifier: nn.Module
) -> None:
    x, y = held_out
    kept = x.clone()
    moved = OURS[name](classifier, EPS[norm], norm)(x, y)
    assert moved.shape == x.shape and moved.dtype == x.dtype and not moved.requires_grad
    assert 0 <= float(moved.min()) and float(moved.max()) <= 1
    assert float(size(moved - x, norm).max()) <= EPS[norm] + 1e-6
    assert int(wrong(classifier, moved, y).sum()) >= 11 > 2 * int(wrong(classifier, x, y).sum())
    assert torch.equal(x, kept)


@pytest.mark.parametrize(("norm", "stops"), [("Linf", True), ("L2", False)])
@every_part
def test_an_image_does_not_depend_on_those_beside_it(
    name: str, norm: Norm, stops: bool, held_out: Digits, classifier: nn.Module
) -> None:
    (x, y), ids = held_out, torch.arange(32)
    attack = OURS[name](classifier, EPS[norm], norm)

    def drawn(i: Tensor) -> Tensor:
        attack.draws = Draws(5, i)
        return cast(Tensor, attack(x[i], y[i]))

    attack.stops = stops
    assert torch.allclose(drawn(ids), torch.cat([drawn(i) for i in ids.split(8)]), atol=1e-4)


@both_norms
@every_part
def test_stopping_costs_less_and_fools_the_same_images(
    name: str, norm: Norm, held_out: Digits, classifier: nn.Module
) -> None:
    x, y = held_out
    passes, verdicts = [], []
    for stops in (False, True):
        model = Seen(classifier)
        attack = OURS[name](model, EPS[norm], norm)
        attack.stops = stops
        verdicts.append(wrong(classifier, attack(x, y), y))
        passes.append(model.passes)
    assert torch.equal(*verdicts)
    assert passes[1] < 0.85 * passes[0]


@every_part
def test_a_stopped_image_comes_back_as_it_was_found(name: str, held_out: Digits, classifier: nn.Module) -> None:
    for x, y in list(zip(held_out[0].split(1), held_out[1].split(1), strict=True))[:8]:
        model = Seen(classifier)
        attack = OURS[name](model, 0.15, "Linf")
        attack.stops = True
        moved, asked = attack(x, y), torch.cat(model.asked)
        hits = asked[wrong(classifier, asked, y) & (size(asked - x, "Linf") <= 0.15 + 1e-6)]
        assert len(hits) == int(wrong(classifier, moved, y)) and all(torch.equal(moved[0], hit) for hit in hits)


class Breaks(nn.Module):
    """A layer that raises from the given pass on."""

    def __init__(self, after: float) -> None:
        super().__init__()
        self.left = after

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("on purpose")
        return x


@pytest.mark.parametrize("after", [math.inf, 2])
@every_part
def test_generator_modes_and_parameters_are_left_alone_also_where_the_model_raises(
    name: str, after: float, held_out: Digits
) -> None:
    x = held_out[0]
    for family, tidy in ((STOCK, False), (OURS, True)):
        model = nn.Sequential(nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(64, 10)), Breaks(after)).train()
        model[0].eval()
        modes, state = [module.training for module in model.modules()], torch.get_rng_state()
        attack = family[name](model, 0.1, "Linf")
        try:
            attack(x, model[0](x).argmax(1))
            assert after == math.inf
        except RuntimeError:
            assert after == 2
        assert torch.equal(torch.get_rng_state(), state) is tidy  # a stock attack resets it and then draws from it
        assert ([module.training for module in model.modules()] == modes) is tidy
        assert not tidy or all(parameter.grad is None for parameter in model.parameters())


def test_the_stock_class_replays_a_defense_s_noise(held_out: Digits, classifier: nn.Module) -> None:
    for family, replayed in ((STOCK, True), (OURS, False)):
        noise = []
        for _ in range(2):
            family["apgd-ce"](classifier, 0.1, "Linf")(*held_out)
            noise.append(torch.rand(4))
        assert torch.equal(*noise) is replayed


@both_norms
@every_part
def test_images_in_double_precision_are_attacked_too(name: str, norm: Norm, held_out: Digits) -> None:
    model, (x, y) = linear()[0], grey(3)
    found = OURS[name](model, 2 * EPS[norm], norm)(x.double(), y)
    assert found.dtype == torch.float64 and bool(wrong(model, found, y).all())


@every_part
def test_no_image_is_an_answer_to_none(name: str, held_out: Digits, classifier: nn.Module) -> None:
    x, y = held_out
    assert OURS[name](classifier, 0.1, "Linf")(x[:0], y[:0]).shape == (0, 1, 8, 8)


@every_part
def test_an_attack_also_runs_under_no_grad(name: str, held_out: Digits, classifier: nn.Module) -> None:
    attack = OURS[name](classifier, 0.1, "Linf")
    with torch.no_grad():
        found = attack(*held_out)
        assert not torch.is_grad_enabled()
    assert torch.equal(found, attack(*held_out))


@both_norms
@every_part
def test_where_no_gradient_flows_nothing_breaks(name: str, norm: Norm, held_out: Digits) -> None:
    for model in (Seen(lambda x: torch.eye(10)[x.flatten(1).argmax(1) % 10]), Seen(lambda x: 0 * x.flatten(1)[:, :10])):
        moved = OURS[name](model, EPS[norm], norm)(*held_out)
        assert bool(moved.isfinite().all()) and float(size(moved - held_out[0], norm).max()) <= EPS[norm] + 1e-6


@every_part
def test_an_image_whose_logits_are_nan_is_no_success(name: str) -> None:
    model = Seen(lambda x: torch.stack((-(0.5 - x.flatten(1).amax(1)).sqrt(), x[:, 0, 0, 0]), dim=1))
    x, y = grey(3)[0] - 0.01, torch.ones(3, dtype=torch.long)  # beyond .5 class 0 is NaN, for argmax the highest
    moved = OURS[name](model, 0.3, "Linf")(x, y)
    assert not bool(moved.isnan().any() or model(moved).isnan().any())


@every_part
def test_each_has_the_interface_of_torchattacks(name: str) -> None:
    attack = OURS[name](linear()[0], 0.1, "L2")
    assert isinstance(attack, CorrectedAttack) and isinstance(attack, torchattacks.attack.Attack)
    assert attack.supported_mode == ["default"] and repr(attack).startswith(type(attack).__name__ + "(")


def test_norm_and_loss_are_among_the_known() -> None:
    for family in (APGD, FAB, Square):
        with pytest.raises(InputError, match="the norm must be one of Linf, L2, but is 'L1'"):
            family(linear()[0], norm=cast(Norm, "L1"))
    with pytest.raises(InputError, match="the loss must be one of ce, dlr, targeted, but is 'cw'"):
        APGD(linear()[0], loss=cast(Loss, "cw"))


def test_checkpoints_are_those_of_the_paper() -> None:
    assert _checkpoints(100) == {0, 22, 41, 57, 70, 80, 87, 93, 99}
    assert _checkpoints(10) == {0, 3, 5, 6, 7, 8, 9, 10}


@both_norms
@pytest.mark.parametrize("loss", get_args(Loss))
def test_apgd_reaches_the_optimum_of_a_linear_model(loss: Loss, norm: Norm) -> None:
    (model, w_CHW), (x, y) = linear(), grey(4)
    moved = APGD(model, 0.2, 60, norm, loss)(x, y)
    best = x - 0.2 * (w_CHW.sign() if norm == "Linf" else w_CHW / w_CHW.norm())
    assert torch.allclose(model(moved), model(best), atol=1e-3)
    assert torch.allclose(moved, best, atol=1e-2 if norm == "L2" else 1e-6)


@both_norms
def test_apgd_asks_for_the_images_of_the_paper_s_algorithm(norm: Norm, held_out: Digits, classifier: nn.Module) -> None:
    eps = {"Linf": 0.3, "L2": 0.5}[norm]
    for i, (x, y) in enumerate(zip(held_out[0].split(1), held_out[1].split(1), strict=True)):
        model = Seen(classifier)
        attack = APGD(model, eps, 20, norm)
        attack.draws = Draws(0, torch.tensor([i]))
        attack(x, y)
        slow = algorithm_1(classifier, x, y, model.asked[1], eps, 20, norm)
        assert len(slow) == len(model.asked[1:]) == 21
        assert torch.allclose(torch.cat(slow), torch.cat(model.asked[1:]), atol=1e-4)


def algorithm_1(
    model: nn.Module, x: Tensor, y: Tensor, x_0: Tensor, eps: float, steps: int, norm: Norm
) -> list[Tensor]:
    """The iterates of one image, with the lists and sums of Algorithm 1 written out."""
    w = [0, 5, 9, 12, 14, 16, 18, 19, 20]  # 20 p_j, rounded up

    def inside(z: Tensor) -> Tensor:
        if norm == "Linf":
            return torch.max(torch.min(z, x + eps), x - eps).clamp(0, 1)
        return (x + (z - x) * min(1.0, eps / max(float((z - x).norm()), 1e-12))).clamp(0, 1)

    def f(z: Tensor) -> float:
        return float(nn.functional.cross_entropy(model(z), y))

    def step(z: Tensor) -> Tensor:
        z = z.clone().requires_grad_()
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), y), z)
        return inside(z.detach() + eta * (g.sign() if norm == "Linf" else g / g.norm()))

    eta, asked = 2 * eps, [x_0]
    xs, x_max = [x_0, step(x_0)], x_0
    etas, tops = [eta], [f(x_0)]
    while True:
        asked.append(xs[-1])
        k = len(xs) - 1
        x_max = xs[-1] if f(xs[-1]) > f(x_max) else x_max
        if k in w:
            before = w[w.index(k) - 1]
            risen = sum(f(xs[i + 1]) > f(xs[i]) for i in range(before, k))
            halved = risen < 0.75 * (k - before) or (etas[-1] == eta and tops[-1] == f(x_max))
            etas, tops = [*etas, eta], [*tops, f(x_max)]
            if halved:
                eta, xs[-1] = eta / 2, x_max
        if k == steps:
            return asked
        xs.append(inside(xs[-1] + 0.75 * (step(xs[-1]) - xs[-1]) + 0.25 * (xs[-1] - xs[-2])))


@both_norms
def test_apgd_fools_as_many_as_the_stock_class(norm: Norm, digits: Digits, classifier: nn.Module) -> None:
    x, y = digits[0][1400:], digits[1][1400:]

    def fooled(attack: Any) -> int:
        return int(wrong(classifier, attack(x, y), y).sum())

    few, equal = (torchattacks.APGD(classifier, norm, EPS[norm], steps) for steps in (10, 100))
    assert fooled(APGD(classifier, EPS[norm], 100, norm)) >= max(fooled(few), fooled(equal) - 1)
    assert (
        fooled(OURS["apgd-t"](classifier, EPS[norm], norm)) >= fooled(STOCK["apgd-t"](classifier, EPS[norm], norm)) - 1
    )


def test_the_losses_are_those_of_the_paper() -> None:
    logits, y, rival = torch.tensor([[1.0, 7.0, 4.0, 2.0, -3.0]]), torch.tensor([2]), torch.tensor([3])

    def loss(name: Loss, classes: int) -> float:
        return float(APGD(linear()[0], loss=name)._loss(logits[:, :classes], y.clamp(max=classes - 1), rival))

    assert loss("dlr", 5) == pytest.approx(-(4 - 7) / (7 - 2))
    assert loss("targeted", 5) == pytest.approx(-(4 - 2) / (7 - (2 + 1) / 2))
    assert loss("dlr", 3) == pytest.approx(-(4 - 7) / (7 - 1))
    assert loss("dlr", 2) == pytest.approx(-(7 - 1))
    assert loss("ce", 5) == pytest.approx(float(nn.functional.cross_entropy(logits, y)))


def test_scaled_logits_stop_the_cross_entropy_and_not_the_ratio(held_out: Digits, classifier: nn.Module) -> None:
    (x, y), loud = held_out, Seen(classifier, scale=1024)
    clean = int(wrong(classifier, x, y).sum())
    fooled = {
        (loss, model): int(wrong(classifier, APGD(model, 0.1, 20, loss=loss)(x, y), y).sum())
        for loss in get_args(Loss)
        for model in (classifier, loud)
    }
    assert fooled["ce", loud] <= clean + 1 < fooled["ce", classifier] / 2
    for loss in ("dlr", "targeted"):
        assert fooled[loss, loud] == fooled[loss, classifier] >= fooled["ce", classifier] - 1


@both_norms
@pytest.mark.parametrize("classes", [(5, 9), (3, 5, 8)])
@pytest.mark.parametrize("name", ["apgd-dlr", "apgd-t", "fab-t"])
def test_two_and_three_classes_are_enough(
    name: str, classes: tuple[int, ...], norm: Norm, digits: Digits, classifier: nn.Module
) -> None:
    own = torch.isin(digits[1], torch.tensor(classes))
    x, y = digits[0][own][-24:], torch.searchsorted(torch.tensor(classes), digits[1][own][-24:])
    model = Seen(classifier, classes)
    if not (name == "apgd-dlr" and len(classes) == 3):
        with pytest.raises(IndexError):
            STOCK[name](model, 0.01, norm)(x, y)
    assert int(wrong(model, OURS[name](model, 2 * EPS[norm], norm)(x, y), y).sum()) > 16
    assert int(wrong(model, x, y).sum()) < 6


@pytest.mark.parametrize("loss", get_args(Loss))
def test_of_two_classes_the_scale_of_the_logits_decides_nothing(
    loss: Loss, digits: Digits, classifier: nn.Module
) -> None:
    """Beyond `SPREAD` a view scales them, and then two logits always lie as far apart."""
    own = torch.isin(digits[1], torch.tensor((5, 9)))
    x, y = digits[0][own][-24:], (digits[1][own][-24:] == 9).long()
    plain, *others = (
        APGD(View(Seen(classifier, (5, 9), scale)), 0.05, 20, loss=loss)(x, y) for scale in (1.0, 2.0**-12, 2.0**12)
    )
    for other in others:
        assert torch.equal(other, plain)


def test_the_stock_targeted_apgd_takes_the_first_image_s_step_size_in_l2(
    held_out: Digits, classifier: nn.Module
) -> None:
    x, y = held_out
    for attack, depends in ((STOCK["apgd-t"], True), (OURS["apgd-t"], False)):
        found = [
            attack(classifier, 0.5, "L2")(torch.cat((x[i : i + 1], x[10:])), torch.cat((y[i : i + 1], y[10:])))[1:]
            for i in range(3)
        ]
        assert (max(float((other - found[0]).detach().abs().max()) for other in found) > 0.01) is depends


@both_norms
def test_the_step_to_a_plane_is_the_least_one(norm: Norm) -> None:
    generator = torch.Generator().manual_seed(3)
    x, w = torch.rand(64, 1, 5, 5, generator=generator), torch.randn(64, 1, 5, 5, generator=generator)
    x[:8], w[8:16, :, 2] = x[:8].round(), 0
    gap = 3 * torch.randn(64, generator=generator)
    step = to_plane(x, gap, w, norm)
    stock = (projection_l2 if norm == "L2" else projection_linf)(
        x.flatten(1), w.flatten(1), gap + (w * x).flatten(1).sum(1)
    ).view_as(x)
    most = torch.where(w * gap[:, None, None, None] > 0, 1 - x, x)  # room towards the plane
    reached = (w.abs() * most).flatten(1).sum(1) > gap.abs()
    assert 0.5 < float(reached.double().mean()) < 1
    assert torch.allclose((w * step).flatten(1).sum(1)[reached], gap[reached], atol=1e-4)
    assert torch.allclose((w * step).flatten(1).sum(1), (w * stock).flatten(1).sum(1), atol=1e-4)
    assert torch.allclose(size(step, norm), size(stock, norm), atol=1e-5)
    assert float((x + step).min()) >= -1e-6 and float((x + step).max()) <= 1 + 1e-6
    for scale in (0.0, math.inf, math.nan):
        assert torch.equal(to_plane(x, gap, scale * w.abs(), norm), torch.zeros_like(x))
    assert torch.allclose(to_plane(x, 1e-20 * gap, 1e-20 * w, norm), step, atol=1e-5)


@both_norms
def test_fab_asks_for_the_images_of_the_paper_s_algorithm(norm: Norm, held_out: Digits, classifier: nn.Module) -> None:
    def length(step: Tensor) -> float:
        return float(size(step, norm))

    for x, y in list(zip(held_out[0].split(1), held_out[1].split(1), strict=True))[:6]:
        model = Seen(classifier)
        FAB(model, 0.1, 8, norm, targets=1)(x, y)
        rival, x_i, slow = int(classifier(x)[0].scatter(0, y, -math.inf).argmax()), x, [x]
        for _ in range(8):
            slow.append(x_i)
            z = x_i.clone().requires_grad_()
            f = classifier(z)[0, rival] - classifier(z)[0, y[0]]
            (w,) = torch.autograd.grad(f, z)
            plane = w.flatten(1), ((w * x_i).sum() - f.detach())[None]
            nearest = projection_l2 if norm == "L2" else projection_linf
            d, d_orig = (nearest(image.flatten(1), *plane).view_as(x) for image in (x_i, x))
            alpha = min(length(d) / max(length(d) + length(d_orig), 1e-12), 0.1)
            x_i = ((1 - alpha) * (x_i + 1.05 * d) + alpha * (x + 1.05 * d_orig)).clamp(0, 1)
            slow.append(x_i)
            x_i = x + 0.9 * (x_i - x) if wrong(classifier, x_i, y) else x_i
        assert torch.allclose(torch.cat(slow), torch.cat(model.asked), atol=1e-4)


@both_norms
def test_fab_finds_the_nearest_image_of_a_linear_model_and_none_beyond_eps(norm: Norm) -> None:
    (model, w_CHW), (x, y) = linear(), grey(4)
    x += 0.1 * torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) - 0.05
    dual = w_CHW.abs().sum() if norm == "Linf" else w_CHW.norm()
    distance = (model(x)[:, 0] - model(x)[:, 1]) / dual
    found = FAB(model, 1.0, 30, norm)(x, y)
    assert bool(wrong(model, found, y).all())
    assert torch.allclose(size(found - x, norm), distance, rtol=0.02)
    eps = float(distance.sort().values[1:3].mean())
    kept = FAB(model, eps, 30, norm)(x, y)
    beyond = distance > eps
    assert int(beyond.sum()) == 2
    assert torch.equal(kept[beyond], x[beyond]) and bool(wrong(model, kept[~beyond], y[~beyond]).all())


def test_fab_is_no_less_strong_where_gradients_are_small(held_out: Digits, classifier: nn.Module) -> None:
    (x, y), quiet = held_out, Seen(classifier, scale=2.0**-40)
    clean, loud = wrong(classifier, x, y), wrong(classifier, OURS["fab-t"](classifier, 0.5, "L2")(x, y), y)
    stock, ours = (wrong(classifier, family["fab-t"](quiet, 0.5, "L2")(x, y), y) for family in (STOCK, OURS))
    assert torch.equal(stock, clean) and torch.equal(ours, loud) and int(loud.sum()) > 2 * int(clean.sum())


@both_norms
def test_square_needs_no_gradient_and_counts_its_queries(norm: Norm, held_out: Digits, classifier: nn.Module) -> None:
    (x, y), model = held_out, Seen(lambda x: classifier(x.detach()))
    attack = Square(model, EPS[norm], 100, norm)
    attack.stops = True
    moved = attack(x, y)
    assert int(attack.queries_N.sum()) == model.passes
    found = wrong(classifier, moved, y)
    assert int(found.sum()) > 10 and bool((attack.queries_N[~found] == 100).all())


def test_square_s_windows_differ_between_images_and_reach_the_edges() -> None:
    """Of a model that no query improves, each query after the first is the start, changed in one window."""
    x, y = grey(16, 6, 6)
    for ours in (True, False):
        model = Seen(lambda x: torch.tensor([[1.0, 0.0]]).repeat(len(x), 1))
        stock = torchattacks.Square(model, "Linf", 0.1, 400, resc_schedule=False)
        (Square(model, 0.1, 400) if ours else stock)(x, y)
        start, queries = model.asked[0 if ours else 1], torch.stack(model.asked[-150:-1])
        changed = (queries != start)[:, :, 0]
        assert bool((changed.flatten(2).sum(2) <= 4).all())  # after 200 queries a window is 2 x 2
        assert bool(changed[..., -1, :].any()) is bool(changed[..., -1].any()) is ours
        tops = changed.any(3).int().argmax(2)[changed.flatten(2).any(2).all(1)]
        assert bool((tops == tops[:, :1]).all()) is not ours


@pytest.mark.parametrize(("height", "width"), [(8, 8), (3, 9)])
def test_square_spends_all_of_eps_in_l2_on_images_of_any_size(height: int, width: int) -> None:
    x, y = torch.full((5, 2, height, width), 0.5), torch.zeros(5, dtype=torch.long)
    score = Seen(lambda x: torch.stack((x.flatten(1).sum(1), x.new_full((len(x),), 1e3)), dim=1))
    Square(score, 0.2, 60, "L2")(x, 1 - y)
    for asked in score.asked:
        assert torch.allclose(size(asked - x, "L2"), torch.full((5,), 0.2), atol=1e-5)
    less = x + 0.1 * torch.randn(x.shape) / math.sqrt(x[0].numel())  # as where pixels are held at 0 or 1
    moved = Square(score, 0.2, 60, "L2")._jump(1, x, less, torch.rand(5, 7))
    assert torch.allclose(size(moved - x, "L2"), torch.full((5,), 0.2), atol=1e-5)
    if height < 5:
        with pytest.raises(ZeroDivisionError):
            torchattacks.Square(score, "L2", 0.2, 60)(x, 1 - y)


@pytest.mark.parametrize("side", [1, 3, 4, 7])
def test_square_s_l2_window_is_that_of_equation_2(side: int) -> None:
    def eta(h_1: int, h_2: int, r: int, s: int) -> float:
        n = h_1 // 2
        inner = n - max(abs(r - h_1 // 2 - 1), abs(s - h_2 // 2 - 1))
        return sum(1 / (n + 1 - k) ** 2 for k in range(inner + 1))

    k = side // 2
    slow = torch.zeros(side, side)
    for s in range(1, side + 1):
        for r in range(1, k + 1):
            slow[r - 1, s - 1] = eta(side, k, s, r)
        for r in range(1, side - k + 1):
            slow[k + r - 1, s - 1] = -eta(side, side - k, s, r)
    assert torch.allclose(_eta(side, torch.device("cpu")), slow / slow.norm(), atol=1e-6)


def test_square_s_windows_shrink_at_the_paper_s_queries() -> None:
    attack = Square(linear()[0], p_init=0.8)
    assert [attack._side(i, 28, 28) for i in (1, 10, 11, 51, 201, 501, 4001)] == [25, 25, 18, 13, 9, 6, 2]
    attack = Square(linear()[0], norm="L2")
    assert [attack._side(i, 28, 28) for i in (1, 11, 4001)] == [25, 19, 3]
    assert attack._side(1, 8, 2) == 1
