"""The evaluation: who is attacked and how, draws of the noise, and the three attackers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.attack import Attack
from attacks.black_box import BlackBoxAttacker, train_substitute
from attacks.catalog import (
    CHOICE_10,
    CW_L2,
    DEEPFOOL,
    FGSM,
    FGSM_TARGETED,
    IFGSM,
    MIXTURE,
    PGD_10,
    SELECTIVE_10,
    SQUARE,
)
from attacks.evaluation import evaluate, look, observe, strikes
from attacks.gradient_view import Opening, View
from attacks.risk_coverage import risk_coverage
from attacks.suites import SUITES, Suite, craft_oblivious
from attacks.threat import ThreatModel
from tests.support.guards import Guard, Smooth

WHITE = ThreatModel("Linf", 0.1, "white-box")
OBLIVIOUS = replace(WHITE, knowledge="oblivious")
BLACK = replace(WHITE, knowledge="black-box")
PLAIN = Suite(name="plain", oblivious=(FGSM,), white_box=(IFGSM, PGD_10), draws=1)
NOISY = replace(PLAIN, draws=2, looks=5)
FAST_CW = replace(CW_L2, steps=20)
Digits = tuple[Tensor, Tensor]
Call = dict[str, Any]


@pytest.fixture
def held_out(digits: Digits) -> Digits:
    return digits[0][1400:1500], digits[1][1400:1500]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call of Attack.craft, with what it returned."""
    made, craft = list[Call](), Attack.craft

    def spied(
        attack: Attack, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int, **rest: Any
    ) -> Any:
        moved = craft(attack, model, x, y, threat, seed, **rest)
        made.append({"name": attack.name, "x": x, "y": y, "seed": seed, "moved": moved, "ids_N": None, **rest})
        return moved

    monkeypatch.setattr(Attack, "craft", spied)
    return made


def test_common_noise_gives_every_version_of_an_image_the_same_draws(
    held_out: Digits, classifier: nn.Module, calls: list[Call]
) -> None:
    """Attacks of size 0 change no verdict in any draw, however many there are and whoever is left to attack."""
    guard = Guard(Smooth(noise=0.4), classifier)
    said = observe(NOISY, guard, *held_out, ThreatModel("Linf", 0, "white-box"), seed=2)
    assert said.clean.right.shape == (5, 100)
    assert 0.1 < float((said.clean.right.any(0) & ~said.clean.right.all(0)).double().mean())
    for version in said.versions:
        assert torch.equal(version.right, said.clean.right)
    assert [len(call["x"]) for call in calls][1:] == [int(said.clean.right.any(0).sum())] * 6 != [100] * 6
    again = observe(NOISY, guard, *held_out, WHITE, seed=3)
    assert not torch.equal(again.clean.right, said.clean.right)


def test_an_image_that_is_not_attacked_keeps_its_clean_verdict_in_every_draw(
    held_out: Digits, classifier: nn.Module
) -> None:
    guard, spared = Guard(Smooth(noise=0.4), classifier), torch.arange(100) % 2 == 0
    said = observe(NOISY, guard, *held_out, WHITE, standing_N=~spared)
    assert said.white_box is not None and len(said.white_box) == 6
    for version in said.white_box.values():
        assert torch.equal(version.right[:, spared], said.clean.right[:, spared])
        assert not torch.equal(version.right, said.clean.right)


