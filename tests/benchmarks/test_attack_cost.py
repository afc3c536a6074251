"""What an evaluation costs: the count itself, and the saving beside the same suite run plainly."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attacks.catalog import APGD_CE, APGD_T, FAB_T, FGSM, PGD_10, SQUARE
from attacks.evaluation import observe
from attacks.suites import SUITES, Suite, craft_oblivious
from attacks.threat import ThreatModel
from benchmarks.attack_cost import Counted, compare, main, plainly, stock

Digits = tuple[Tensor, Tensor]
AUTO = (
    *(replace(attack, steps=10) for attack in (APGD_CE, APGD_T, FAB_T)),
    replace(SQUARE, settings=(("queries", 100),)),
)
STANDARD = replace(SUITES["standard"], name="standard-like", oblivious=AUTO, white_box=AUTO, transfer=AUTO[:1])
SIMPLE = Suite(name="simple", oblivious=(FGSM, PGD_10), white_box=(PGD_10,), draws=1)
THREAT = ThreatModel("Linf", 0.3, "white-box")


@pytest.fixture
def held_out(digits: Digits) -> Digits:
    return digits[0][1400:1440], digits[1][1400:1440]


def passes(counted: Counted) -> tuple[int, int]:
    return counted.forwards, counted.backwards


def test_each_image_counts_once_forward_and_once_for_each_gradient(classifier: nn.Module, held_out: Digits) -> None:
    counted, x = Counted(classifier), held_out[0][:7].clone().requires_grad_()
    counted(held_out[0])
    assert passes(counted) == (40, 0)
    logits_NK = counted(x)
    assert passes(counted) == (47, 0)
    for column_N in logits_NK.unbind(1)[:3]:
        torch.autograd.grad(column_N.sum(), x, retain_graph=True)
    assert passes(counted) == (47, 21)


def test_plainly_every_step_passes_every_image(classifier: nn.Module, held_out: Digits) -> None:
    counted = Counted(classifier)
    plainly(SIMPLE, counted, *held_out, THREAT, seed=0)
    steps, versions = 1 + 10 + 10, 1 + 3
    assert passes(counted) == (40 * (steps + versions), 40 * steps)


@pytest.mark.parametrize("suite", [SUITES["search"], SUITES["audit"], STANDARD], ids=lambda suite: suite.name)
def test_the_verdicts_are_those_of_the_plain_run_at_a_third_of_its_passes(
    suite: Suite, classifier: nn.Module, held_out: Digits
) -> None:
    plain, alone, shared, *_ = compare(suite, classifier, *held_out, THREAT)
    assert [row.way for row in (plain, alone, shared)] == ["plain", "ours, alone", "ours, images shared"]
    for ours in (alone, shared):
        assert (ours.spared, ours.felled, ours.accuracy) == (0, 0, plain.accuracy)
        assert ours.share == pytest.approx(ours.cost.passes / plain.cost.passes)
    assert shared.share <= 1 / 3
    assert shared.share < alone.share < (1 / 3 if suite is STANDARD else 0.8)


def test_where_half_survives_the_verdicts_are_the_same_too(classifier: nn.Module, held_out: Digits) -> None:
    for suite in (SUITES["search"], STANDARD):
        plain, ours, *_ = compare(suite, classifier, *held_out, replace(THREAT, eps=0.08))
        assert 0.3 < plain.accuracy < 0.7
        assert (ours.spared, ours.felled) == (0, 0) and ours.share < 1


def test_each_way_costs_what_it_is_said_to(classifier: nn.Module, held_out: Digits) -> None:
    counted, threat = Counted(classifier), replace(THREAT, eps=0.1)
    _, alone, shared = compare(SIMPLE, classifier, *held_out, threat)
    oblivious = craft_oblivious(SIMPLE, counted, *held_out, threat, seed=0)
    before = passes(counted)
    observe(SIMPLE, counted, *held_out, threat, oblivious=oblivious)
    assert passes(counted) == (alone.cost.forward, alone.cost.backward)
    spent = tuple(after - first for after, first in zip(passes(counted), before, strict=True))
    assert spent == (shared.cost.forward, shared.cost.backward)


class Valley(nn.Module):
    """Wrong only where the images' mean is within 0.02 of 0.55; steps of 0.04 go to and fro across it."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))  # where torchattacks looks for the device

    def forward(self, x: Tensor) -> Tensor:
        score_N = (x.flatten(1).mean(1) - 0.55).abs() - 0.02
        return torch.stack((score_N, torch.zeros_like(score_N)), dim=1)


def test_what_only_one_of_the_ways_finds_is_counted() -> None:
    pgd = replace(PGD_10, pace=0.4, settings=(("random_start", False),))
    x, y = torch.full((6, 1, 4, 4), 0.5), torch.zeros(6, dtype=torch.long)
    suite, threat = Suite(name="", oblivious=(), white_box=(pgd,), draws=1), replace(THREAT, eps=0.1)
    plain, ours, _ = compare(suite, Valley(), x, y, threat)
    assert (plain.accuracy, ours.accuracy, ours.felled, ours.spared) == (1, 0, 6, 0)


def test_the_stock_attack_leaves_generator_and_modes_as_they_were(classifier: nn.Module, held_out: Digits) -> None:
    state, counted = torch.get_rng_state(), Counted(classifier)
    right_N = stock(counted, *held_out, THREAT, seed=0)
    assert not bool(right_N.any()) and counted.forwards > 40 and counted.backwards >= 40
    assert torch.equal(torch.get_rng_state(), state) and not classifier.training


def test_the_command_prints_a_table_or_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["attacks", "--task", "digits/advae-D", "--images", "8", "--train-images", "100", "--suite", "search"]
    command += ["--storage", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    main()
    head, line, *rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == 6 and {row.count("|") for row in (head, line, *rows)} == {12}
    monkeypatch.setattr(sys, "argv", [*command, "--json", "--eps", "0.2"])
    main()
    plain, ours, shared = map(json.loads, capsys.readouterr().out.strip().splitlines())
    assert plain["way"] == "plain" and shared["way"] == "ours, images shared" and ours["eps"] == 0.2
    assert shared["cost"]["forward"] < ours["cost"]["forward"] < plain["cost"]["forward"]
