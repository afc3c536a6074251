"""What a winner is worth, in a sentence: beside no defense, in clean accuracy, beside adversarial training."""

from __future__ import annotations

from typing import Any

import pytest

from attacks.threat import Knowledge, ThreatModel
from search.study.verdict import Figures, verdict, verdict_of_audit

KNOWLEDGE: tuple[Knowledge, ...] = ("white-box", "oblivious")
BARE = Figures.of({"attacked_accuracy": 0.606, "white_box_accuracy": 0.606, "clean_accuracy": 0.98})


def model(attacked: float, clean: float = 0.98, white_box: float | None = None, error: float | None = None) -> Figures:
    return Figures(
        attacked, 1 - attacked if error is None else error, attacked if white_box is None else white_box, clean
    )


def test_eps_is_written_as_in_papers() -> None:
    white, blind = (ThreatModel("Linf", 8 / 255, knowledge) for knowledge in KNOWLEDGE)
    told = verdict(white, 1000, model(0.767), BARE)
    assert told == "better than no defense: 76.7 % against 60.6 % undefended (white-box, Linf eps 8/255)"
    assert verdict(blind, 1000, model(0.767, white_box=0.1), BARE).endswith(" (Linf eps 8/255)")


def said(winner: Figures, bare: Figures = BARE, knowledge: Knowledge = "white-box", images: int = 1000) -> str:
    return verdict(ThreatModel("Linf", 0.1, knowledge), images, winner, bare)


@pytest.mark.parametrize(
    ("winner", "images", "words"),
    [
        (model(0.461), 1000, "worse than no defense: 46.1 % against 60.6 % undefended (white-box, Linf eps 0.1)"),
        (model(0.767), 1000, "better than no defense: 76.7 % against 60.6 % undefended (white-box, Linf eps 0.1)"),
        (
            model(0.667),
            60,
            "no better than no defense, as far as 60 images can tell: 66.7 % against 60.6 % undefended "
            "(white-box, Linf eps 0.1)",
        ),
    ],
)
def test_a_winner_is_better_or_worse_than_no_defense_beyond_chance_or_it_is_said(
    winner: Figures, images: int, words: str
) -> None:
    assert said(winner, images=images) == words


@pytest.mark.parametrize(
    ("knowledge", "where"),
    [
        ("oblivious", "where the attacker does not know the defense"),
        ("black-box", "where the attacker sees only the model's answers"),
    ],
)
def test_what_helps_only_against_the_ignorant_is_said_so(knowledge: Knowledge, where: str) -> None:
    bare = model(0.015, white_box=0.0)
    assert said(model(0.28, white_box=0.0), bare, knowledge) == (
        f"better only {where}: 28.0 % against 1.5 % undefended; where the attacker knows it, 0.0 % against 0.0 % "
        "(Linf eps 0.1)"
    )
    assert said(model(0.28, white_box=0.2), bare, knowledge) == (
        f"better than no defense: 28.0 % against 1.5 % undefended {where}, 20.0 % against 0.0 % where the attacker "
        "knows it (Linf eps 0.1)"
    )
    assert said(model(0.461), BARE, knowledge) == (
        f"worse than no defense, even {where}: 46.1 % against 60.6 % undefended (Linf eps 0.1)"
    )


def test_lost_clean_accuracy_is_a_cost_unless_it_may_be_chance() -> None:
    assert said(model(0.767, clean=0.29)).endswith("; costs 69 points of clean accuracy")
    assert "costs" not in said(model(0.767, clean=0.979)) and "costs" not in said(model(0.767, clean=0.99))


def test_where_images_are_rejected_errors_are_compared_as_the_search_does() -> None:
    detector = model(0.1, error=0.05, white_box=0.02)
    assert said(detector) == (
        "better than no defense: wrong on 5.0 % against 39.4 % undefended, right on 10.0 %, the others rejected "
        "(white-box, Linf eps 0.1)"
    )
    assert "better than no defense where the attacker does not know the defense: wrong on 5.0 % against 39.4 %" in said(
        detector, knowledge="oblivious"
    )


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        (0.9, "worse than adversarial training (90.0 %)"),
        (0.6, "better than adversarial training (60.0 %)"),
        (0.77, "about as good as adversarial training (77.0 %)"),
    ],
)
def test_an_audit_compares_with_adversarial_training_too(trained: float, words: str) -> None:
    def figures(attacked: float) -> dict[str, Any]:
        return {"attacked_accuracy": attacked, "white_box_accuracy": attacked, "clean_accuracy": 0.98}

    evidence = {
        **figures(0.767),
        "attacked_error": 0.233,
        "images": 1000,
        "threat": {"norm": "Linf", "eps": 0.1, "knowledge": "white-box"},
        "baselines": {"undefended": figures(0.606), "adversarially trained": figures(trained)},
    }
    assert verdict_of_audit(evidence) == f"{said(model(0.767))}; {words}"
    doubtful = {"undefended": figures(0.606), "adversarial_training, pgd Linf eps 0.1, not converged": figures(trained)}
    assert verdict_of_audit({**evidence, "baselines": doubtful}) == said(model(0.767))
