"""The audit's gates: each alarm is raised by what it is for, and an honest model raises none.

Shapes: N images, C channels, H x W pixels, M masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attacks.audit.audit
import attacks.audit.probes
from attacks.audit.audit import Audit, audit
from attacks.audit.gate import Gate
from attacks.audit.quick_gates import quick_gates
from attacks.catalog import PGD_40, PGD_80
from attacks.evaluation import observe
from attacks.suites import SUITES
from attacks.threat import ThreatModel
from benchmarks.broken import DIGITS, Detached, HugeNoise, NoOp, Rounding, SilentNoise
from defenses.base import Defended, Defense
from spaces.exceptions import InputError

WHITE = ThreatModel("Linf", 0.1, "white-box")
Digits = tuple[Tensor, Tensor]


@pytest.fixture
def held_out(digits: Digits) -> Digits:
    return digits[0][1400:1500], digits[1][1400:1500]


def grey(images: int = 64) -> Digits:
    """Images of the pixels .5, all of class 0."""
    return torch.full((images, 1, 8, 8), 0.5), torch.zeros(images, dtype=torch.long)


def behind(kind: type[Defense], classifier: nn.Module, **inference: Any) -> Defended:
    return Defended(kind({}, inference, DIGITS), classifier).eval().requires_grad_(False)


def alarms(found: Audit | tuple[Gate, ...]) -> set[str]:
    gates = found.gates if isinstance(found, Audit) else found
    return {gate.name for gate in gates if not gate.passed}


class Score(nn.Module):
    """A bare model of two classes, logits [s, 0]."""

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))  # where torchattacks looks for the device
        self.score = score

    def forward(self, x_NCHW: Tensor) -> Tensor:
        score_N = self.score(x_NCHW)
        return torch.stack((score_N, torch.zeros_like(score_N)), dim=1)


class Hidden(nn.Module):
    """A bare model whose gradient is zero everywhere."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.model(x_NCHW.detach()) + 0 * x_NCHW.flatten(1).sum(1, keepdim=True)


class Backwards(NoOp):
    """Its gradient points the other way."""

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        return classifier(2 * x_NCHW.detach() - x_NCHW)


class Moving(NoOp):
    """A linear model whose weights' signs are one of 64 masks, drawn for each image: what fools one fools no other."""

    stochastic = True
    masks_MCHW: Tensor

    def build(self) -> None:
        masks_MCHW = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.5
        self.register_buffer("masks_MCHW", masks_MCHW * 2.0 - 1)

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        mask_NCHW = self.masks_MCHW[torch.randint(len(self.masks_MCHW), (len(x_NCHW),))]
        score_N = 1.2 + 0.3 * ((x_NCHW - 0.5) * mask_NCHW).flatten(1).sum(1)
        return torch.stack((score_N, torch.zeros_like(score_N)), dim=1)


class OnTheGrid(NoOp):
    """A linear model that has its gradient only where all pixels are sixteenths, as those of clean images are."""

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        seen_NCHW = torch.where(clean(x_NCHW)[:, None, None, None], x_NCHW, x_NCHW.detach() + 0 * x_NCHW)
        score_N = 1.2 + 0.3 * (seen_NCHW - 0.5).flatten(1).sum(1)
        return torch.stack((score_N, torch.zeros_like(score_N)), dim=1)


class Doorman(Detached):
    """A hidden gradient behind a detector that lets nothing pass but clean images."""

    def accept(self, x_NCHW: Tensor) -> Tensor:
        return clean(x_NCHW)


def clean(x_NCHW: Tensor) -> Tensor:
    return ((16 * x_NCHW).round() - 16 * x_NCHW).abs().flatten(1).amax(1) < 1e-4


def fragile(x_NCHW: Tensor) -> Tensor:
    """A score without gradient that signs of .1 take below 0 and uniform noise of .1 does not."""
    return 1.2 - 20 * (x_NCHW.detach() - 0.5).abs().flatten(1).mean(1) + 0 * x_NCHW.flatten(1).sum(1)


def trough(x_NCHW: Tensor) -> Tensor:
    """A score that is negative only in a trough, over which steps of eps / 4 leap where eps is .1 and not .025."""
    shift_N = x_NCHW.flatten(1).mean(1) - 0.5
    return 1.5 - 10 * shift_N - 2 * ((shift_N > 0.010) & (shift_N < 0.0165))


