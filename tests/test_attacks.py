"""Attacks against closed forms, the view against autograd, and the evaluation against counting by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.coverage import pick, risk_coverage
from attacks.interval import wilson
from attacks.robustness import Observation, Seen, craft_oblivious, evaluate, look, observe
from attacks.suite import (
    FGSM,
    FGSM_TARGETED,
    IFGSM,
    IFGSM_TARGETED,
    PGD_10,
    SUITES,
    Attack,
    AttackError,
    Suite,
    reproducible,
    wrong_labels,
)
from attacks.threat import ThreatModel
from attacks.view import Gradient, View
from spaces.space import InputError

WHITE = ThreatModel("Linf", 0.1, "white-box")
OBLIVIOUS = ThreatModel("Linf", 0.1, "oblivious")
EVERY = [FGSM, FGSM_TARGETED, IFGSM, IFGSM_TARGETED, PGD_10]
Digits = tuple[Tensor, Tensor]


class Linear(nn.Module):
    """Logits [w.x, 0]: the gradient of the loss is known."""

    def __init__(self) -> None:
        super().__init__()
        self.w_CHW = nn.Parameter(torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        score_N = (x * self.w_CHW).flatten(1).sum(1)
        return torch.stack((score_N, torch.zeros_like(score_N)), dim=1)


class Smooth(nn.Module):
    """A purifier for tests: a known map, with noise and a rounding where asked for."""

    def __init__(self, noise: float = 0.0, steps: int = 0, darkest: float | None = None) -> None:
        super().__init__()
        self.noise, self.steps, self.darkest = noise, steps, darkest

    gradients: tuple[Gradient, ...] = ("surrogate", "bpda", "exact")

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    def purify(self, x: Tensor) -> Tensor:
        x = x + self.noise * torch.randn_like(x)
        return (x * self.steps).round() / self.steps if self.steps else x

    def surrogate(self, x: Tensor) -> Tensor:
        return x

    def suspicion(self, x: Tensor) -> Tensor:
        return -x.flatten(1).mean(1, keepdim=True) if self.darkest is not None else x.new_zeros((len(x), 0))

    def limits(self) -> Tensor:
        return torch.tensor([] if self.darkest is None else [-self.darkest])


class Guard(nn.Module):
    """A defended classifier without the product's own classes."""

    def __init__(self, defense: Smooth, classifier: nn.Module) -> None:
        super().__init__()
        self.defense, self.classifier = defense, classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.defense.purify(x))


def test_fgsm_moves_each_pixel_by_eps_along_the_sign_of_the_known_gradient() -> None:
    model, x = Linear(), torch.full((2, 1, 4, 4), 0.5)
    moved = FGSM.craft(model, x, torch.tensor([0, 1]), WHITE, 0) - x
    away = -0.1 * model.w_CHW.detach().sign()  # lowers the score of class 0
    assert torch.allclose(moved, torch.stack((away, -away)), atol=1e-6)


def test_targeted_fgsm_moves_towards_the_target() -> None:
    model, x = Linear(), torch.full((2, 1, 4, 4), 0.5)
    y = torch.tensor([0, 1])
    assert torch.allclose(
        FGSM_TARGETED.craft(model, x, y, WHITE, 0), FGSM.craft(model, x, y, WHITE, 0), atol=1e-6
    )  # with two classes the only wrong label is where the untargeted attack goes


def test_pgd_reaches_the_optimum_of_a_linear_model() -> None:
    model, x = Linear(), torch.full((1, 1, 4, 4), 0.5)
    moved = PGD_10.craft(model, x, torch.tensor([0]), WHITE, 0) - x
    assert torch.allclose(moved[0], -0.1 * model.w_CHW.detach().sign(), atol=1e-6)


@pytest.mark.parametrize("attack", EVERY, ids=lambda attack: attack.name)
def test_images_stay_within_eps_and_the_pixel_range(attack: Attack, digits: Digits, classifier: nn.Module) -> None:
    x, y = digits[0][:40], digits[1][:40]
    adversarial = attack.craft(classifier, x, y, WHITE, 0)
    assert float((adversarial - x).abs().max()) <= 0.1 + 1e-6
    assert float(adversarial.min()) >= 0 and float(adversarial.max()) <= 1
    assert not torch.equal(adversarial, x)


