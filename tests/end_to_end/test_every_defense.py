"""Every defense is searched and exported through the command line, without being told of any."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch

import defenses
import spaces
from defenses.base import Defense
from launch import main
from search.data.splits import load
from search.export import loader
from search.study.loading import make_study
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

QUICK = ("--eval-images", "40", "--cheap-images", "20", "--classifier-epochs", "2", "--wandb", "disabled")
SELECTIVE = [name for name in defenses.names() if defenses.find(name).thresholds()]
RETRAINED = [name for name in defenses.names() if defenses.find(name).adopt is not Defense.adopt]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all searches, which so share classifiers and oblivious images."""
    return tmp_path_factory.mktemp("runs")


def run(storage: Path, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["launch.py", *arguments, "--storage", str(storage)])
        return main()


def search(storage: Path, defense: str, *more: str, name: str = "") -> list[dict[str, str]]:
    """Search as the README says and return candidates.csv."""
    name = name or defense
    command = ("search", "--name", name, "--defense", defense, "--task", "digits/A", "--space", "smoke", "--debug")
    assert run(storage, *command, "--trials", "2", *QUICK, *more) == 0
    with (storage / name / "candidates.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("defense", "space"), [(d, s) for d in defenses.names() for s in spaces.names(d)])
def test_every_setting_of_a_named_space_can_be_built_on_the_images_it_is_for(defense: str, space: str) -> None:
    dataset = {"cifar": "cifar10", "svhn": "svhn"}.get(space.rpartition("_")[2], "mnist")
    make_study({"defense": defense, "space": space, "task": f"{dataset}/A"})
    assert {"paper", "wide", "smoke"} <= set(spaces.names(defense))


@pytest.mark.parametrize("defense", defenses.names())
def test_every_defense_is_searched(defense: str, storage: Path) -> None:
    found = search(storage, defense)
    assert found and {row["defense"] for row in found} == {defense}
    for row in found:
        kinds = ("attacked_accuracy", "attacked_error", "attacked_rejection")
        accuracy, error, rejection = (float(row[kind]) for kind in kinds)
        assert math.isclose(accuracy + error + rejection, 1) and 0 <= accuracy <= float(row["clean_accuracy"]) <= 1
        assert 0 <= float(row["latency_ms_p50"]) < math.inf and row["state"] == "finished"
        assert float(row["clean_rejection"]) == 0 or defense in SELECTIVE


@pytest.mark.parametrize("defense", SELECTIVE)
def test_thresholds_are_picked_from_the_curve_within_the_budget(defense: str, storage: Path) -> None:
    found = search(storage, defense, "--max-clean-rejection", "0.1", name=f"{defense}-budget")
    named = spaces.named(defense, "smoke")
    grid = {name: cast(Sequence[float], named[name]) for name in defenses.find(defense).thresholds()}
    by_fit: dict[str, list[dict[str, str]]] = {}
    for row in found:
        by_fit.setdefault(row["fit"], []).append(row)
    for rows in by_fit.values():
        within = [float(row["attacked_error"]) for row in rows if float(row["clean_rejection"]) <= 0.1]
        picked = [row for row in rows if not all(float(row[name]) in grid[name] for name in grid)]
        assert all(float(row["clean_rejection"]) <= 0.1 for row in picked)
        assert min(float(row["attacked_error"]) for row in picked) == min(within)


@pytest.mark.parametrize("defense", sorted({*SELECTIVE, *RETRAINED}))
def test_an_export_holds_all_that_the_defense_took_over(defense: str, storage: Path) -> None:
    if not (storage / defense).exists():
        search(storage, defense)
    assert run(storage, "export", defense, "--top", "1", "--out", str(storage / "out"), "--despite-alarms") == 0
    (folder,) = (path for path in (storage / "out").iterdir() if f"# {defense} on" in (path / "card.md").read_text())
    loaded, evidence = loader.load(folder), json.loads((folder / "evidence.json").read_text())
    x, y = load("digits", "validation", limit=40)
    with torch.no_grad():
        right = (loaded(x).argmax(1) == y) & loaded.accept(x)
    assert float(right.double().mean()) == pytest.approx(evidence["clean_accuracy"], abs=1e-6)


def test_a_defense_protects_a_classifier_that_it_was_not_trained_with(storage: Path) -> None:
    own = search(storage, "magnet", name="trained")
    other = search(storage, "magnet", "--protect", "digits/B", name="other")
    assert {row["fit"] for row in own} == {row["fit"] for row in other}  # the same trainings
    assert {row["task"] for row in other} == {"digits/A protecting digits/B"}
    figures = ("clean_accuracy", "attacked_error", "oblivious_accuracy")
    assert [[row[name] for name in figures] for row in own] != [[row[name] for name in figures] for row in other]


def test_the_benchmark_makes_a_row_of_the_results(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.results_table"]
    small = ["--task", "digits/A", "--train-images", "200", "--eval-images", "20", "--white-images", "10"]
    small += ["--cw-steps", "5", "--storage", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "run", "identity", *small], cwd=ROOT, env=environment, check=True, capture_output=True)
    table = subprocess.run([*command, "table", *small], cwd=ROOT, env=environment, check=True, capture_output=True)
    head, _, row = table.stdout.decode().strip().splitlines()
    assert head.count("|") == row.count("|") and "pgd-40 WB" in head and row.startswith("| identity |")
