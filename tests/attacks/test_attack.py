"""Every attack of every suite under one contract, and the suites against the papers' budgets."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks
from torch import Tensor, nn

import attacks.attack
from attacks.algorithms.apgd import APGD
from attacks.algorithms.base import lengths
from attacks.algorithms.nes import NES
from attacks.algorithms.pgd import PGD
from attacks.algorithms.rand_fgsm import RandFGSM
from attacks.algorithms.square import Square
from attacks.attack import Attack, AttackError, wrong_labels
from attacks.audit.quick_gates import quick_gates
from attacks.catalog import CW_L2, DEEPFOOL, FGSM, FGSM_TARGETED, IFGSM, MIM_10, MIXTURE, NES_30, PGD_10, SQUARE, STILL
from attacks.gradient_view import View
from attacks.seeding import Draws, reproducible
from attacks.suites import SUITES
from attacks.threat import Norm, ThreatModel
from tests.support.guards import Guard, Smooth

Digits = tuple[Tensor, Tensor]
WHITE = ThreatModel("Linf", 0.1, "white-box")
THREATS: dict[Norm, ThreatModel] = {"Linf": WHITE, "L2": ThreatModel("L2", 0.5, "white-box")}
EVERY = list(dict.fromkeys(attack for suite in SUITES.values() for attack in (*suite.oblivious, *suite.white_box)))
SMALL = {"queries": 40, "binary_search_steps": 3, "lr": 0.2}


def few(attack: Attack) -> Attack:
    """Return the attack with at most eight steps."""
    settings = tuple((name, SMALL.get(name, value)) for name, value in attack.settings)
    return replace(attack, steps=attack.steps and min(attack.steps, 8), settings=settings)


CASES = [(few(attack), THREATS[norm]) for attack in EVERY if attack.aims is None for norm in attack.norms]
every_attack = pytest.mark.parametrize(
    ("attack", "threat"), CASES, ids=[f"{attack.name}-{threat.norm}" for attack, threat in CASES]
)


@pytest.fixture
def held_out(digits: Digits) -> Digits:
    return digits[0][1400:1424], digits[1][1400:1424]


class Linear(nn.Module):
    """Logits [w.x, 0]: the gradient of the loss is known."""

    def __init__(self) -> None:
        super().__init__()
        self.w_CHW = nn.Parameter(torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        score_N = (x * self.w_CHW).flatten(1).sum(1)
        return torch.stack((score_N, torch.zeros_like(score_N)), dim=1)


class Drawing(nn.Module):
    """A training composite with a frozen part, that draws from torch's generator at each pass and may break at one."""

    def __init__(self, classifier: nn.Module, breaks_at: int = 0) -> None:
        super().__init__()
        self.frozen = nn.Sequential(copy.deepcopy(classifier).requires_grad_(), nn.Dropout()).eval()
        self.idle, self.breaks_at, self.drawn = nn.Dropout(), breaks_at, list[float]()

    def forward(self, x: Tensor) -> Tensor:
        assert not any(module.training for module in self.modules())
        self.drawn.append(float(torch.rand(())))
        if len(self.drawn) == self.breaks_at:
            raise RuntimeError("on purpose")
        return self.idle(self.frozen(x))


def state(model: nn.Module) -> tuple[list[bool], list[int], str]:
    """Return every module's mode, and the state of torch's and NumPy's generators."""
    modes = [module.training for module in model.modules()]
    return modes, torch.get_rng_state().tolist(), str(np.random.get_state(legacy=False))


@every_attack
def test_images_stay_within_the_threat_model(
    attack: Attack, threat: ThreatModel, held_out: Digits, classifier: nn.Module
) -> None:
    x, kept = held_out[0], held_out[0].clone()
    moved = attack.craft(classifier, *held_out, threat, 0)
    assert moved.shape == x.shape and moved.dtype == x.dtype and not moved.requires_grad
    assert 0 <= float(moved.min()) and float(moved.max()) <= 1
    assert torch.equal(x, kept)
    if not attack.exceeds(threat):
        sizes = torch.linalg.vector_norm((moved - x).flatten(1), math.inf if threat.norm == "Linf" else 2, dim=1)
        assert float(sizes.max()) <= threat.eps + 2e-6
    assert float((classifier(moved).argmax(1) == held_out[1]).double().mean()) < 0.9


