"""Our attacks against Foolbox's, which share no code with them, and against images whose nearest neighbour is known.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.algorithms.apgd import APGD
from attacks.algorithms.carlini_wagner import CW
from attacks.algorithms.deepfool import DeepFool
from attacks.algorithms.fab import FAB
from attacks.algorithms.mim import MIM
from attacks.algorithms.pgd import PGD
from attacks.algorithms.square import Square
from attacks.threat import Norm
from search.classifiers.training import train
from search.data.splits import load
from tests.support.paths import ROOT

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # Foolbox imports GitPython, which raises where there is no git
import foolbox

Victim = tuple[nn.Module, Tensor, Tensor]
Make = Callable[[nn.Module, float], Any]
BUDGETS: dict[Norm, float] = {"Linf": 0.08, "L2": 1.2}
STEPS, SHARE = 40, 1 / 8
CW_STEPS, CW_RATE, SEARCHES = 50, 0.2, 3


def distance(model: nn.Module, moved_NCHW: Tensor, x_NCHW: Tensor, y_N: Tensor, norm: Norm) -> Tensor:
    """Return how far each image was moved, infinite where the model is still right."""
    assert 0 <= float(moved_NCHW.min()) and float(moved_NCHW.max()) <= 1
    order = torch.inf if norm == "Linf" else 2
    moved_N = torch.linalg.vector_norm((moved_NCHW - x_NCHW).flatten(1), order, dim=1)
    return torch.where(model(moved_NCHW).argmax(1) == y_N, torch.inf, moved_N)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads for such small batches wait for each other: on two busy cores 8 minutes instead of 30 seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def victim() -> Victim:
    """A classifier trained for seconds, and 200 MNIST images that it has not seen and gets right."""
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 10)),
    )
    train(network, *load("mnist", "train", limit=4000), epochs=8, seed=0)
    network.eval().requires_grad_(False)
    x, y = load("mnist", "validation", limit=400)
    right = network(x).argmax(1) == y
    assert float(right.double().mean()) > 0.9
    return network, x[right][:200], y[right][:200]


def test_the_test_extra_installs_the_foolbox_that_is_pinned() -> None:
    pin = f"foolbox=={foolbox.__version__}"
    assert pin in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    assert all(pin in (ROOT / f"requirements.{name}").read_text().splitlines() for name in ("in", "lock"))


PAIRS: dict[str, tuple[Norm, Make, foolbox.Attack]] = {
    "fgsm": (
        "Linf",
        lambda model, eps: PGD(model, eps=eps, alpha=eps, steps=1, random_start=False),
        foolbox.attacks.LinfFastGradientAttack(),
    ),
    "pgd-linf": (
        "Linf",
        lambda model, eps: PGD(model, eps=eps, alpha=SHARE * eps, steps=STEPS),
        foolbox.attacks.LinfPGD(rel_stepsize=SHARE, steps=STEPS),
    ),
    "pgd-l2": (
        "L2",
        lambda model, eps: PGD(model, eps=eps, alpha=SHARE * eps, steps=STEPS, norm="L2"),
        foolbox.attacks.L2PGD(rel_stepsize=SHARE, steps=STEPS),
    ),
    "cw": (
        "L2",
        lambda model, eps: CW(model, c=1, steps=CW_STEPS, lr=CW_RATE, binary_search_steps=SEARCHES),
        foolbox.attacks.L2CarliniWagnerAttack(
            initial_const=1, steps=CW_STEPS, stepsize=CW_RATE, binary_search_steps=SEARCHES, abort_early=False
        ),
    ),
    "deepfool": (
        "L2",
        lambda model, eps: DeepFool(model, steps=50, overshoot=0.02),
        foolbox.attacks.L2DeepFoolAttack(steps=50, overshoot=0.02, candidates=10),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_our_verdicts_are_foolboxs_or_ours_is_the_stronger(name: str, victim: Victim) -> None:
    (model, x, y), (norm, ours, theirs) = victim, PAIRS[name]
    eps = BUDGETS[norm]
    moved, _, _ = theirs(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=eps)
    theirs_N = distance(model, moved, x, y, norm)
    ours_N = distance(model, ours(model, eps)(x, y), x, y, norm)
    we, they = (distance_N <= eps * (1 + 1e-4) for distance_N in (ours_N, theirs_N))
    assert 0.2 < float(they.double().mean()) < 0.8  # where all or none fall, agreement says nothing
    agreement, missed = float((we == they).double().mean()), int((they & ~we).sum())
    assert agreement >= 0.97 or (we.sum() >= they.sum() and missed <= 0.03 * int(they.sum())), (
        agreement,
        missed,
    )
    assert float(ours_N.median()) <= 1.01 * float(theirs_N.median())


class Planted(nn.Module):
    """Ten classes: 3 everywhere, but 7 where w.(x - 1/2) is above 2.

    The logit of 7 climbs four times slower near its boundary than far from it, so that one linear step falls short;
    those of the others have no gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.w_CHW = nn.Parameter(torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1)))

    def score(self, x_NCHW: Tensor) -> Tensor:
        return ((x_NCHW - 0.5) * self.w_CHW).flatten(1).sum(1) - 2

    def forward(self, x_NCHW: Tensor) -> Tensor:
        score_N = self.score(x_NCHW)
        logits_NK = torch.full((len(x_NCHW), 10), -10.0)
        logits_NK[:, 3], logits_NK[:, 7] = 0, torch.minimum(score_N, 4 * score_N + 3)
        return logits_NK


