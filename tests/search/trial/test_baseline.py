"""Which fit of adversarial training stands beside a winner, and by which name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import defenses
from attacks.threat import Knowledge, ThreatModel
from search.study.study import Study
from search.study.verdict import TRAINED
from search.trial.baseline import ADVERSARIAL, converged, name_of, ranked
from search.trial.runner import TrialRunner
from search.trial.training import silent
from spaces.domain import Scalar
from spaces.space import Params
from tests.conftest import digits_study

RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7]
ARRIVED = [0.1, 0.4, 0.6, 0.65, 0.66, 0.7, 0.69, 0.7, 0.72]
CHANCE = [0.1, 0.09, 0.1, 0.1, 0.08, 0.1, 0.1, 0.1, 0.1]
OWN = ThreatModel("Linf", 0.2, "white-box")


def curve(scores: list[float], loss: float = 0.8) -> list[dict[str, float]]:
    return [{"cheap": score, "loss": loss} for score in scores]


def about(
    scores: list[float] = ARRIVED, threat: ThreatModel = OWN, loss: float = 0.8, **knobs: Scalar
) -> dict[str, Any]:
    """Return what the store would hold about a fit at eps 0.2 in Linf."""
    usual = {"attack": "pgd", "eps": 0.2, "pgd_steps": 10, "pgd_step_size": 0.05}
    train = asdict(defenses.find(ADVERSARIAL).Train(**{**usual, **knobs}))
    return {"knobs": train, "curve": curve(scores, loss), "rungs": "one", "threat": str(threat)}


@pytest.mark.parametrize(
    ("scores", "loss", "arrived"),
    [
        (ARRIVED, 0.8, True),
        (RISING, 0.8, False),
        (CHANCE, 2.30, False),  # flat, since it learns nothing
        (ARRIVED[-5:], 0.8, False),  # too few to say
        ([0.7, 0.72, 0.6, 0.5, 0.72, 0.74], 0.8, True),
    ],
)
def test_a_curve_has_converged_where_its_last_third_brings_nothing(
    scores: list[float], loss: float, arrived: bool
) -> None:
    assert converged(curve(scores, loss), 10) is arrived


@pytest.mark.parametrize(
    ("fit", "name"),
    [
        (about(), TRAINED),
        (about(RISING), f"{ADVERSARIAL}, pgd Linf eps 0.2, 9 epochs, not converged"),
        (about(CHANCE, loss=2.3), f"{ADVERSARIAL}, pgd Linf eps 0.2, 9 epochs, not converged"),
        (about([0.4]), f"{ADVERSARIAL}, pgd Linf eps 0.2, 1 epoch, not converged"),
        (about(eps=0.3), f"{ADVERSARIAL}, pgd Linf eps 0.3, 9 epochs"),
        (about(norm="L2"), f"{ADVERSARIAL}, pgd L2 eps 0.2, 9 epochs"),
        (about(attack="fgsm"), f"{ADVERSARIAL}, fgsm Linf eps 0.2, 9 epochs"),
        (about(pgd_steps=1), f"{ADVERSARIAL}, pgd Linf eps 0.2 by 1 steps of 0.05, 9 epochs"),
        (about(warm_up=8), f"{ADVERSARIAL}, pgd Linf eps 0.2, 9 epochs, not converged"),
        (
            about(threat=ThreatModel("Linf", 0.1, "white-box")),
            f"{ADVERSARIAL}, pgd Linf eps 0.2, 9 epochs, convergence not known",
        ),
        (about() | {"rungs": "several"}, f"{ADVERSARIAL}, pgd Linf eps 0.2, 9 epochs, convergence not known"),
    ],
)
def test_only_a_converged_fit_at_the_own_norm_and_eps_is_called_adversarially_trained(
    fit: dict[str, Any], name: str
) -> None:
    assert name_of(fit, OWN, 10) == name


@pytest.mark.parametrize(("study", "name"), [("white-box", "convergence not known"), ("oblivious", TRAINED)])
def test_quick_scores_of_a_white_box_attacker_tell_enough_for_a_weaker_one_and_not_the_other_way_round(
    study: Knowledge, name: str
) -> None:
    scored: Knowledge = "oblivious" if study == "white-box" else "white-box"
    fit = about(threat=ThreatModel("Linf", 0.2, scored))
    assert name_of(fit, ThreatModel("Linf", 0.2, study), 10).endswith(name)


def test_the_own_budget_comes_before_another_however_robust_that_seems() -> None:
    fits = {
        "weak eps": about([0.9] * 9, eps=0.1),
        "own, rising": about([0.1] * 6 + [0.5, 0.6, 0.8]),
        "own": about([0.6] * 9),
        "own, better": about(ARRIVED),
    }
    assert [key for key, _ in ranked(fits, OWN, 10)] == ["own, better", "own", "own, rising", "weak eps"]


def trained(study: Study, **knobs: Scalar) -> TrialRunner:
    """Train adversarially in the storage of a study, and return its runner."""
    beside = study.model_copy(update={"defense": ADVERSARIAL})
    usual = {"attack": "pgd", "start": "pretrained", "pgd_steps": 3, "learning_rate": 1e-4}
    runner = TrialRunner(beside, beside.store.make())
    runner.trainer.fit(Params(asdict(defenses.find(ADVERSARIAL).Train(**{**usual, **knobs})), {}), silent)
    return TrialRunner(study, study.store.make())


def test_a_baseline_of_a_storage_is_named_for_what_it_is(tmp_path: Path) -> None:
    """On real digits: first trained at another eps, then at the study's own for too short, then to convergence."""
    study = digits_study(tmp_path, eps=0.02, train_images=300, classifier_epochs=12)
    assert TrialRunner(study, study.store.make()).trainer.adversarially_trained() == {}
    for knobs, name in (
        ({"eps": 0.3, "pgd_step_size": 0.1, "epochs": 1}, f"{ADVERSARIAL}, pgd Linf eps 0.3, 1 epoch, not converged"),
        ({"eps": 0.02, "epochs": 2}, f"{ADVERSARIAL}, pgd Linf eps 0.02, 2 epochs, not converged"),
        ({"eps": 0.02, "epochs": 6}, TRAINED),
    ):
        runner = trained(study, **knobs)
        ((found, (fit, _)),) = runner.trainer.adversarially_trained().items()
        assert (
            found == name
            and {**runner.assets.store.about("fits", fit)["knobs"], **knobs}
            == (runner.assets.store.about("fits", fit)["knobs"])
        )
    for other, name in (
        ({"eps": 0.1}, f"{ADVERSARIAL}, pgd Linf eps 0."),
        ({"eps": 0.5, "norm": "L2"}, f"{ADVERSARIAL}, pgd Linf eps 0."),
    ):
        elsewhere = digits_study(tmp_path, train_images=300, classifier_epochs=12, **other)
        (found,) = TrialRunner(elsewhere, elsewhere.store.make()).trainer.adversarially_trained()
        assert found.startswith(name)
    (found,) = trained(elsewhere, norm="L2", eps=0.5, pgd_step_size=0.2, epochs=1).trainer.adversarially_trained()
    assert found == f"{ADVERSARIAL}, pgd L2 eps 0.5, 1 epoch, not converged"