@every_attack
def test_generators_modes_and_parameters_are_left_alone_and_no_noise_is_replayed(
    attack: Attack, threat: ThreatModel, held_out: Digits, classifier: nn.Module
) -> None:
    model = Drawing(classifier)
    before = state(model)
    attack.craft(model, *held_out, threat, 0)
    assert state(model) == before
    assert len(set(model.drawn)) == len(model.drawn) > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    broken = Drawing(classifier, breaks_at=(len(model.drawn) + 1) // 2)
    with torch.no_grad(), pytest.raises(RuntimeError, match="on purpose"):
        attack.craft(broken, *held_out, threat, 0)
    assert state(broken) == before and torch.is_grad_enabled()
    assert broken.drawn == model.drawn[: broken.breaks_at]


@every_attack
def test_an_image_does_not_depend_on_those_beside_it(
    attack: Attack, threat: ThreatModel, held_out: Digits, classifier: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, y), ids = held_out, torch.arange(100, 124)

    def crafted(chosen: Tensor, stops: bool) -> Tensor:
        return attack.craft(classifier, x[chosen], y[chosen], threat, 3, ids_N=ids[chosen], stops=stops)

    every = torch.arange(24)
    whole, stopped = (crafted(every, stops) for stops in (False, True))
    apart = torch.cat([crafted(chosen, stops=False) for chosen in every.split(8)])
    assert torch.allclose(whole, apart, atol=1e-5)
    monkeypatch.setattr(attacks.attack, "BATCH", 7)
    assert torch.allclose(stopped, crafted(every, stops=True), atol=1e-5)


@every_attack
def test_the_seed_decides_and_another_one_matters_where_something_is_random(
    attack: Attack, threat: ThreatModel, held_out: Digits, classifier: nn.Module
) -> None:
    first, again, other = (attack.craft(classifier, *held_out, threat, seed) for seed in (7, 7, 8))
    starts = attack.family in (RandFGSM, APGD, Square, NES) or (attack.family is PGD and attack.settings != STILL)
    assert torch.equal(first, again)
    assert torch.equal(first, other) is not (starts or attack.targeted)
    renamed = replace(attack, name="another").craft(classifier, *held_out, threat, 7)
    assert torch.equal(first, renamed) is not (starts or attack.targeted)  # attacks of a suite draw apart


def test_told_to_stop_an_attack_leaves_what_is_wrong_as_it_is(held_out: Digits, classifier: nn.Module) -> None:
    x, y = held_out[0], (held_out[1] + torch.arange(24) % 2) % 10
    wrong = classifier(x).argmax(1) != y
    for stops in (False, True):
        moved = (IFGSM.craft(classifier, x, y, WHITE, 0, stops=stops) != x).flatten(1).any(1)
        assert torch.equal(moved, ~wrong if stops else torch.ones_like(wrong)) and 0 < int(wrong.sum()) < 24


BOUNDED = [(attack, threat) for attack, threat in CASES if not attack.unbounded]


@pytest.mark.parametrize(
    ("attack", "threat"),
    BOUNDED,
    ids=[f"{attack.name}-{threat.norm}" for attack, threat in BOUNDED],
)
def test_with_no_room_images_stay(attack: Attack, threat: ThreatModel, held_out: Digits, classifier: nn.Module) -> None:
    assert torch.equal(attack.craft(classifier, *held_out, replace(threat, eps=0.0), 0), held_out[0])


@every_attack
def test_no_image_is_an_answer_to_none(
    attack: Attack, threat: ThreatModel, held_out: Digits, classifier: nn.Module
) -> None:
    assert attack.craft(classifier, held_out[0][:0], held_out[1][:0], threat, 0).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("attack", EVERY, ids=lambda attack: attack.name)
def test_the_budget_of_each_attack_can_be_written_down(attack: Attack) -> None:
    for norm in attack.norms:
        threat = THREATS[norm]
        budget = json.loads(json.dumps(attack.budget(threat)))
        assert budget["attack"] == attack.name and budget["class"] == f"attacks.{attack.family.__name__}"
        assert budget.get("eps") == (None if attack.unbounded else threat.eps)
        assert budget["norm"] == (threat.norm if "eps" in budget or norm == "L2" else "L2, least, not bounded by eps")
        assert budget["targeted"] is attack.targeted and budget.get("steps") == attack.steps
    assert "Linf" in attack.norms and (attack.aims is None) == (attack.family.__module__.rpartition(".")[2] in PLAIN)


PLAIN = ("pgd", "rand_fgsm", "carlini_wagner", "deepfool", "mim", "apgd", "fab", "square", "nes")


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


def test_a_suites_pgd_reaches_the_optimum_of_a_linear_model_in_the_threat_models_norm() -> None:
    model, x = Linear(), torch.full((1, 1, 4, 4), 0.5)
    w_CHW = model.w_CHW.detach()
    for norm, threat in THREATS.items():
        moved = replace(PGD_10, steps=60).craft(model, x, torch.tensor([0]), threat, 0) - x
        way_CHW = w_CHW.sign() if norm == "Linf" else w_CHW / w_CHW.norm()
        assert torch.allclose(moved[0], -threat.eps * way_CHW, atol=1e-4)


def test_a_planted_adversarial_neighbour_is_found() -> None:
    """A model that is wrong only in one small region near the sample; the gradient leads there."""

    class Trap(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            depth = 50 * (x.flatten(1)[:, :4].mean(1) - 0.58)
            return torch.stack((-depth, depth), dim=1)

    x, y = torch.full((5, 1, 4, 4), 0.5), torch.zeros(5, dtype=torch.long)
    for attack in (FGSM, IFGSM, PGD_10, MIM_10, DEEPFOOL):
        assert bool((Trap()(attack.craft(Trap(), x, y, WHITE, 0)).argmax(1) == 1).all())


class Escapes(torchattacks.FGSM):  # type: ignore[misc]  # torchattacks is not typed
    """A faulty attack: it moves twice as far as it may."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        moved: Tensor = images + 2 * self.eps
        return moved


class Nan(torchattacks.FGSM):  # type: ignore[misc]  # torchattacks is not typed
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return images * torch.nan


class Darkens(torchattacks.FGSM):  # type: ignore[misc]  # torchattacks is not typed
    """Within eps, and below 0."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return images - images.amax() - self.eps / 2


@pytest.mark.parametrize(
    ("family", "norm", "said"),
    [
        (Escapes, "Linf", r"faulty must stay within white-box, Linf eps 0\.1 and \[0, 1\], but moved by 0\.2 into"),
        (Escapes, "L2", r"faulty must stay within white-box, L2 eps 0\.5 and \[0, 1\], but moved by 4 into \[1\.5"),
        (Nan, "Linf", "moved by nan"),
        (Nan, "L2", "moved by nan"),
        (Darkens, "Linf", r"into \[-0\.05, "),
    ],
)
def test_what_leaves_the_threat_model_is_not_believed(family: type, norm: Norm, said: str) -> None:
    faulty = Attack(name="faulty", family=family, source="none", norms=(norm,))
    x = torch.full((1, 1, 4, 4), 0.02 if family is Darkens else 0.5)
    with pytest.raises(AttackError, match=said):
        faulty.craft(Linear(), x, torch.tensor([0]), THREATS[norm], 0)


class Templates(Smooth):
    """Classes are mean images: what GMVAE's attack needs."""

    def __init__(self, means_KCHW: Tensor) -> None:
        super().__init__()
        self.means_KCHW = means_KCHW
        self.means_KL = means_KCHW.flatten(1)

    def ratios(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - self.means_KCHW[y]).square().flatten(1).mean(1)[:, None].repeat(1, 2) * 10


UNBOUNDED = [few(CW_L2), few(DEEPFOOL), replace(few(MIXTURE), settings=(("lr", 0.05),))]


@pytest.mark.parametrize("attack", UNBOUNDED, ids=lambda attack: attack.name)
def test_an_unbounded_attack_keeps_to_an_l2_ball_image_by_image_and_to_no_other(
    attack: Attack, held_out: Digits, digits: Digits, classifier: nn.Module
) -> None:
    means = torch.stack([digits[0][:1400][digits[1][:1400] == k].mean(0) for k in range(10)])
    x, y = held_out
    model = View(Guard(Templates(means), classifier))
    free = attack.craft(model, x, y, ThreatModel("L2", 100, "white-box"), 0)
    assert torch.equal(attack.craft(model, x, y, WHITE, 0), free)
    sizes = lengths(free - x)
    eps = float(sizes.median())
    assert 0 < eps and float((free - x).abs().amax()) > WHITE.eps
    within = attack.craft(model, x, y, ThreatModel("L2", eps, "white-box"), 0)
    assert torch.equal(within, torch.where(sizes <= eps, free, x))
    assert attack.exceeds(WHITE) and not attack.exceeds(THREATS["L2"])


def test_wrong_labels_are_wrong_uniform_and_an_images_own() -> None:
    y = torch.arange(10).repeat(2000)
    wrong = wrong_labels(y, 10, Draws(0, torch.arange(20_000)))
    assert bool((wrong != y).all())
    counts = ((wrong - y) % 10).bincount(minlength=10)
    assert int(counts[1:].min()) > 2000 and int(counts[1:].max()) < 2450
    some = torch.tensor([5, 17, 900])
    assert torch.equal(wrong_labels(y[some], 10, Draws(0, some)), wrong[some])


def test_a_targeted_attack_reaches_a_wrong_label_of_the_models_classes(held_out: Digits, classifier: nn.Module) -> None:
    x, y = held_out
    aims: list[Tensor] = []

    class Aims(torchattacks.FGSM):  # type: ignore[misc]  # torchattacks is not typed
        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            aims.append(self.get_target_label(images, labels))
            return images

    three = nn.Sequential(classifier, nn.Linear(10, 3))
    Attack(name="aims", family=Aims, source="none", targeted=True).craft(three, x, y % 3, WHITE, 0)
    assert set(aims[0].tolist()) == {0, 1, 2} and bool((aims[0] != y % 3).all())


def test_modes_and_generators_are_restored_when_an_attack_raises() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1)).train()
    before = state(model)
    with pytest.raises(RuntimeError, match="on purpose"), reproducible(model, 3):
        torch.rand(1)
        raise RuntimeError("on purpose")
    assert state(model) == before


