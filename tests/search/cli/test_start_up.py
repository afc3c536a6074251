"""What commands import before they answer."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from search.engine.run import run
from search.engine.worker import Report
from search.report.status import status_of
from search.study.candidate import Proposal
from search.study.study import Study
from tests.conftest import digits_study
from tests.search.cli.test_cli import cpu_seconds
from tests.support.engine import Trained
from tests.support.paths import ROOT

HEAVY = {"torch", "torchattacks", "ray", "wandb", "pandas", "plotly", "sklearn", "optuna_dashboard"}


class Curved(Trained):
    """Work with random quick scores and verdicts."""

    def execute(self, study: Study, proposal: Proposal, report: Report) -> dict[str, Any]:
        return super().execute(study, proposal, report) | {"curve": [0.1 * random.random(), random.random()]}


def test_status_imports_neither_torch_nor_ray_nor_wandb_and_answers_soon(tmp_path: Path) -> None:
    study = digits_study(tmp_path, trials=5, refine=0)
    assert run(study, [], debug=True, work=Curved(lambda params: random.random()).work()) == "finished"
    assert status_of(study, runs=False)["rank_correlation"]["ranks"][-1]["rho"] is not None  # it needs SciPy
    words = ["status", "smoke", "--storage", str(tmp_path)]
    code = f"import sys, launch; sys.argv = ['launch.py', *{words}]; launch.main(); print({HEAVY} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "5 of 5 finished" in shown and shown.endswith("set()\n")
    assert cpu_seconds("launch.py", *words) < cpu_seconds("-c", "import torch, scipy.stats")


def test_files_and_their_names_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    config = tmp_path / "é.yaml"
    config.write_text(f"storage: {tmp_path}/é\nnotes: café\n", encoding="utf-8")
    command = [sys.executable, "launch.py", "search", "--config", str(config), "--print-config"]
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    shown = subprocess.run(command, cwd=ROOT, env=ascii_only, capture_output=True, check=True).stdout
    values = yaml.safe_load(shown)
    assert (values["storage"], values["notes"]) == (f"{tmp_path}/é", "café")