def test_each_look_draws_new_noise_and_the_same_in_every_call(held_out: Digits, classifier: nn.Module) -> None:
    guard = Guard(Smooth(noise=0.4), classifier)
    first, again, other = (look(guard, *held_out, seed, 3).right for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 3
    torch.manual_seed(0)
    assert torch.equal(first[0], guard(held_out[0]).argmax(1) == held_out[1])


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_an_attack_sees_what_the_earlier_ones_left_in_some_draw(
    noise: float, held_out: Digits, classifier: nn.Module, calls: list[Call]
) -> None:
    guard = Guard(Smooth(noise=noise), classifier) if noise else classifier
    said = observe(replace(NOISY, oblivious=(FGSM_TARGETED,)), guard, *held_out, WHITE)
    (blind, *white) = calls
    assert said.white_box is not None and len(white) == len(said.white_box) == (6 if noise else 2)
    assert len(blind["x"]) == 100 and not blind.get("stops")
    standing = said.clean.right & said.oblivious["fgsm-targeted"].right
    for call, version in zip(white, said.white_box.values(), strict=True):
        assert torch.equal(call["ids_N"], standing.any(0).nonzero().flatten())
        assert torch.equal(call["x"], held_out[0][call["ids_N"]]) and torch.equal(call["y"], held_out[1][call["ids_N"]])
        assert call["stops"] is (noise == 0)  # what one draw gets wrong another may not
        standing = standing & version.right
    assert 100 > len(white[0]["x"]) > len(white[-1]["x"]) > 0
    assert noise == 0 or bool((standing.any(0) & ~standing.all(0)).any())


def test_where_images_can_be_rejected_or_the_gradient_is_a_stand_ins_all_are_attacked_to_the_end(
    held_out: Digits, classifier: nn.Module, calls: list[Call]
) -> None:
    observe(PLAIN, Guard(Smooth(darkest=0.3), classifier), *held_out, WHITE)
    assert [(len(call["x"]), call["stops"]) for call in calls[1:]] == [(100, False)] * 6
    calls.clear()
    said = observe(PLAIN, Guard(Smooth(), classifier), *held_out, WHITE)
    assert list(said.white_box or ()) == [
        f"{a} ({g})" for g in ("surrogate", "bpda", "exact") for a in ("ifgsm", "pgd-10")
    ]
    assert [call["stops"] for call in calls[1:]] == [False, False, True, True, True, True]


def test_the_white_box_follows_the_black_box_too(held_out: Digits, classifier: nn.Module, calls: list[Call]) -> None:
    (x, y), broken = held_out, torch.arange(100) < 30
    dark = {"fgsm": torch.where(broken[:, None, None, None], torch.zeros_like(x), x)}
    said = observe(PLAIN, classifier, x, y, WHITE, oblivious={}, black_box=dark)
    assert said.black_box is not None and list(said.oblivious) == []
    fallen = ~(classifier(torch.zeros_like(x)).argmax(1) == y) & broken | (classifier(x).argmax(1) != y)
    assert torch.equal(calls[0]["ids_N"], (~fallen).nonzero().flatten()) and int(fallen.sum()) > 20
    assert torch.equal(said.judge().strongest.right, said.judge().strongest.right & said.black_box["fgsm"].right)


def test_another_start_moves_the_attacks_and_leaves_the_noise(
    held_out: Digits, classifier: nn.Module, calls: list[Call]
) -> None:
    guard = Guard(Smooth(noise=0.3), classifier)
    suite = replace(NOISY, white_box=(PGD_10,))
    one, other = (observe(suite, guard, *held_out, WHITE, seed=4, start=start) for start in (0, 1))
    assert torch.equal(one.clean.right, other.clean.right)
    assert torch.equal(one.oblivious["fgsm"].right, other.oblivious["fgsm"].right)
    (blind, first, *_), (_, second, *_) = calls[:4], calls[4:]
    assert (blind["seed"], first["seed"], second["seed"]) == (4, 4, 5)
    assert torch.equal(first["ids_N"], second["ids_N"]) and not torch.equal(first["moved"], second["moved"])


def plain_verdicts(suite: Suite, target: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Every attack over all samples, one after the other: the slow way."""
    robust = target(x).argmax(1) == y
    for attack in suite.oblivious:
        robust &= target(attack.craft(View(target), x, y, WHITE, 0)).argmax(1) == y
    for attack in suite.white_box:
        robust &= target(attack.craft(View(target), x, y, WHITE, 0, stops=True)).argmax(1) == y
    return robust


def test_attacking_survivors_only_gives_the_verdicts_of_attacking_all(held_out: Digits, classifier: nn.Module) -> None:
    verdict = evaluate(PLAIN, classifier, *held_out, WHITE)
    assert torch.equal(verdict.robust, plain_verdicts(PLAIN, classifier, *held_out)[None])
    assert 0 < int(verdict.robust.sum()) < 100


def test_a_sample_is_robust_only_if_it_withstands_every_attack(held_out: Digits, classifier: nn.Module) -> None:
    verdict = evaluate(SUITES["search"], classifier, *held_out, WHITE)
    for stronger, weaker in ((verdict.strongest, verdict.oblivious), (verdict.oblivious, verdict.clean)):
        assert bool((stronger.right <= weaker.right).all()) and bool((stronger.wrong >= weaker.wrong).all())
    cumulative = [share for name, share in verdict.trail.items() if name.startswith("white-box")]
    assert cumulative == sorted(cumulative, reverse=True)
    assert verdict.oblivious.accuracy <= min(s for name, s in verdict.trail.items() if name.startswith("oblivious"))


def test_oblivious_images_are_crafted_on_the_bare_classifier(held_out: Digits, classifier: nn.Module) -> None:
    guard = Guard(Smooth(steps=2), classifier)
    made = craft_oblivious(SUITES["quick"], classifier, *held_out, OBLIVIOUS, 0)
    with_images = evaluate(SUITES["quick"], guard, *held_out, OBLIVIOUS, oblivious=made)
    assert with_images.white_box is None and list(with_images.trail) == ["oblivious/ifgsm-targeted"]
    assert torch.equal(with_images.robust, evaluate(SUITES["quick"], guard, *held_out, OBLIVIOUS).robust)
    asked = evaluate(SUITES["quick"], guard, *held_out, OBLIVIOUS, white_box=True)
    assert asked.white_box is not None and torch.equal(asked.attacked.right, with_images.attacked.right)


def test_bpda_breaks_the_rounding_that_hides_from_the_exact_gradient(held_out: Digits, classifier: nn.Module) -> None:
    guard = Guard(Smooth(steps=8), classifier)
    verdict = evaluate(SUITES["search"], guard, *held_out, WHITE, oblivious={})
    exact = PGD_10.craft(View(guard, "exact"), *held_out, WHITE, 0)
    masked = float(look(guard, exact, held_out[1], 0).right.double().mean())
    assert float(verdict.robust.double().mean()) < masked - 0.3


def test_rejection_never_counts_as_accuracy(held_out: Digits, classifier: nn.Module) -> None:
    nothing = evaluate(SUITES["quick"], Guard(Smooth(darkest=2.0), classifier), *held_out, WHITE)
    assert (nothing.clean.accuracy, nothing.clean.error, nothing.clean.rejection) == (0, 0, 1)
    assert (nothing.attacked.accuracy, nothing.attacked.error, nothing.attacked.rejection) == (0, 0, 1)
    assert not bool(nothing.robust.any())


def test_verdicts_under_other_thresholds_need_no_other_pass(held_out: Digits, classifier: nn.Module) -> None:
    loose = observe(PLAIN, Guard(Smooth(darkest=0.0), classifier), *held_out, WHITE)
    for darkest in (0.28, 0.31, 0.34):
        strict = observe(PLAIN, Guard(Smooth(darkest=darkest), classifier), *held_out, WHITE).judge()
        swept = loose.judge(torch.tensor([-darkest]))
        assert 0 < strict.clean.rejection < 1 and strict.trail == swept.trail
        for name in ("clean", "oblivious", "strongest"):
            mine, theirs = getattr(swept, name), getattr(strict, name)
            assert torch.equal(mine.right, theirs.right) and torch.equal(mine.wrong, theirs.wrong)


def test_an_unbounded_attack_stands_in_the_trail_and_changes_nothing_else_in_linf(
    held_out: Digits, classifier: nn.Module, calls: list[Call]
) -> None:
    with_cw = Suite(name="cw", oblivious=(FAST_CW, FGSM), white_box=(DEEPFOOL, FAST_CW, PGD_10), draws=1)
    without = replace(with_cw, oblivious=(FGSM,), white_box=(PGD_10,))
    one, other = (observe(suite, classifier, *held_out, WHITE) for suite in (with_cw, without))
    assert one.white_box is not None
    assert [one.oblivious["cw-l2"].bounded, one.white_box["deepfool (exact)"].bounded] == [False, False]
    verdict, plain = one.judge(), other.judge()
    for name in ("oblivious", "strongest"):
        assert torch.equal(getattr(verdict, name).right, getattr(plain, name).right)
    assert verdict.trail["oblivious/cw-l2"] < 0.1 < 0.2 < verdict.strongest.accuracy
    assert plain.trail.items() <= verdict.trail.items()
    assert {len(call["x"]) for call in calls if call["name"] == "pgd-10"} == {int(plain.oblivious.right.sum())}
    assert risk_coverage(one) == risk_coverage(other) and len(one.versions) == len(other.versions) == 3


def test_the_trail_of_an_unbounded_white_box_attack_is_over_all_images(held_out: Digits, classifier: nn.Module) -> None:
    """What fell to the attacks before it is not counted as withstanding it."""
    verdict = evaluate(replace(PLAIN, white_box=(IFGSM, FAST_CW)), classifier, *held_out, WHITE)
    assert verdict.oblivious.accuracy < 0.7 and verdict.trail["white-box/cw-l2 (exact)"] < 0.1


def test_under_l2_an_unbounded_attack_counts_with_what_it_finds_within_eps(
    held_out: Digits, classifier: nn.Module
) -> None:
    suite, clean = Suite(name="cw", oblivious=(FAST_CW,), white_box=(DEEPFOOL,), draws=1), classifier(held_out[0])
    shares = []
    for eps in (0, 0.3, 0.6, 5):
        said = observe(suite, classifier, *held_out, ThreatModel("L2", eps, "white-box"))
        assert said.white_box is not None and all(version.bounded for version in said.versions)
        shares.append((said.judge().oblivious.accuracy, said.judge().strongest.accuracy))
    accuracy = float((clean.argmax(1) == held_out[1]).double().mean())
    assert shares[0] == pytest.approx((accuracy, accuracy))
    assert sorted(shares, reverse=True) == shares and shares[0] > shares[1] > shares[2] > shares[3]
    assert shares[3][1] < 0.05


class Open(Smooth):
    @property
    def openings(self) -> tuple[Opening, ...]:
        return "choice", "rejection", "latent"


def test_each_attack_strikes_through_the_gradients_and_at_the_openings_that_it_is_made_for(
    classifier: nn.Module,
) -> None:
    suite = Suite(name="s", oblivious=(), white_box=(SQUARE, PGD_10, CHOICE_10, SELECTIVE_10, MIXTURE), draws=1)

    def struck(target: nn.Module) -> list[tuple[str, str]]:
        return [(attack.name, gradient) for attack, gradient in strikes(suite, target)]

    assert struck(classifier) == [("pgd-10", "exact"), ("square", "exact")]
    aimless = [("pgd-10", gradient) for gradient in ("surrogate", "bpda", "exact")]
    assert struck(Guard(Smooth(), classifier)) == [*aimless, ("square", "exact")]
    each = [(name, gradient) for gradient in ("surrogate", "bpda", "exact") for name in ("pgd-10", "selective-10")]
    assert struck(Guard(Smooth(darkest=0.1), classifier)) == [*each, ("square", "exact")]
    assert struck(Guard(Open(), classifier)) == [*each, ("square", "exact"), ("choice-10", "surrogate")]


def test_the_trail_names_each_attack_with_its_attacker_and_gradient(held_out: Digits, classifier: nn.Module) -> None:
    square = replace(SQUARE, settings=(("queries", 5),))
    suite = replace(PLAIN, white_box=(replace(PGD_10, steps=2), square, replace(SELECTIVE_10, steps=2)))
    defense = Smooth(darkest=0.2)
    defense.gradients = ("bpda", "exact")
    guard = Guard(defense, classifier)
    said = observe(suite, guard, *held_out, BLACK, black_box={"fgsm": held_out[0]}, white_box=True)
    bounded = [f"{name} ({gradient})" for gradient in ("bpda", "exact") for name in ("pgd-10", "selective-10")]
    expected = ["oblivious/fgsm", "black-box/fgsm", *(f"white-box/{name}" for name in (*bounded, "square"))]
    assert list(said.judge().trail) == expected


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 10))


def test_an_outsider_asks_for_classes_and_fools_the_classifier_with_its_substitutes_images(
    digits: Digits, held_out: Digits, classifier: nn.Module
) -> None:
    asked: list[int] = []

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            asked.append(len(x))
            return classifier(x).detach()

    threat = replace(BLACK, eps=0.3)
    attacker = BlackBoxAttacker(digits[0][1600:1660], small)
    images, queries = attacker.craft(PLAIN, Counted(), *held_out, threat, 0)
    assert queries == sum(asked) == 60 * 2**6 and list(images) == ["fgsm"]
    assert float((images["fgsm"] - held_out[0]).abs().max()) <= 0.3 + 1e-6
    said = replace(observe(PLAIN, classifier, *held_out, threat, black_box=images), queries=queries)
    verdict = said.judge()
    assert verdict.queries == queries and verdict.white_box is None and said.white_box is None
    assert verdict.clean.accuracy > 0.85 and verdict.attacked.accuracy < 0.3
    assert verdict.attacked is verdict.black_box
    noise = (held_out[0] + 0.3 * torch.randn_like(held_out[0]).sign()).clamp(0, 1)
    assert verdict.attacked.accuracy < float((classifier(noise).argmax(1) == held_out[1]).double().mean()) - 0.2


def test_an_outsiders_substitute_goes_over_the_boundary_and_follows_from_the_seed(
    digits: Digits, held_out: Digits, classifier: nn.Module
) -> None:
    guard, attacker = Guard(Smooth(noise=0.2), classifier), BlackBoxAttacker(digits[0][1600:1604], small)
    first, again, other = (attacker.craft(PLAIN, guard, *held_out, BLACK, seed)[0]["fgsm"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    away = train_substitute(guard, digits[0][1600:1604], small, step=-0.1, seed=0).network  # over the boundary
    assert torch.equal(first, FGSM.craft(away, *held_out, BLACK, 0))


def test_evaluating_is_judging_what_was_observed(held_out: Digits, classifier: nn.Module) -> None:
    options: dict[str, Any] = {"seed": 3, "white_box": True, "standing_N": torch.arange(100) < 50, "start": 2}
    one = evaluate(PLAIN, classifier, *held_out, OBLIVIOUS, **options)
    other = observe(PLAIN, classifier, *held_out, OBLIVIOUS, **options).judge()
    assert one.trail == other.trail and torch.equal(one.strongest.right, other.strongest.right)