PAPERS: list[tuple[str, float, str, dict[str, Any]]] = [
    ("puvae", 0.3, "fgsm-targeted", {"eps": 0.3, "alpha": 0.3, "steps": 1, "random_start": False}),
    ("puvae", 0.3, "ifgsm-targeted", {"eps": 0.3, "alpha": 0.03, "steps": 10, "random_start": False}),
    ("puvae", 0.3, "rand-fgsm-targeted", {"eps": 0.3, "alpha": 0.05}),
    ("puvae", 0.3, "cw-100", {"steps": 100, "c": 10, "lr": 0.2}),
    ("puvae-cifar", 0.06, "fgsm-targeted", {"eps": 0.06, "alpha": 0.06, "steps": 1}),
    ("puvae-cifar", 0.06, "ifgsm-targeted-cifar", {"eps": 0.06, "alpha": 0.03, "steps": 10}),
    ("puvae-cifar", 0.06, "rand-fgsm-cifar", {"eps": 0.06, "alpha": 0.005}),
    ("puvae-cifar", 0.06, "cw-100", {"steps": 100}),
    ("advae", 0.3, "fgsm", {"eps": 0.3, "alpha": 0.3, "steps": 1}),
    ("advae", 0.3, "pgd-40-advae", {"eps": 0.3, "alpha": 0.01, "steps": 40}),
    ("advae", 0.3, "cw-l2", {"steps": 1000, "c": 10, "lr": 0.2}),
    ("advae-cifar", 8 / 255, "pgd-10-advae", {"eps": 8 / 255, "alpha": 1 / 255, "steps": 10}),
    ("advae-cifar", 8 / 255, "cw-l2", {"steps": 1000, "c": 10, "lr": 0.2}),
    ("gmvae", 0.3, "fgsm", {"eps": 0.3, "alpha": 0.3}),
    ("gmvae", 0.3, "mim-10", {"eps": 0.3, "alpha": 0.06, "steps": 10}),
    ("gmvae", 0.3, "pgd-40-advae", {"eps": 0.3, "alpha": 0.01, "steps": 40}),
    ("defense-vae", 0.3, "fgsm", {"eps": 0.3, "alpha": 0.3}),
    ("defense-vae", 0.3, "rand-fgsm", {"eps": 0.3, "alpha": 0.05}),
    ("defense-vae", 0.3, "cw-100-fast", {"steps": 100, "c": 100, "lr": 10}),
]