class Escapes(torchattacks.FGSM):  # type: ignore[misc]  # torchattacks is not typed
    """A faulty attack: it moves twice as far as it may."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        moved: Tensor = images + 2 * self.eps
        return moved


class Nan(torchattacks.FGSM):  # type: ignore[misc]  # torchattacks is not typed
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return images * torch.nan


@pytest.mark.parametrize("family", [Escapes, Nan])
def test_what_leaves_the_threat_model_is_not_believed(family: type) -> None:
    faulty = Attack(name="faulty", family=family, source="none")
    with pytest.raises(AttackError, match=r"faulty must stay within white-box, Linf eps 0\.1"):
        faulty.craft(Linear(), torch.full((1, 1, 4, 4), 0.5), torch.tensor([0]), WHITE, 0)


def test_wrong_labels_are_wrong_and_all_occur() -> None:
    y = torch.arange(10).repeat(200)
    wrong = wrong_labels(y, 10)
    assert bool((wrong != y).all()) and set(wrong.tolist()) == set(range(10))
    assert {int(w) for w, label in zip(wrong, y, strict=True) if label == 0} == set(range(1, 10))


@pytest.mark.parametrize("attack", EVERY, ids=lambda attack: attack.name)
def test_an_attack_leaves_modes_and_generators_as_they_were(
    attack: Attack, digits: Digits, classifier: nn.Module
) -> None:
    composite = nn.Sequential(nn.Sequential(classifier, nn.Dropout()), nn.Identity()).train()
    composite[0][0].eval()  # type: ignore[index]
    modes = {module: module.training for module in composite.modules()}
    before = torch.random.get_rng_state()
    attack.craft(composite, digits[0][:4], digits[1][:4], WHITE, 0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert modes == {module: module.training for module in composite.modules()}


def test_modes_and_generators_are_restored_when_an_attack_raises() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1)).train()
    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="on purpose"), reproducible(model, 3):
        torch.rand(1)
        raise RuntimeError("on purpose")
    assert model[0].training and torch.equal(before, torch.random.get_rng_state())


def test_the_same_seed_gives_the_same_images(digits: Digits, classifier: nn.Module) -> None:
    x, y = digits[0][:10], digits[1][:10]
    for attack in EVERY:
        assert torch.equal(attack.craft(classifier, x, y, WHITE, 7), attack.craft(classifier, x, y, WHITE, 7))
    assert not torch.equal(PGD_10.craft(classifier, x, y, WHITE, 7), PGD_10.craft(classifier, x, y, WHITE, 8))


def test_bpda_gives_the_classifiers_gradient_at_the_purified_image(digits: Digits, classifier: nn.Module) -> None:
    guard = Guard(Smooth(steps=4), classifier)
    x, y = digits[0][:5].clone().requires_grad_(), digits[1][:5]
    logits = View(guard, "bpda")(x)
    assert torch.allclose(logits, guard(x), atol=1e-6)
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, y), x)
    purified = ((digits[0][:5] * 4).round() / 4).requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(classifier(purified), y), purified)
    assert torch.allclose(slope, expected, atol=1e-6)


def test_bpda_breaks_the_rounding_that_hides_from_the_exact_gradient(digits: Digits, classifier: nn.Module) -> None:
    guard = Guard(Smooth(steps=8), classifier)
    x, y = digits[0][1400:1500], digits[1][1400:1500]
    found = evaluate(SUITES["search"], guard, x, y, WHITE, oblivious={})
    exact = PGD_10.craft(View(guard, "exact"), x, y, WHITE, 0)
    masked = float(look(guard, exact, y, 0).right.double().mean())
    assert float(found.robust.double().mean()) < masked - 0.3


def test_draws_average_the_logits_of_one_batch(digits: Digits, classifier: nn.Module) -> None:
    guard = Guard(Smooth(noise=0.3), classifier)
    torch.manual_seed(1)
    averaged = View(guard, "exact", draws=8)(digits[0][:3])
    torch.manual_seed(1)
    by_hand = torch.stack([guard(part) for part in [digits[0][:3].repeat(8, 1, 1, 1)]]).reshape(8, 3, 10).mean(0)
    assert torch.allclose(averaged, by_hand, atol=1e-6)


def plain_verdicts(suite: Suite, target: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Every attack over all samples, one after the other: the slow way."""
    robust = target(x).argmax(1) == y
    for attack in suite.oblivious:
        robust &= target(attack.craft(View(target), x, y, WHITE, 0)).argmax(1) == y
    for attack in suite.white_box:
        robust &= target(attack.craft(View(target), x, y, WHITE, 0)).argmax(1) == y
    return robust


