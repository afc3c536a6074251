"""Attacks on defenses that reject: against closed forms, and where plain PGD is caught."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
import torchattacks
from scipy.optimize import linprog, minimize_scalar
from torch import Tensor, nn

from attacks.algorithms.mixture import MixtureAttack, fool, objective
from attacks.algorithms.nes import NES
from attacks.algorithms.pgd import PGD
from attacks.algorithms.selective_pgd import PenalisedPGD, SelectivePGD, _aside
from attacks.algorithms.square import Square
from attacks.gradient_view import View
from attacks.seeding import Draws
from attacks.threat import Norm
from defenses.base import Batches, Defended, Shape
from defenses.gmvae import GMVAE
from tests.attacks.algorithms.test_corrected import Score, fooled, l2, one_by_one

Digits = tuple[Tensor, Tensor]
Watch = Callable[[Tensor], Tensor]


class Detector(nn.Module):
    """A defense that purifies nothing, but watches."""

    def __init__(self, watch: Watch, limits: Sequence[float]) -> None:
        super().__init__()
        self.watch, self.values = watch, limits

    def suspicion(self, x: Tensor) -> Tensor:
        return self.watch(x)

    def limits(self) -> Tensor:
        return torch.tensor(self.values)


class Watched(nn.Module):
    def __init__(self, classifier: nn.Module, watch: Watch, limits: Sequence[float]) -> None:
        super().__init__()
        self.classifier, self.defense = classifier, Detector(watch, limits)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x)

    def accept(self, x: Tensor) -> Tensor:
        return (self.defense.suspicion(x) <= self.defense.limits()).all(1)


def errors(target: Any, x: Tensor, y: Tensor) -> float:
    """The share of images that are accepted and wrong."""
    return float(((target(x).argmax(1) != y) & target.accept(x)).double().mean())


def column(watch: Watch) -> Watch:
    return lambda x: watch(x)[:, None]


@pytest.fixture(scope="module")
def guarded(digits: Digits, classifier: nn.Module) -> Watched:
    """Rejects what lies off the plane of the digits' first principal components more than half of them do."""
    x = digits[0][:1400].flatten(1)
    basis = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:24]

    def residual(images: Tensor) -> Tensor:
        off = images.flatten(1) - x.mean(0)
        return (off - off @ basis.T @ basis).square().sum(1)

    return Watched(classifier, column(residual), [float(residual(digits[0][:1400]).quantile(0.5))])


@pytest.fixture
def held_out(digits: Digits) -> Digits:
    return digits[0][1400:1464], digits[1][1400:1464]


@pytest.mark.parametrize(("stock", "norm", "eps"), [(torchattacks.PGD, "Linf", 0.25), (torchattacks.PGDL2, "L2", 2.0)])
def test_a_detector_catches_what_the_stock_class_finds_and_not_what_selective_pgd_finds(
    stock: Any, norm: Norm, eps: float, held_out: Digits, guarded: Watched
) -> None:
    x, y = held_out
    options: dict[str, Any] = {"eps": eps, "alpha": eps / 8, "steps": 30}
    plain, ours = stock(View(guarded), **options)(x, y), SelectivePGD(View(guarded), norm=norm, **options)(x, y)
    assert fooled(guarded, plain, y) == fooled(guarded, ours, y) == 1
    assert errors(guarded, plain, y) < 0.25 and errors(guarded, ours, y) > 0.8
    off = l2(ours, x) if norm == "L2" else (ours - x).flatten(1).abs().amax(1)
    assert float(off.max()) <= eps + 1e-6 and 0 <= float(ours.min()) and float(ours.max()) <= 1


@pytest.mark.parametrize(("family", "budget"), [(Square, {"queries": 600}), (NES, {"steps": 20})])
def test_a_search_without_gradients_evades_a_detector_if_it_is_told_to(
    family: Any, budget: dict[str, int], held_out: Digits, guarded: Watched
) -> None:
    x, y = held_out
    plain, ours = (family(View(guarded), eps=0.25, rank=rank, **budget)(x, y) for rank in ("margin", "evading"))
    assert errors(guarded, ours, y) > errors(guarded, plain, y) + 0.2


