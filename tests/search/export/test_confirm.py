"""Verdicts are confirmed in a new process: what only the process that judged can give is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from search.data import splits
from search.export.confirm import confirm, written
from search.export.loader import load

pytestmark = pytest.mark.slow

COUNTING = '''
"""Answers its first 60 images as the bare classifier does, and later ones in black and white."""

from attacks.gradient_view import Gradient
from defenses.base import Defense
from defenses.identity import Identity as Honest

ASKED = []


class Counting(Honest):
    gradients = Defense.gradients

    def purify(self, x_NCHW):
        ASKED.extend([1] * len(x_NCHW))
        return x_NCHW if len(ASKED) <= 60 else x_NCHW + ((x_NCHW > 0.5).float() - x_NCHW).detach()
'''


def test_a_defense_that_counts_calls_outside_its_weights_is_refused(code: Path) -> None:
    (code / "defenses" / "counting.py").write_text(COUNTING)
    search = "search --name counts --defense counting --task digits/A --trials 1 --refine 0 --knob epochs=1 --debug"
    small = "--train-images 300 --eval-images 24 --cheap-images 10 --classifier-epochs 8 --eps 0.1 --wandb disabled"
    launch = [sys.executable, "launch.py"]
    subprocess.run([*launch, *search.split(), *small.split()], cwd=code, check=True, capture_output=True)
    name = (code / "runs" / "counts" / "candidates.csv").read_text().splitlines()[1].partition(",")[0]
    export = [*launch, "export", "counts", "--candidate", name]
    done = subprocess.run(export, cwd=code, capture_output=True, text=True)
    assert done.returncode == 1
    said = " ".join((done.stdout + done.stderr).split())
    assert "confirmed: it does not hold that a new process that loads it" in said, said
    assert not (code / "runs" / "counts" / "export").exists()
    subprocess.run([*export, "--despite-alarms"], cwd=code, check=True, capture_output=True)
    attack = [*launch, "attack", f"runs/counts/export/{name}", "--suite", "audit", "--json"]
    table = json.loads(subprocess.run(attack, cwd=code, check=True, capture_output=True).stdout)
    assert [alarm for alarm in table["alarms"] if alarm.startswith("confirmed: ")][1:], "the audit's and its own"


def test_an_honest_export_is_confirmed_in_seconds(small: Path) -> None:
    gates = {gate["name"]: gate for gate in json.loads((small / "evidence.json").read_text())["gates"]}
    assert gates["confirmed"]["passed"] and gates["confirmed"]["images"] == 20 and gates["code"]["passed"]
    x_NCHW, y_N = splits.load("digits", "validation", None, 100)
    with torch.no_grad():
        model = load(small)
        right_DN = ((model(x_NCHW).argmax(1) == y_N) & model.accept(x_NCHW))[None]
    start = time.monotonic()
    confirmed, further = confirm(small, {"clean": x_NCHW}, {"clean": right_DN}, y_N, seed=1)
    print(f"a confirmation took {time.monotonic() - start:.1f} s")
    assert confirmed.passed and further.passed
    other, _ = confirm(small, {"clean": x_NCHW}, {"clean": right_DN ^ (torch.arange(100) < 7)}, y_N, seed=1)
    assert not other.passed and "(others on 7 of 100 images, clean)" in other.alarm


def test_a_model_is_confirmed_from_its_weights_alone(small: Path) -> None:
    x_NCHW, y_N = splits.load("digits", "validation", None, 30)
    known = json.loads((small / "evidence.json").read_text())
    with torch.no_grad():
        model = load(small)
        right_DN = ((model(x_NCHW).argmax(1) == y_N) & model.accept(x_NCHW))[None]
    with written(model, known["model"], model.code) as folder:
        confirmed, _ = confirm(folder, {"clean": x_NCHW}, {"clean": right_DN}, y_N, seed=1)
    assert confirmed.passed and not folder.exists()
    model.classifier.load_state_dict({name: -t for name, t in model.classifier.state_dict().items()})
    with written(model, known["model"], model.code) as folder:
        confirmed, _ = confirm(folder, {"clean": x_NCHW}, {"clean": right_DN}, y_N, seed=1)
    assert not confirmed.passed, "it was asked of the weights as they are now"


def test_a_process_that_cannot_answer_confirms_nothing(small: Path, tmp_path: Path) -> None:
    x_NCHW, y_N = splits.load("digits", "validation", None, 4)
    right_DN = torch.ones(1, 4, dtype=torch.bool)
    (gate,) = confirm(tmp_path, {"clean": x_NCHW}, {"clean": right_DN}, y_N, seed=1)
    assert not gate.passed and "which ended with 1: " in gate.alarm and "card.md: No such file" in gate.alarm