@pytest.mark.parametrize(("suite", "eps", "name", "numbers"), PAPERS, ids=[f"{p[0]}-{p[2]}" for p in PAPERS])
def test_a_papers_suite_has_its_budgets(suite: str, eps: float, name: str, numbers: dict[str, Any]) -> None:
    assert SUITES[suite].eps == pytest.approx(eps)
    options = attack_of(suite, name).options(ThreatModel("Linf", eps, "white-box"))
    assert {key: options[key] for key in numbers} == pytest.approx(numbers)


def attack_of(suite: str, name: str) -> Attack:
    return next(a for a in (*SUITES[suite].oblivious, *SUITES[suite].white_box) if a.name == name)


def test_puvaes_attacks_are_targeted_and_the_others_are_not() -> None:
    for name, suite in SUITES.items():
        aimed = {attack.targeted for attack in suite.oblivious}
        assert aimed == {True} if name.startswith("puvae") or name == "quick" else False in aimed
        assert not any(attack.targeted for attack in suite.white_box)


def test_the_standard_suite_is_autoattack(classifier: nn.Module) -> None:
    for norm, threat in THREATS.items():
        suite = SUITES["standard"].within(threat)
        assert SUITES["standard"].within(replace(threat, knowledge="oblivious")).oblivious == suite.white_box
        assert [attack.name for attack in suite.oblivious] == ["apgd-ce"] and suite.looks == 20
        made = [attack.family(classifier, **attack.options(threat)) for attack in suite.white_box]
        assert [type(attack).__name__ for attack in made] == ["APGD", "APGD", "FAB", "Square"]
        ce, targeted, fab, square = made
        assert {(attack.norm, attack.eps) for attack in made} == {(norm, threat.eps)}
        assert (ce.loss, ce.steps, ce.n_restarts, ce.thr_decr) == ("ce", 100, 1, 0.75)
        assert (targeted.loss, targeted.steps, targeted.n_restarts, targeted.targets) == ("targeted", 100, 1, 9)
        assert (fab.steps, fab.n_target_classes) == (100, 9)
        assert (fab.alpha_max, fab.eta, fab.beta) == (0.1, 1.05, 0.9)
        assert (square.n_queries, square.p_init) == (5000, 0.8)