def slide(x_NCHW: Tensor) -> Tensor:
    """A score that falls to 0 where the mean has moved by .075."""
    return 1.5 - 20 * (x_NCHW.flatten(1).mean(1) - 0.5)


@pytest.mark.parametrize("threat", [WHITE, ThreatModel("L2", 1.2, "white-box"), ThreatModel("Linf", 0.0, "oblivious")])
def test_an_honest_classifier_raises_no_alarm(threat: ThreatModel, held_out: Digits, classifier: nn.Module) -> None:
    found = audit(classifier, *held_out, threat, seed=1)
    assert found.alarms == () and found.baselines == {}
    gate = found.gates[0]
    assert gate.alarm == f"{gate.name}: it does not hold that {gate.law}"
    assert "baseline" not in {gate.name for gate in found.gates}
    assert (found.robustness.attacked.accuracy < 0.8) is (threat.eps > 0)


def test_a_handful_of_images_is_audited_too(held_out: Digits, classifier: nn.Module) -> None:
    assert audit(classifier, held_out[0][:3], held_out[1][:3], WHITE, seed=1).alarms == ()


def test_a_little_noise_raises_no_alarm_but_that_it_is_of_no_use(held_out: Digits, classifier: nn.Module) -> None:
    found = audit(behind(HugeNoise, classifier, sigma=0.02), *held_out, WHITE, seed=1)
    assert alarms(found) == {"baseline"}