def test_attacking_survivors_only_gives_the_verdicts_of_attacking_all(digits: Digits, classifier: nn.Module) -> None:
    """For attacks without a random start; a random start depends on who is attacked beside."""
    suite = Suite(name="plain", oblivious=(FGSM,), white_box=(IFGSM,), draws=1)
    x, y = digits[0][1400:1600], digits[1][1400:1600]
    found = evaluate(suite, classifier, x, y, WHITE)
    assert torch.equal(found.robust, plain_verdicts(suite, classifier, x, y))
    assert 0 < int(found.robust.sum()) < 200


def test_a_sample_is_robust_only_if_it_withstands_every_attack(digits: Digits, classifier: nn.Module) -> None:
    x, y = digits[0][1400:1600], digits[1][1400:1600]
    found = evaluate(SUITES["search"], classifier, x, y, WHITE)
    for stronger, weaker in ((found.strongest, found.oblivious), (found.oblivious, found.clean)):
        assert bool((stronger.right <= weaker.right).all()) and bool((stronger.wrong >= weaker.wrong).all())
    cumulative = [share for name, share in found.trail.items() if name.startswith("white-box")]
    assert cumulative == sorted(cumulative, reverse=True)
    assert found.oblivious.accuracy <= min(share for name, share in found.trail.items() if name.startswith("oblivious"))


def test_oblivious_images_are_crafted_on_the_bare_classifier(digits: Digits, classifier: nn.Module) -> None:
    x, y = digits[0][1400:1450], digits[1][1400:1450]
    guard = Guard(Smooth(steps=2), classifier)
    made = craft_oblivious(SUITES["quick"], classifier, x, y, OBLIVIOUS, 0)
    with_images = evaluate(SUITES["quick"], guard, x, y, OBLIVIOUS, oblivious=made)
    assert with_images.white_box is None
    assert torch.equal(with_images.robust, evaluate(SUITES["quick"], guard, x, y, OBLIVIOUS).robust)


def test_rejection_never_counts_as_accuracy(digits: Digits, classifier: nn.Module) -> None:
    x, y = digits[0][1400:1500], digits[1][1400:1500]
    nothing = evaluate(SUITES["quick"], Guard(Smooth(darkest=2.0), classifier), x, y, WHITE)
    assert (nothing.clean.accuracy, nothing.clean.error, nothing.clean.rejection) == (0, 0, 1)
    assert (nothing.attacked.accuracy, nothing.attacked.error, nothing.attacked.rejection) == (0, 0, 1)
    assert not bool(nothing.robust.any())


def test_verdicts_under_other_thresholds_need_no_other_pass(digits: Digits, classifier: nn.Module) -> None:
    x, y = digits[0][1400:1500], digits[1][1400:1500]
    suite = Suite(name="plain", oblivious=(FGSM,), white_box=(IFGSM,), draws=1)
    loose = observe(suite, Guard(Smooth(darkest=0.0), classifier), x, y, WHITE)
    for darkest in (0.28, 0.31, 0.34):
        strict = observe(suite, Guard(Smooth(darkest=darkest), classifier), x, y, WHITE).judge()
        swept = loose.judge(torch.tensor([-darkest]))
        assert 0 < strict.clean.rejection < 1 and strict.trail == swept.trail
        for name in ("clean", "oblivious", "strongest"):
            mine, theirs = getattr(swept, name), getattr(strict, name)
            assert torch.equal(mine.right, theirs.right) and torch.equal(mine.wrong, theirs.wrong)


def test_accuracy_error_and_rejection_are_counted_apart() -> None:
    """Four images, by hand: all well; right but rejected under attack; wrong under attack; clean rejected."""
    clean = Seen(torch.tensor([True, True, True, True]), torch.tensor([[0.0], [0.0], [0.0], [9.0]]))
    attacked = Seen(torch.tensor([True, False, False, False]), torch.tensor([[0.0], [9.0], [1.0], [9.0]]))
    found = Observation(
        threat=OBLIVIOUS, clean=clean, oblivious={"a": attacked}, white_box=None, limits_S=torch.tensor([1.0])
    ).judge()
    assert (found.clean.accuracy, found.clean.error, found.clean.rejection) == (0.75, 0, 0.25)
    assert (found.attacked.accuracy, found.attacked.error, found.attacked.rejection) == (0.25, 0.25, 0.5)
    assert found.robust.tolist() == [True, True, False, False]


