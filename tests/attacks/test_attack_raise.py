"""Bad input to the attack layer: one line that names the law, the value and the legal choices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.algorithms.apgd import APGD
from attacks.algorithms.fab import FAB
from attacks.algorithms.rand_fgsm import RandFGSM
from attacks.algorithms.square import Square
from attacks.black_box import BlackBoxAttacker
from attacks.catalog import FGSM, MIM_10, RAND_FGSM
from attacks.evaluation import evaluate, observe
from attacks.suites import SUITES
from attacks.threat import ThreatModel
from search.data.splits import HELD_OUT, sizes
from search.study.loading import make_study
from spaces.exceptions import InputError
from tests.support.guards import Guard, Smooth

WHITE = ThreatModel("Linf", 0.1, "white-box")
IN_L2 = ThreatModel("L2", 1.0, "oblivious")
QUICK = SUITES["quick"]
Digits = tuple[Tensor, Tensor]
SMOKE = {"task": "digits/A", "space": "smoke", "trials": 1, "wandb": "disabled"}


def says(words: str, act: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=words) as caught:
        act()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("norm", "eps", "knowledge", "words"),
    [
        ("L3", 0.1, "white-box", "the norm must be one of Linf, L2, but is 'L3'"),
        (
            "Linf",
            0.1,
            "whitebox",
            "the threat model must be one of .*black-box.*, but is 'whitebox'; did you mean 'white-box'",
        ),
        ("Linf", 1.5, "white-box", r"eps must be from 0 to 1 in Linf, in pixel units of \[0, 1\], but is 1\.5"),
        ("Linf", -0.1, "oblivious", r"eps must be from 0 to 1 in Linf, .*, but is -0\.1"),
        ("Linf", math.nan, "black-box", "eps must be from 0 to 1 in Linf, .*, but is nan"),
        ("L2", -1, "white-box", r"eps must be at least 0 and finite in L2, in pixel units of \[0, 1\], but is -1"),
        ("L2", math.inf, "white-box", "eps must be at least 0 and finite in L2, .*, but is inf"),
        ("L2", math.nan, "white-box", "eps must be at least 0 and finite in L2, .*, but is nan"),
    ],
)
def test_a_threat_model_outside_its_law_is_refused(norm: Any, eps: float, knowledge: Any, words: str) -> None:
    says(words, lambda: ThreatModel(norm, eps, knowledge))


def test_the_edges_of_a_threat_models_law_are_legal() -> None:
    for norm, eps in (("Linf", 0), ("Linf", 1), ("L2", 0), ("L2", 28.0)):
        assert str(ThreatModel(norm, eps, "black-box")) == f"black-box, {norm} eps {eps:g}"  # type: ignore[arg-type]


def test_an_attack_is_refused_in_a_norm_that_it_has_not(digits: Digits, classifier: nn.Module) -> None:
    x, y = digits[0][:2], digits[1][:2]
    for attack in (RAND_FGSM, MIM_10):
        words = f"{attack.name} must be run in Linf, but the norm is L2"
        says(words, lambda: attack.craft(classifier, x, y, IN_L2, 0))  # noqa: B023
        says(words, lambda: attack.craft(classifier, x[:0], y[:0], IN_L2, 0))  # noqa: B023
    only = replace(FGSM, norms=("L2",))
    says("fgsm must be run in L2, but the norm is Linf", lambda: only.craft(classifier, x, y, WHITE, 0))


def test_the_random_step_is_a_part_of_eps(classifier: nn.Module) -> None:
    words = r"alpha must be from 0 to below eps, 0\.3, since it is a part of it, but is"
    for alpha, said in ((0.3, "0.3"), (0.4, "0.4"), (-0.1, "-0.1"), (math.nan, "nan")):
        says(f"{words} {said}", lambda: RandFGSM(classifier, eps=0.3, alpha=alpha))  # noqa: B023


def test_an_attack_knows_its_norms_and_losses(classifier: nn.Module) -> None:
    for family in (APGD, FAB, Square):
        says("the norm must be one of Linf, L2, but is 'L1'", lambda: family(classifier, norm="L1"))  # type: ignore[arg-type]  # noqa: B023
    says("the loss must be one of ce, dlr, targeted, but is 'cw'", lambda: APGD(classifier, loss="cw"))  # type: ignore[arg-type]


def spoiled(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[-1, 0, 3, 3] = value
    return x


BAD_IMAGES: list[tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], str]] = [
    (lambda x, y: (spoiled(x, 1.25), y), r"images must lie in \[0, 1\], but lie in \[0, 1\.25\]"),
    (lambda x, y: (spoiled(x, -0.5), y), r"images must lie in \[0, 1\], but lie in \[-0\.5, 1\]"),
    (lambda x, y: (x * 255, y), r"images must lie in \[0, 1\], but lie in \[0, 255\]"),
    (lambda x, y: (spoiled(x, math.nan), y), r"images must lie in \[0, 1\], but lie in \[nan, nan\]"),
    (lambda x, y: (spoiled(x, math.inf), y), r"images must lie in \[0, 1\], but lie in \[0, inf\]"),
    (lambda x, y: (x[:, 0], y), "images must be N x C x H x W with N labels, .* are 40 x 8 x 8 with 40"),
    (lambda x, y: (x[0], y[:1]), "images must be N x C x H x W with N labels, .* are 1 x 8 x 8 with 1"),
    (lambda x, y: (x[:, 0].flatten(1), y), "images must be N x C x H x W .* are 40 x 64 with 40"),
    (lambda x, y: (x, y[:39]), "images must be N x C x H x W with N labels, .* are 40 x 1 x 8 x 8 with 39"),
    (lambda x, y: (x[:39], y), "images must be N x C x H x W with N labels, .* are 39 x 1 x 8 x 8 with 40"),
    (lambda x, y: (x[:0], y[:0]), "N at least 1, but are 0 x 1 x 8 x 8 with 0"),
]


@pytest.mark.parametrize(("spoil", "words"), BAD_IMAGES, ids=[words[-12:] for _, words in BAD_IMAGES])
def test_images_and_labels_that_are_not_what_they_must_be(
    spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], words: str, digits: Digits, classifier: nn.Module
) -> None:
    x, y = spoil(digits[0][:40], digits[1][:40])
    for target in (classifier, Guard(Smooth(noise=0.1), classifier)):
        says(words, lambda: observe(QUICK, target, x, y, WHITE))  # noqa: B023
        says(words, lambda: evaluate(QUICK, target, x, y, WHITE, oblivious={}))  # noqa: B023


class Answers(nn.Module):
    """A model whose logits are changed."""

    def __init__(self, classifier: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.classifier, self.change = classifier, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.classifier(x))


BAD_ANSWERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "probabilities": (lambda z: z.softmax(1), "must return logits, but returns probabilities: leave the softmax out"),
    "NaN": (lambda z: z.clone().index_fill_(0, torch.tensor([3]), torch.nan), "finite logits, but some are NaN or inf"),
    "infinite": (lambda z: z / 0, "must return finite logits, but some are NaN or infinite"),
    "classes": (lambda z: z.argmax(1), r"a model must return logits, 32 x at least 10, but 32$"),
    "column": (lambda z: z[:, :1], r"a model must return logits, 32 x at least 10, but 32 x 1$"),
    "few": (lambda z: z[:, :9], "a model must return logits, 32 x at least 10, but 32 x 9"),
    "maps": (lambda z: z[:, :, None, None], "a model must return logits, 32 x at least 10, but 32 x 10 x 1 x 1"),
    "one row": (lambda z: z.mean(0, keepdim=True), "a model must return logits, 32 x at least 10, but 1 x 10"),
    "a number": (lambda z: z.mean(), "a model must return logits, 32 x at least 10, but a scalar"),
}


@pytest.mark.parametrize("answer", BAD_ANSWERS)
def test_a_model_that_does_not_return_logits_is_refused(answer: str, digits: Digits, classifier: nn.Module) -> None:
    change, words = BAD_ANSWERS[answer]
    bad = Answers(classifier, change)
    for target in (bad, Guard(Smooth(), bad)):
        says(words, lambda: observe(QUICK, target, digits[0][:40], digits[1][:40], WHITE))  # noqa: B023


def test_a_late_label_that_the_model_does_not_know_is_refused_too(digits: Digits, classifier: nn.Module) -> None:
    x, y = digits[0][:300], digits[1][:300].clone()
    y[-1] = 10
    says("32 x at least 11, but 32 x 10", lambda: observe(QUICK, classifier, x, y, WHITE))


def test_an_outsider_needs_images_of_its_own(digits: Digits, classifier: nn.Module) -> None:
    attacker = BlackBoxAttacker(digits[0][:1], lambda: nn.Flatten())
    act = lambda: attacker.craft(QUICK, classifier, digits[0][:5], digits[1][:5], WHITE, 0)  # noqa: E731
    says("a substitute starts from at least 2 images, but is given 1", act)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"suite": "serch"}, "the suite must be one of quick, search, .*, but is 'serch'; did you mean 'search'"),
        ({"norm": "L2"}, "eps must be given in L2, where no paper has one for a task, but is not: --eps 1.5, say"),
        ({"norm": "L2", "suite": "advae"}, "eps must be given in L2"),
        ({"norm": "L1"}, "norm must be one of Linf, L2, but is 'L1'"),
        ({"threat": "blackbox"}, "threat must be one of oblivious, black-box, white-box, but is 'blackbox'"),
        ({"eps": 1.5}, "eps must be from 0 to 1 in Linf"),
        ({"eps": -0.1}, "eps must be greater than or equal to 0, but is -0.1"),
        ({"norm": "L2", "eps": math.inf}, "eps must be"),
        ({"eps": math.nan}, "eps must be"),
        (
            {"threat": "black-box", "eval_images": 31},
            "eval_images must be at most 30 on digits, as 150 of",
        ),
        ({"eval_images": 136}, "eval_images must be at most 135 on digits, as 45 of the validation images are kept"),
        (
            {"threat": "black-box", "substitute": "Z"},
            "'digits/Z', after the slash, must be one of A, B, .*, but is 'Z'",
        ),
        ({"substitute": "advae-Y"}, "did you mean"),
    ],
    ids=str,
)
def test_a_study_with_attacks_that_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    says(words, lambda: make_study({**SMOKE, **fields}))


def test_a_black_box_study_keeps_150_images_for_the_attacker() -> None:
    assert HELD_OUT == 150 and sizes("digits", None).validation == 180
    for fields, images in (({}, 30), ({"eval_images": 30}, 30), ({"eval_images": 7}, 7)):
        assert make_study({**SMOKE, "threat": "black-box", **fields}).resolved.eval_images == images
    assert make_study({**SMOKE, "threat": "oblivious"}).resolved.eval_images == 135


def test_eps_is_the_given_one_else_the_suites_papers_else_the_tasks() -> None:
    for fields, eps in (
        ({}, 0.3),
        ({"suite": "advae-cifar"}, 8 / 255),
        ({"suite": "puvae-cifar"}, 0.06),
        ({"suite": "puvae-cifar", "eps": "8/255"}, 8 / 255),
        ({"norm": "L2", "eps": 1.5, "suite": "advae-cifar"}, 1.5),
    ):
        assert make_study(SMOKE | fields).resolved.threat.eps == pytest.approx(eps)