def test_the_audit_holds_all_gates_of_a_search(held_out: Digits, classifier: nn.Module) -> None:
    quick = quick_gates(classifier, *held_out, WHITE, seed=1)
    assert set(quick) <= set(audit(classifier, *held_out, WHITE, seed=1).gates)
    assert alarms(quick) == set()


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        (NoOp, {"baseline"}),
        (HugeNoise, {"draws", "baseline"}),
        (SilentNoise, {"determinism"}),
        (Backwards, {"transfer", "unbounded", "planted"}),
        (Detached, {"gradient", "transfer", "unbounded", "planted"}),
        (Doorman, {"gradient", "unbounded", "planted"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else " ".join(sorted(value)),
)
def test_a_defense_raises_the_alarms_that_are_for_it(
    kind: type[Defense], raised: set[str], held_out: Digits, classifier: nn.Module
) -> None:
    assert raised <= alarms(audit(behind(kind, classifier), *held_out, WHITE, seed=1))


def test_a_detector_does_not_excuse_a_hidden_gradient(held_out: Digits, classifier: nn.Module) -> None:
    found = audit(behind(Doorman, classifier), *held_out, WHITE, seed=1).robustness
    assert found.clean.rejection == 0 and found.attacked.accuracy == 0
    # Of what is made wrong only images on the levels are accepted: the wrongs alone would let it pass.
    assert 0.2 < found.attacked.error < 0.4


def test_a_hidden_gradient_is_found_without_one(held_out: Digits, classifier: nn.Module) -> None:
    """Nothing transfers to a bare model: the search without gradients has to find it."""
    assert {"gradient", "square", "unbounded", "planted"} <= alarms(audit(Hidden(classifier), *held_out, WHITE, seed=1))


def test_probabilities_are_found_and_not_attacked(held_out: Digits, classifier: nn.Module) -> None:
    softmax = nn.Sequential(classifier, nn.Softmax(dim=1))
    assert "logits" in alarms(quick_gates(softmax, *held_out, WHITE, seed=0))
    with pytest.raises(InputError, match="leave the softmax out"):
        audit(softmax, *held_out, WHITE, seed=1)


def test_one_step_that_breaks_more_than_many_is_found() -> None:
    found = audit(behind(OnTheGrid, Score(lambda x: 1.5 + x[:, 0, 0, 0])), *grey(), WHITE, seed=1)
    assert found.robustness.attacked.accuracy == 1 and "single-step" in alarms(found)
    assert "gradient" not in alarms(found)


def test_noise_that_breaks_more_than_attacks_is_found() -> None:
    found = audit(Score(fragile), *grey(), WHITE, seed=1)
    assert found.robustness.attacked.accuracy == 1 and "noise" in alarms(found)


def test_a_budget_that_breaks_less_than_a_smaller_one_is_found() -> None:
    assert "budget" in alarms(audit(Score(trough), *grey(), WHITE, seed=1))
    assert "budget" not in alarms(audit(Score(slide), *grey(), WHITE, seed=1))


def test_noise_that_hides_a_weakness_of_each_of_its_draws_is_found() -> None:
    found = audit(behind(Moving, Score(lambda x: 1.5 + x[:, 0, 0, 0])), *grey(), WHITE, seed=1)
    assert found.robustness.attacked.accuracy > 0.9 and "randomness" in alarms(found)
    assert not alarms(found) & {"determinism", "draws", "gradient", "convergence"}


def shortened(monkeypatch: pytest.MonkeyPatch, pace: float) -> None:
    """Let the audit attack with too small steps, and with nothing else that could make up for them."""
    attack = replace(PGD_40, pace=pace)
    for module in (attacks.audit.audit, attacks.audit.probes):
        monkeypatch.setattr(module, "PGD_40", attack)
    monkeypatch.setitem(SUITES, "audit", replace(SUITES["audit"], oblivious=(), white_box=(attack,)))


def test_an_attack_that_is_cut_short_is_found(
    held_out: Digits, classifier: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    shortened(monkeypatch, pace=0.02)
    found = audit(classifier, *held_out, WHITE, seed=1)
    assert "convergence" in alarms(found)
    assert "trajectory" not in alarms(found), "it was attacked with as many steps as were needed"
    monkeypatch.setattr(attacks.audit.probes, "PGD_80", replace(PGD_80, pace=0.004))
    assert "trajectory" in alarms(audit(classifier, *held_out, WHITE, seed=1))


@pytest.mark.parametrize(
    ("raised", "white_box"), [("sources", ()), ("tailored", (PGD_40,))], ids=["sources", "tailored"]
)
def test_attacks_that_were_not_run_are_missed(
    raised: str, white_box: tuple[Any, ...], held_out: Digits, classifier: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = behind(Doorman, classifier)
    assert raised not in alarms(audit(target, *held_out, WHITE, seed=1))
    monkeypatch.setitem(SUITES, "audit", replace(SUITES["audit"], white_box=white_box))
    assert raised in alarms(audit(target, *held_out, WHITE, seed=1))


def test_a_heavier_attack_never_leaves_more(held_out: Digits, classifier: nn.Module) -> None:
    for target in (classifier, behind(HugeNoise, classifier, sigma=0.1)):
        lighter = observe(SUITES["audit"], target, *held_out, WHITE, seed=1).judge()
        heavier = audit(target, *held_out, WHITE, seed=1).robustness
        assert bool((heavier.strongest.right <= lighter.strongest.right).all())
        assert bool((heavier.strongest.right <= heavier.oblivious.right).all())
        assert bool((heavier.oblivious.right <= heavier.clean.right).all())
        assert heavier.strongest.worst <= heavier.strongest.accuracy
    assert (
        heavier.strongest.worst < heavier.strongest.accuracy and len(heavier.strongest.right) == SUITES["audit"].looks
    )


def test_the_audit_is_the_same_again(held_out: Digits, classifier: nn.Module) -> None:
    target = behind(HugeNoise, classifier, sigma=0.1)
    one, other = (audit(target, *held_out, WHITE, seed=1) for _ in range(2))
    assert one.gates == other.gates and one.robustness.trail == other.robustness.trail


def test_an_oblivious_number_is_audited_by_white_box_attacks(held_out: Digits, classifier: nn.Module) -> None:
    found = audit(behind(Rounding, classifier), *held_out, ThreatModel("Linf", 0.1, "oblivious"), seed=1)
    assert "gradient" in alarms(found)
    assert torch.equal(found.robustness.attacked.right, found.robustness.oblivious.right)
    assert found.robustness.white_box is not None


def test_what_stands_beside_is_attacked_alike(held_out: Digits, classifier: nn.Module) -> None:
    other = behind(Rounding, classifier)
    found = audit(behind(NoOp, classifier), *held_out, WHITE, seed=1, baselines={"rounded": other})
    alone = observe(SUITES["audit"], other, *held_out, WHITE, seed=1).judge()
    assert list(found.baselines) == ["undefended", "rounded"]
    assert torch.equal(found.baselines["rounded"].attacked.right, alone.attacked.right)