def plants(model: Planted, x_NCHW: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return how far each image's nearest neighbour of class 7 is, and the way there.

    A pixel at 0 or 1 that the way leads out of the box stays; none of the others reaches the box within 0.3. The
    score rises fastest along the signs of w (L-inf), by its L1 norm, or along w (L2), by its L2 norm.
    """
    w_CHW = model.w_CHW.detach()
    w_NCHW = w_CHW * torch.where(w_CHW > 0, x_NCHW < 1, x_NCHW > 0)
    slope_N = torch.linalg.vector_norm(w_NCHW.flatten(1), 1 if norm == "Linf" else 2, dim=1)
    way_NCHW = w_NCHW.sign() if norm == "Linf" else w_NCHW / slope_N[:, None, None, None]
    return -model.score(x_NCHW).detach() / slope_N, way_NCHW


@pytest.fixture(scope="module")
def planted() -> tuple[Planted, Tensor]:
    """The model, and images of class 3 whose two upper rows are black or white."""
    generator, model = torch.Generator().manual_seed(2), Planted()
    x_NCHW = 0.35 + 0.3 * torch.rand(150, 1, 8, 8, generator=generator)
    x_NCHW[:, :, :2] = (x_NCHW[:, :, :2] > 0.5).float()
    return model, x_NCHW[model(x_NCHW).argmax(1) == 3]


FINDERS: dict[str, tuple[Norm, Make]] = {
    "fgsm": ("Linf", lambda model, eps: PGD(model, eps=eps, alpha=eps, steps=1, random_start=False)),
    "ifgsm": ("Linf", lambda model, eps: PGD(model, eps=eps, alpha=eps / 10, steps=10, random_start=False)),
    "pgd-linf": ("Linf", lambda model, eps: PGD(model, eps=eps, alpha=eps / 4, steps=10)),
    "pgd-l2": ("L2", lambda model, eps: PGD(model, eps=eps, alpha=eps / 8, steps=20, norm="L2")),
    "mim": ("Linf", lambda model, eps: MIM(model, eps=eps, alpha=eps / 10, steps=10)),
    "cw": ("L2", lambda model, eps: CW(model, lr=0.1, steps=100, binary_search_steps=5)),
    "deepfool": ("L2", lambda model, eps: DeepFool(model)),
    "apgd-ce-linf": ("Linf", lambda model, eps: APGD(model, eps, steps=20)),
    "apgd-ce-l2": ("L2", lambda model, eps: APGD(model, eps, steps=20, norm="L2")),
    "apgd-dlr-linf": ("Linf", lambda model, eps: APGD(model, eps, steps=20, loss="dlr")),
    "apgd-dlr-l2": ("L2", lambda model, eps: APGD(model, eps, steps=20, norm="L2", loss="dlr")),
    "apgd-targeted-linf": ("Linf", lambda model, eps: APGD(model, eps, steps=20, loss="targeted")),
    "apgd-targeted-l2": ("L2", lambda model, eps: APGD(model, eps, steps=20, norm="L2", loss="targeted")),
    "fab-linf": ("Linf", lambda model, eps: FAB(model, eps, steps=20)),
    "fab-l2": ("L2", lambda model, eps: FAB(model, eps, steps=20, norm="L2")),
    "square-linf": ("Linf", lambda model, eps: Square(model, eps, queries=2000)),
    "square-l2": ("L2", lambda model, eps: Square(model, eps, queries=2000, norm="L2")),
}


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_plants_are_where_they_are_said_to_be(norm: Norm, planted: tuple[Planted, Tensor]) -> None:
    model, x = planted
    far_N, way_NCHW = plants(model, x, norm)
    for share, label in ((0.999, 3), (1.001, 7)):
        there = x + share * far_N[:, None, None, None] * way_NCHW
        assert model(there).argmax(1).eq(label).all()


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("name", FINDERS)
def test_an_attack_finds_the_plants_within_its_budget_and_no_others(
    name: str, stops: bool, planted: tuple[Planted, Tensor]
) -> None:
    """A planted neighbour has to be found, or the attack proves nothing (Zimmermann et al. 2022)."""
    (model, x), (norm, make) = planted, FINDERS[name]
    far_N = plants(model, x, norm)[0]
    eps, y = float(far_N.median()), torch.full((len(x),), 3)
    attack = make(model, eps)
    attack.stops = stops
    found_N = distance(model, attack(x, y), x, y, norm) <= eps * (1 + 1e-4)
    within = 0.7 if name == "square-l2" else 0.98  # its windows of 3 x 3 pixels do not follow weights of each pixel
    assert found_N[far_N < within * eps].all() and not found_N[far_N > 1.001 * eps].any()
