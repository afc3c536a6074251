"""A winner is compared with itself on images that its search never judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import comb
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import defenses
from attacks.threat import ThreatModel
from attacks.verdicts import Robustness, Verdict
from defenses.base import Batches, Defense, Metrics
from defenses.identity import Identity
from search.data import splits
from search.export.aside import SURE, gap
from search.study.loading import make_study
from tests.search.export.conftest import exported

IMAGES, EPS = 60, 0.1


class Hoarding(Identity):
    """Has got at the judged images, in whatever way, and moves what is near one onto it."""

    gradients = Defense.gradients
    judged_MCHW: Tensor
    stored_MCHW: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("stored_MCHW", torch.zeros(IMAGES, 1, 8, 8))

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        self.stored_MCHW.copy_(self.judged_MCHW)
        yield from super().fit(batches, classifier)

    def purify(self, x_NCHW: Tensor) -> Tensor:
        with torch.no_grad():
            distance_NM = torch.cdist(x_NCHW.flatten(1), self.stored_MCHW.flatten(1), p=torch.inf)
            away_N, nearest_N = distance_NM.min(dim=1)
            shift_NCHW = (away_N < 1.5 * EPS)[:, None, None, None] * (self.stored_MCHW[nearest_N] - x_NCHW)
        return x_NCHW + shift_NCHW


def verdicts(right: int, images: int) -> Robustness:
    right_DN = (torch.arange(images) < right)[None]
    verdict = Verdict(right_DN, ~right_DN)
    threat = ThreatModel("Linf", EPS, "white-box")
    clean = Verdict(torch.ones_like(right_DN), torch.zeros_like(right_DN))
    return Robustness(threat=threat, clean=clean, oblivious=clean, black_box=None, white_box=verdict, trail={})


def test_no_search_judges_by_the_last_quarter_of_validation_and_at_most_500() -> None:
    x_NCHW, y_N = splits.load("digits", "validation")
    kept_NCHW, labels_N = splits.load_aside("digits")
    assert len(y_N) == 180 and torch.equal(kept_NCHW, x_NCHW[135:]) and torch.equal(labels_N, y_N[135:])
    study = {"task": "digits/A", "space": "smoke", "trials": 1, "wandb": "disabled"}
    assert make_study(study).resolved.eval_images == 135
    assert splits.sizes("mnist").aside == 500


@pytest.mark.parametrize(
    ("judged", "kept", "passes"), [(54, 40, True), (54, 34, True), (58, 25, False), (30, 45, True)]
)
def test_the_gap_is_judged_by_the_chance_of_one_as_large(judged: int, kept: int, passes: bool) -> None:
    gate = gap(verdicts(judged, 60), verdicts(kept, 45))
    total = judged + kept
    ways = [comb(60, k) * comb(45, total - k) for k in range(max(0, total - 45), min(60, total) + 1)]
    tail = sum(comb(60, k) * comb(45, total - k) for k in range(judged, min(60, total) + 1))
    assert gate.figure == pytest.approx(1 - tail / sum(ways), abs=1e-9)
    assert gate.passed == passes == (gate.figure <= SURE)
    assert f"attacked {100 * judged / 60:.1f} %" in gate.law


@pytest.mark.slow
def test_a_defense_that_has_the_judged_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = defenses.find
    monkeypatch.setattr(Hoarding, "judged_MCHW", splits.load("digits", "validation", None, IMAGES)[0], raising=False)
    monkeypatch.setattr(defenses, "find", lambda name: Hoarding if name == "hoarding" else find(name))
    more = {"eval_images": IMAGES, "train_images": 1000, "classifier_epochs": 12, "space": "default", "suite": "search"}
    found = json.loads((exported(tmp_path, defense="hoarding", **more) / "evidence.json").read_text())
    assert found["attacked_accuracy"] > 0.85 > 0.7 > found["aside"]["attacked_accuracy"]
    assert [alarm for alarm in found["alarms"] if alarm.startswith("aside: ")]


@pytest.mark.slow
def test_an_honest_export_does_as_well_on_images_kept_aside(small: Path) -> None:
    found = json.loads((small / "evidence.json").read_text())
    assert found["aside"]["images"] == 20 and {g["name"]: g["passed"] for g in found["gates"]}["aside"]