def test_square_asks_a_detector_only_where_it_decides_and_finds_the_same(held_out: Digits, guarded: Watched) -> None:
    asked = [0]

    def counted(images: Tensor) -> Tensor:
        asked[-1] += len(images)
        return guarded.defense.suspicion(images)

    class Always(Square):
        def _rank(self, x_NCHW: Tensor, y_N: Tensor, floor_N: Tensor | None = None) -> Tensor:
            return super()._rank(x_NCHW, y_N)

    target = Watched(guarded.classifier, counted, guarded.defense.values)
    every = Always(View(target), eps=0.25, rank="evading", queries=200)(*held_out)
    asked.append(0)
    few = Square(View(target), eps=0.25, rank="evading", queries=200)(*held_out)
    assert torch.equal(every, few) and asked[0] == 200 * 64 and asked[1] < asked[0] / 2


def planes(seed: int, shape: tuple[int, int, int] = (1, 4, 4)) -> tuple[Tensor, Tensor]:
    """Two normals of length 1 that mostly point against each other."""
    w, v = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    v = v - 0.5 * w
    return w / w.norm(), v / v.norm()


def linear(w: Tensor, v: Tensor, score: float, limit: float) -> Watched:
    """Right where w.d + score > 0, of suspicion v.d, for the step d from the image of 0.5."""
    model = Score(lambda x: ((x - 0.5) * w).flatten(1).sum(1) + score)
    return Watched(model, column(lambda x: ((x - 0.5) * v).flatten(1).sum(1)), [limit])


@pytest.mark.parametrize("limit", [0.0, 5.0, math.inf])
@pytest.mark.parametrize("seed", range(4))
def test_in_l2_it_finds_the_least_margin_among_the_wrong_images_of_a_linear_model(seed: int, limit: float) -> None:
    """The least v.d under w.d <= -s and |d| <= eps: against v, or on the boundary and then against v within it."""
    (w, v), eps, score = planes(seed), 0.4, 0.25
    target, x = linear(w, v, score, limit), torch.full((1, 1, 4, 4), 0.5)
    c = float((w * v).sum())
    least = -eps if eps * c >= score else -score * c - math.sqrt((eps**2 - score**2) * (1 - c**2))
    attack = SelectivePGD(View(target), eps=eps, alpha=0.004, steps=600, norm="L2")
    moved = attack(x, torch.zeros(1, dtype=torch.long))
    assert target(moved).argmax(1).item() == 1
    assert float(target.defense.suspicion(moved)) == pytest.approx(least, abs=0.01)


@pytest.mark.parametrize("kind", [SelectivePGD, PenalisedPGD])
@pytest.mark.parametrize("seed", range(4))
def test_in_linf_it_is_wrong_and_accepted_where_a_linear_program_finds_room(
    seed: int, kind: type[SelectivePGD]
) -> None:
    (w, v), eps, score = planes(seed), 0.1, 0.1
    found = linprog(v.flatten(), w.flatten()[None], [-score], bounds=(-eps, eps))
    least = float(found.fun)
    x, y = torch.full((1, 1, 4, 4), 0.5), torch.zeros(1, dtype=torch.long)
    assert least < -0.1
    for limit, there in ((least / 3, True), (least - 0.001, False)):  # signs of steps do not reach the optimum itself
        target = linear(w, v, score, limit)
        moved = kind(View(target), eps=eps, alpha=0.002, steps=400)(x, y)
        assert errors(target, moved, y) == there


def test_the_margin_is_the_greatest_over_the_columns_in_units_of_their_limits() -> None:
    held = torch.tensor([[0.5, 130.0], [0.9, 110.0], [3.0, 0.0]])
    target = Watched(Score(lambda x: x.flatten(1).sum(1)), lambda x: held[x[:, 0, 0, 0].long()], [0.2, 100.0])
    x = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1) + 0.25
    attack = SelectivePGD(View(target))
    _, _, margin = attack._choose(x, torch.tensor([1, 1, 0]), target.defense.limits().double())
    assert margin.tolist() == pytest.approx([max(0.3 / 1.2, 30 / 101), max(0.7 / 1.2, 10 / 101), math.inf])


