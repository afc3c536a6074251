"""Verdicts against counting by hand, and the risk-coverage curve against trying every threshold."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks.confidence import wilson
from attacks.risk_coverage import pick, risk_coverage
from attacks.threat import ThreatModel
from attacks.verdicts import Observation, Seen, Verdict

WHITE = ThreatModel("Linf", 0.1, "white-box")
OBLIVIOUS = replace(WHITE, knowledge="oblivious")
BLACK = replace(WHITE, knowledge="black-box")


def bits(*rows: str) -> Tensor:
    """Return bool_DN from rows of 1 and 0."""
    return torch.tensor([[mark == "1" for mark in row] for row in rows])


def seen(*rows: str, suspicion_DNS: Tensor | None = None, bounded: bool = True) -> Seen:
    right = bits(*rows)
    nothing_DNS = torch.zeros((*right.shape, 0))
    return Seen(right, nothing_DNS if suspicion_DNS is None else suspicion_DNS, bounded)


def found(clean: Seen, threat: ThreatModel = WHITE, **versions: Any) -> Observation:
    given: dict[str, Any] = {"oblivious": {}, "black_box": None, "white_box": None, "limits_S": torch.zeros(0)}
    return Observation(threat=threat, clean=clean, **given | versions)


def test_accuracy_error_and_rejection_are_counted_apart() -> None:
    """Four images, by hand: all well; right but rejected under attack; wrong under attack; clean rejected."""
    clean = seen("1111", suspicion_DNS=torch.tensor([[[0.0], [0.0], [0.0], [9.0]]]))
    attacked = seen("1000", suspicion_DNS=torch.tensor([[[0.0], [9.0], [1.0], [9.0]]]))
    verdict = found(clean, OBLIVIOUS, oblivious={"a": attacked}, limits_S=torch.tensor([1.0])).judge()
    assert (verdict.clean.accuracy, verdict.clean.error, verdict.clean.rejection) == (0.75, 0, 0.25)
    assert (verdict.attacked.accuracy, verdict.attacked.error, verdict.attacked.rejection) == (0.25, 0.25, 0.5)
    assert verdict.robust.tolist() == [[True, True, False, False]]


def test_an_image_is_accepted_where_every_column_keeps_to_its_limit() -> None:
    suspicion_DNS = torch.tensor([[[1.0, 2.0], [1.1, 2.0], [1.0, 2.1], [torch.nan, 0.0]]])
    verdict = Verdict.of(seen("1111", suspicion_DNS=suspicion_DNS), torch.tensor([1.0, 2.0]))
    assert verdict.right.tolist() == [[True, False, False, False]] and not bool(verdict.wrong.any())


def test_mean_and_worst_over_draws_are_those_of_counting_by_hand() -> None:
    """Two draws of three images."""
    verdict = found(seen("110", "100"), white_box={"a": seen("010", "110"), "b": seen("111", "110")}).judge()
    assert verdict.clean.accuracy == 3 / 6 and verdict.clean.worst == pytest.approx(1 / 3)
    assert torch.equal(verdict.attacked.right, bits("010", "100"))
    assert torch.equal(verdict.attacked.wrong, bits("101", "011"))
    assert verdict.attacked.accuracy == pytest.approx(2 / 6) and verdict.attacked.worst == pytest.approx(1 / 3)
    assert torch.equal(verdict.robust, bits("010", "100")) and torch.equal(verdict.survivors, verdict.robust)
    one_fails = found(seen("111", "111"), white_box={"a": seen("111", "100")}).judge().attacked
    assert (one_fails.accuracy, one_fails.worst) == pytest.approx((4 / 6, 1 / 3))


def test_each_attackers_verdict_counts_the_versions_that_it_can_make() -> None:
    """Of five images each attack breaks another one; CW, beyond eps, breaks all but one and counts nowhere."""
    beyond = seen("10000", bounded=False)
    said = {
        "oblivious": {"o": seen("01111"), "cw": beyond},
        "black_box": {"b": seen("10111"), "cw": beyond},
        "white_box": {"w": seen("11011"), "cw": beyond, "v": seen("11101")},
    }
    verdicts = {threat: found(seen("11111"), threat, **said).judge() for threat in (OBLIVIOUS, BLACK, WHITE)}
    rights = {"oblivious": bits("01111"), "black-box": bits("10111"), "white-box": bits("00001")}
    for threat, verdict in verdicts.items():
        assert torch.equal(verdict.oblivious.right, rights["oblivious"])
        assert verdict.black_box is not None and torch.equal(verdict.black_box.right, rights["black-box"])
        assert torch.equal(verdict.strongest.right, rights["white-box"])
        assert torch.equal(verdict.attacked.right, rights[threat.knowledge])
        versions = {OBLIVIOUS: 2, BLACK: 2, WHITE: 5}
        assert len(found(seen("11111"), threat, **said).versions) == versions[threat]
    shares = {"oblivious/o": 4, "oblivious/cw": 1, "black-box/b": 4, "black-box/cw": 1}
    shares |= {"white-box/w": 2, "white-box/cw": 1, "white-box/v": 1}
    assert verdicts[WHITE].trail == {name: pytest.approx(count / 5) for name, count in shares.items()}
    assert list(verdicts[WHITE].trail) == list(shares)


def test_what_was_not_run_has_no_verdict() -> None:
    verdict = found(seen("1"), OBLIVIOUS).judge()
    assert verdict.black_box is None and verdict.white_box is None
    with pytest.raises(AssertionError, match="the white-box attacks were not run"):
        verdict.strongest  # noqa: B018
    with pytest.raises(AssertionError, match="the black-box attacks were not run"):
        found(seen("1"), BLACK).judge().attacked  # noqa: B018


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("draws", [1, 3])
def test_the_risk_coverage_curve_is_that_of_trying_every_threshold(draws: int, columns: int) -> None:
    """Each draw of an image counts as one; what lies beyond the threat model counts nowhere."""
    generator = torch.Generator().manual_seed(columns)
    clean, attacked, beyond = (
        Seen(
            torch.rand(draws, 12 // draws, generator=generator) < share,
            torch.randint(0, 8, (draws, 12 // draws, columns), generator=generator).float() + shift,
            bounded,
        )
        for share, shift, bounded in ((0.9, 0, True), (0.3, 2, True), (0, -9, False))
    )
    said = found(clean, white_box={"a": attacked, "cw": beyond}, limits_S=torch.zeros(columns))
    every = []
    for limits in itertools.product(range(-1, 11), repeat=columns):
        verdict = said.judge(torch.tensor(limits, dtype=torch.float32))
        every.append((round(verdict.clean.rejection * 12), round(verdict.attacked.error * 12)))
    front = risk_coverage(said)
    for budget in range(12):
        least = min(error for rejected, error in every if rejected <= budget)
        point = pick(front, budget / 12)
        assert point is not None and round(point.attacked_error * 12) == least
        verdict = said.judge(torch.tensor(point.limits))
        assert verdict.attacked.error == pytest.approx(point.attacked_error)
        assert verdict.clean.rejection == pytest.approx(point.clean_rejection)


def test_a_suspicion_that_is_not_finite_is_rejected_and_no_threshold() -> None:
    nan, inf = float("nan"), float("inf")
    clean, one, other = (
        seen(right, suspicion_DNS=torch.tensor([column])[..., None])
        for right, column in (("111", [0.0, 1, nan]), ("000", [nan, inf, 0.5]), ("010", [1.0, 0, nan]))
    )
    said = found(clean, white_box={"a": one, "b": other}, limits_S=torch.ones(1))
    for point in risk_coverage(said):
        verdict = said.judge(torch.tensor(point.limits))
        assert (point.clean_rejection, point.attacked_error) == (verdict.clean.rejection, verdict.attacked.error)
    assert {point.limits for point in risk_coverage(said)} == {(0.0,), (1.0,)}


def test_a_setting_exactly_on_the_budget_is_within_it() -> None:
    rising_DNS = torch.arange(1000.0)[None, :, None]
    clean, wrong = seen("1" * 1000, suspicion_DNS=rising_DNS), seen("0" * 1000, suspicion_DNS=rising_DNS.flip(1))
    point = pick(risk_coverage(found(clean, white_box={"a": wrong}, limits_S=torch.ones(1))), 0.05)
    assert point is not None and point.clean_rejection == 0.05


def test_what_cannot_reject_has_no_curve() -> None:
    assert risk_coverage(found(seen("110"), white_box={})) == [] and pick([], 0.1) is None


def test_the_interval_is_wilsons() -> None:
    low, high = wilson(0.9, 100)  # Brown, Cai, DasGupta 2001: (0.8256, 0.9448)
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)