def test_a_suite_keeps_what_can_be_bounded_in_the_norm_and_each_has_something_in_both() -> None:
    for name, suite in SUITES.items():
        assert suite.name == name and suite.within(replace(WHITE, knowledge="oblivious")) == replace(suite, transfer=())
        assert suite.within(WHITE) == replace(suite, oblivious=suite.transfer or suite.oblivious, transfer=())
        assert suite.within(WHITE).within(WHITE) == suite.within(WHITE)
        in_l2 = suite.within(THREATS["L2"])
        assert in_l2.oblivious and in_l2.white_box
        assert not {"rand-fgsm", "mim-10"} & {attack.name for attack in (*in_l2.oblivious, *in_l2.white_box)}
        for group in (suite.oblivious, suite.white_box):
            names = [attack.name for attack in group]
            assert len(set(names)) == len(names)
        assert {"ifgsm-targeted"} <= {attack.name for attack in suite.with_rungs().oblivious}
    assert len(SUITES["full"].within(THREATS["L2"]).oblivious) == len(SUITES["full"].transfer) - 2


class TwoClasses(nn.Module):
    """Two classes between which a plane lies, half as far from grey images as an eps of 0.1 reaches."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.w_HW = torch.linspace(-1, 1, 8).repeat(8, 1) * scale

    def forward(self, x_NCHW: Tensor) -> Tensor:
        lead_N = ((x_NCHW[:, 0] - 0.5) * self.w_HW).sum((1, 2)) - 0.05 * self.w_HW.abs().sum()
        return torch.stack((torch.zeros_like(lead_N), lead_N), dim=1)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("attack", [NES_30, replace(SQUARE, settings=(("queries", 500),))])
def test_an_attack_by_answers_alone_climbs_between_two_classes_whatever_their_scale(
    attack: Attack, scale: float
) -> None:
    x_NCHW, y_N = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64)
    model = TwoClasses(scale)
    made_NCHW = attack.craft(View(model), x_NCHW, y_N, ThreatModel("Linf", 0.1, "white-box"), 0)
    assert model(made_NCHW).argmax(1).all()


class Cornered(nn.Module):
    """A linear model whose gradient is not a number in one pixel, as that of a root at 0 times 0 is."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        lead_N = (x_NCHW - 0.52).flatten(1).sum(1)
        return torch.stack((-lead_N, lead_N, 0 * lead_N - 20), dim=1) + 0 * (0 * x_NCHW[:, 0, :1, 0]).sqrt()


@pytest.mark.parametrize("attack", [PGD_10, CW_L2, DEEPFOOL, FGSM, MIM_10], ids=attrgetter("name"))
def test_a_pixel_whose_gradient_is_no_number_keeps_no_other_from_moving(attack: Attack) -> None:
    x_NCHW, y_N, norm = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64), attack.norms[-1]
    model, threat = Cornered(), ThreatModel(norm, {"Linf": 0.05, "L2": 0.5}[norm], "white-box")
    made_NCHW = attack.craft(View(model), x_NCHW, y_N, threat, 0)
    assert made_NCHW.isfinite().all() and model(made_NCHW).argmax(1).all()
    (gate,) = (gate for gate in quick_gates(model, x_NCHW, y_N, threat, seed=0) if gate.name == "gradient")
    assert not gate.passed and gate.figure == 1