@pytest.mark.parametrize("columns", [1, 2])
def test_the_risk_coverage_curve_is_that_of_trying_every_threshold(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    clean, attacked = (
        Seen(
            torch.rand(12, generator=generator) < share,
            torch.randint(0, 8, (12, columns), generator=generator).float() + shift,
        )
        for share, shift in ((0.9, 0), (0.3, 2))
    )
    found = Observation(
        threat=WHITE, clean=clean, oblivious={}, white_box={"a": attacked}, limits_S=torch.zeros(columns)
    )
    every = []
    for limits in itertools.product(range(-1, 11), repeat=columns):
        verdict = found.judge(torch.tensor(limits, dtype=torch.float32))
        every.append((round(verdict.clean.rejection * 12), round(verdict.attacked.error * 12)))
    front = risk_coverage(found)
    for budget in range(12):
        least = min(error for rejected, error in every if rejected <= budget)
        point = pick(front, budget / 12)
        assert point is not None and round(point.attacked_error * 12) == least
        verdict = found.judge(torch.tensor(point.limits))
        assert verdict.attacked.error == pytest.approx(point.attacked_error)
        assert verdict.clean.rejection == pytest.approx(point.clean_rejection)


def test_a_suspicion_that_is_not_finite_is_rejected_and_no_threshold() -> None:
    nan, inf = float("nan"), float("inf")
    clean = Seen(torch.tensor([True, True, True]), torch.tensor([[0.0], [1.0], [nan]]))
    one = Seen(torch.tensor([False, False, False]), torch.tensor([[nan], [inf], [0.5]]))
    other = Seen(torch.tensor([False, True, False]), torch.tensor([[1.0], [0.0], [nan]]))
    found = Observation(
        threat=WHITE, clean=clean, oblivious={}, white_box={"a": one, "b": other}, limits_S=torch.ones(1)
    )
    for point in risk_coverage(found):
        verdict = found.judge(torch.tensor(point.limits))
        assert (point.clean_rejection, point.attacked_error) == (verdict.clean.rejection, verdict.attacked.error)
    assert {point.limits for point in risk_coverage(found)} == {(0.0,), (1.0,)}


def test_a_setting_exactly_on_the_budget_is_within_it() -> None:
    clean = Seen(torch.ones(1000, dtype=torch.bool), torch.arange(1000.0)[:, None])
    wrong = Seen(torch.zeros(1000, dtype=torch.bool), torch.arange(1000.0).flip(0)[:, None])
    found = Observation(threat=WHITE, clean=clean, oblivious={}, white_box={"a": wrong}, limits_S=torch.ones(1))
    point = pick(risk_coverage(found), 0.05)
    assert point is not None and point.clean_rejection == 0.05


def test_what_cannot_reject_has_no_curve(digits: Digits, classifier: nn.Module) -> None:
    found = observe(SUITES["quick"], classifier, digits[0][:5], digits[1][:5], WHITE)
    assert risk_coverage(found) == [] and pick([], 0.1) is None


def test_a_planted_adversarial_neighbour_is_found() -> None:
    """A model that is wrong only in one small region near the sample; the gradient leads there."""

    class Trap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(50.0))

        def forward(self, x: Tensor) -> Tensor:
            depth = self.scale * (x.flatten(1)[:, :4].mean(1) - 0.58)
            return torch.stack((-depth, depth), dim=1)

    found = evaluate(SUITES["search"], Trap(), torch.full((5, 1, 4, 4), 0.5), torch.zeros(5, dtype=torch.long), WHITE)
    assert bool(found.clean.right.all()) and not bool(found.robust.any())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("Linf", -0.1, "white-box"), "eps must be from 0 to 1"),
        (("Linf", 1.5, "white-box"), "eps must be from 0 to 1"),
        (("Linf", float("nan"), "white-box"), "eps must be from 0 to 1"),
        (("L3", 0.1, "white-box"), "the norm must be one of Linf"),
        (("Linf", 0.1, "whitebox"), "did you mean 'white-box'"),
    ],
)
def test_a_threat_model_outside_its_law_is_refused(values: tuple[str, float, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ThreatModel(*values)  # type: ignore[arg-type]


def test_the_interval_is_wilsons() -> None:
    low, high = wilson(0.9, 100)  # Brown, Cai, DasGupta 2001: (0.8256, 0.9448)
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)