def test_where_both_aims_conflict_the_step_lies_at_right_angles_to_the_climb() -> None:
    climb = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 2.0]])[:, None, :, None]
    slope = torch.tensor([[-3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])[:, None, :, None]
    assert _aside(slope, climb)[:, 0, :, 0].tolist() == [[0.0, 4.0], [3.0, 4.0], [1.0, 2.0]]


def blind(accepts: Watch) -> Watch:
    """What `Defense.suspicion` makes of `accept`: 0 or 1, and no gradient."""
    return column(lambda x: (~accepts(x)).to(x))


@pytest.mark.parametrize("accepted", [True, False])
def test_a_detector_without_a_gradient_leaves_pgd(accepted: bool, held_out: Digits, classifier: nn.Module) -> None:
    target = Watched(classifier, blind(lambda x: torch.full((len(x),), accepted)), [0.0])
    for eps in (0.05, 0.2):
        plain, ours = (attack(View(target), eps=eps, alpha=0.02, steps=12) for attack in (PGD, SelectivePGD))
        plain.stops = True
        # PGD does not look at its last iterate, which is returned all the same.
        assert torch.equal(plain(*held_out), ours(*held_out))


def test_a_detector_without_a_gradient_is_evaded_by_an_iterate_that_it_accepts() -> None:
    """Wrong from the third step on, accepted between the fifth and the seventh."""
    model = Score(lambda x: 0.525 - x.flatten(1).mean(1))
    target = Watched(model, blind(lambda x: (x.flatten(1).mean(1) - 0.56).abs() < 0.015), [0.0])
    options: dict[str, Any] = {"eps": 0.2, "alpha": 0.01, "steps": 12, "random_start": False}
    x, y = torch.full((2, 1, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
    plain, ours = (attack(View(target), **options)(x, y) for attack in (PGD, SelectivePGD))
    assert errors(target, plain, y) == 0 and torch.allclose(ours, x + 0.05)


def test_an_infinite_limit_counts_only_among_such(held_out: Digits, guarded: Watched) -> None:
    def two(x: Tensor) -> Tensor:
        return torch.cat((guarded.defense.suspicion(x), 50 + x.flatten(1).mean(1, keepdim=True)), dim=1)

    options: dict[str, Any] = {"eps": 0.25, "alpha": 0.03, "steps": 15}
    (limit,) = guarded.defense.values
    alone = SelectivePGD(View(guarded), **options)(*held_out)
    for never in (math.inf, 1e9):
        beside = Watched(guarded.classifier, two, [limit, never])
        assert torch.equal(SelectivePGD(View(beside), **options)(*held_out), alone)
    free = Watched(guarded.classifier, guarded.defense.watch, [math.inf])
    ours, plain = (attack(View(free), **options)(*held_out) for attack in (SelectivePGD, PGD))
    assert bool(ours.isfinite().all()) and fooled(free, ours, held_out[1]) > 0.9
    assert float(free.defense.suspicion(ours).mean()) < 0.5 * float(free.defense.suspicion(plain).mean())


def test_selective_pgd_of_an_image_does_not_depend_on_the_others_nor_on_stops(
    held_out: Digits, guarded: Watched
) -> None:
    attack = SelectivePGD(View(guarded), eps=0.15, alpha=0.02, random_start=False)
    x, y = held_out[0][:12], held_out[1][:12]
    together = attack(x, y)
    assert torch.allclose(together, one_by_one(attack, x, y), atol=1e-6)
    attack.stops = True
    assert torch.equal(attack(x, y), together) and len(attack(x[:0], y[:0])) == 0


def test_a_target_is_reached_and_accepted(held_out: Digits, guarded: Watched) -> None:
    attack = SelectivePGD(View(guarded), eps=0.4, alpha=0.03, steps=40)
    attack.set_mode_targeted_by_label(quiet=True)
    x, aim = held_out[0], (held_out[1] + 1) % 10
    moved = attack(x, aim)
    assert float(((guarded(moved).argmax(1) == aim) & guarded.accept(moved)).double().mean()) > 0.6


# Equations 10 and 11.


@pytest.fixture(scope="module")
def gmvae(digits: Digits, classifier: nn.Module) -> Defended:
    """A GMVAE fitted to digits for seconds."""
    torch.manual_seed(0)
    defense = GMVAE(
        {"maps": 8, "dense": 64, "batch_size": 32, "learning_rate": 3e-3, "epochs": 6}, {}, Shape(1, 8, 8, 10)
    )
    for _ in defense.fit(Batches(digits[0][:1400], digits[1][:1400], epochs=6, batch_size=32), nn.Identity()):
        pass
    return Defended(defense.eval().requires_grad_(False), classifier)


def small(inference: dict[str, float]) -> GMVAE:
    """Of odd shape, with covariances and errors of noise."""
    torch.manual_seed(0)
    shape = Shape(2, 9, 13, 4)
    defense = GMVAE({"maps": 3, "dense": 16, "latent": 5}, inference, shape).eval().requires_grad_(False)
    x = torch.rand(40, 2, 9, 13, generator=torch.Generator().manual_seed(1))
    defense.calibrate(Batches(x, torch.arange(40) % 4, epochs=1, batch_size=20))
    return defense


def loop(defense: GMVAE, x: Tensor, target: int, tau_enc: float, tau_dec: float, origin: Tensor | None) -> float:
    """Eq. 10 and 11 of one image, number by number in float64."""
    f = defense.encode(x[None])
    g = defense.decode(f)[0].double().flatten().tolist()
    error = sum((a - b) ** 2 for a, b in zip(x.double().flatten().tolist(), g, strict=True))
    off = [m - z for m, z in zip(defense.means_KL[target].tolist(), f[0].double().tolist(), strict=True)]
    inverse = defense.precision_KLL[target].tolist()
    distance = sum(off[i] * inverse[i][j] * off[j] for i in range(5) for j in range(5))
    eta = 0.0 if origin is None else float((x.double() - origin.double()).square().sum())
    return (error / tau_dec) ** 2 + (distance / tau_enc) ** 2 + eta


@pytest.mark.parametrize(("enc", "dec"), [(1.0, 3.0), (0.4, 3.0), (1.0, -1.0)])
def test_the_objective_is_the_papers_with_the_taus_of_the_knobs(enc: float, dec: float) -> None:
    defense = small({"tau_enc": enc, "tau_dec": dec})
    x, origin = torch.rand(2, 6, 2, 9, 13, generator=torch.Generator().manual_seed(2))
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    tau_enc = 18.205 * enc  # the chi-square quantile 0.9973 of five dimensions
    tau_dec = float(defense.error_mean + dec * defense.error_sigma)
    for start in (origin, None):
        by_hand = [
            loop(defense, x[n], int(target[n]), tau_enc, tau_dec, None if start is None else start[n]) for n in range(6)
        ]
        assert objective(defense, x, target, start).tolist() == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize(("enc", "dec"), [(0.0, -10.0), (1e9, 1e9), (math.inf, math.inf)])
def test_no_limit_makes_the_objective_blind_or_nan(enc: float, dec: float) -> None:
    x, target = torch.rand(3, 2, 9, 13), torch.tensor([0, 1, 2])
    usual, found = (small(knobs) for knobs in ({}, {"tau_enc": enc, "tau_dec": dec}))
    for defense in (usual, found):
        defense.error_sigma.fill_(float(defense.error_mean))  # so that the mean less ten sigmas is below zero
    share = 1 if enc else 100
    assert torch.allclose(found.ratios(x, target), share * usual.ratios(x, target), rtol=1e-4)


class Gaussians(nn.Module):
    """Encoder and decoder are the identity: no reconstruction error; precision 1, tau_enc `tau`."""

    def __init__(self, tau: float) -> None:
        super().__init__()
        self.means_KL, self.tau = 0.2 + 0.6 * torch.eye(4), tau

    def ratios(self, x: Tensor, y: Tensor) -> Tensor:
        distance = (x.flatten(1) - self.means_KL[y]).square().sum(1) / self.tau
        return torch.stack((torch.zeros_like(distance), distance), dim=1)


def mixture(tau: float) -> View:
    target = Watched(Score(lambda x: x.flatten(1).sum(1)), lambda x: x, [])
    target.defense = cast(Any, Gaussians(tau))
    return View(target)


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_equation_10_is_minimised_on_the_way_to_the_mean(tau: float) -> None:
    """At x_o + s u, u = mu_t - x_o, the loss is (|u|^2 (1 - s)^2 / tau)^2 + s^2 |u|^2."""
    x, target = torch.full((4, 1, 2, 2), 0.4), torch.arange(4)
    x[:, 0, 0, 1] = 0.6
    attack = MixtureAttack(mixture(tau), steps=600)
    attack.set_mode_targeted_by_label(quiet=True)
    moved = attack(x, target)
    u = Gaussians(tau).means_KL.view(4, 1, 2, 2) - x
    squares = u.flatten(1).square().sum(1).tolist()
    s = [
        minimize_scalar(lambda s, q=q: (q * (1 - s) ** 2 / tau) ** 2 + s**2 * q, bounds=(0, 1), method="bounded").x
        for q in squares
    ]
    assert torch.allclose(moved, x + torch.tensor(s).float()[:, None, None, None] * u, atol=2e-3)


def test_a_random_class_is_wrong_and_belongs_to_the_image() -> None:
    attack, x, y = MixtureAttack(mixture(1e-3), steps=300), torch.full((40, 1, 2, 2), 0.5), torch.arange(40) % 4
    attack.draws = Draws(3, torch.arange(40))
    moved = attack(x, y)
    reached = torch.cdist(moved.flatten(1), Gaussians(1.0).means_KL).argmin(1)
    assert bool((reached != y).all()) and len({(int(a), int(b)) for a, b in zip(y, reached, strict=True)}) == 12
    attack.draws = Draws(3, torch.arange(40)[7:9])
    assert torch.equal(attack(x[7:9], y[7:9]), moved[7:9])
    assert len(MixtureAttack(mixture(1.0), steps=2)(x[:0], y[:0])) == 0


def test_no_iterate_of_less_loss_is_passed_over() -> None:
    x, target = torch.rand(6, 1, 2, 2), torch.arange(6) % 4
    for lr in (0.01, 0.9):  # the latter overshoots
        attack = MixtureAttack(mixture(0.1), steps=20, lr=lr)
        attack.set_mode_targeted_by_label(quiet=True)
        after, before = (objective(Gaussians(0.1), image, target, x) for image in (attack(x, target), x))
        assert bool((after <= before).all())


def test_equation_11_leads_noise_to_the_mean_and_leaves_the_model_in_its_mode() -> None:
    model = mixture(0.5).train()
    target, draws = torch.arange(4), Draws(0, torch.arange(4))
    found = fool(model, target, (1, 2, 2), draws, steps=800)
    assert (
        torch.allclose(found.flatten(1), Gaussians(0.5).means_KL, atol=0.1) and model.training
    )  # the loss is of order 4
    assert torch.equal(found, fool(model, target, (1, 2, 2), Draws(0, torch.arange(4)), steps=800))


def test_a_gmvae_rejects_what_pgd_finds_and_accepts_what_the_attacks_made_for_it_find(
    gmvae: Defended, held_out: Digits
) -> None:
    x, y = held_out
    assert gmvae.defense.openings == ("rejection", "mixture")
    options: dict[str, Any] = {"eps": 0.4, "alpha": 0.04, "steps": 20}
    plain, ours = (attack(View(gmvae), **options)(x, y) for attack in (PGD, SelectivePGD))
    assert errors(gmvae, ours, y) > errors(gmvae, plain, y) + 0.4
    assert errors(gmvae, MixtureAttack(View(gmvae), steps=200)(x, y), y) > 0.1
    target, draws = torch.arange(40) % 10, Draws(0, torch.arange(40))
    assert not bool(gmvae.accept(draws.uniform(1, 8, 8)).any())
    found = fool(View(gmvae), target, (1, 8, 8), draws, steps=200)
    assert float(((gmvae(found).argmax(1) == target) & gmvae.accept(found)).double().mean()) > 0.2


def test_the_gradient_of_a_gmvaes_ratios_reaches_every_image(gmvae: Defended, held_out: Digits) -> None:
    x = held_out[0][:8].clone().requires_grad_()
    loss = objective(cast(GMVAE, gmvae.defense), x, (held_out[1][:8] + 1) % 10).sum()
    (slope,) = torch.autograd.grad(loss, x)
    assert bool((slope.flatten(1).abs().amax(1) > 0).all())
