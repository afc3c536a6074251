"""The page on new defenses: its file, dropped among the others, is searched by its command and passes the suite."""

from __future__ import annotations

import csv
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import defenses
from launch import main
from tests.defenses import test_conformance
from tests.support.paths import ROOT

NAME = "denoiser"
PAGE = (ROOT / "docs" / "new-defense.md").read_text()
QUICK = ["--debug", "--wandb", "disabled", "--trials", "2", "--epochs", "1", "--classifier-epochs", "2"]
QUICK += ["--suite", "quick", "--eval-images", "40", "--cheap-images", "20", "--train-images", "400"]
CHECKS = [
    check
    for name, check in vars(test_conformance).items()
    if name.startswith("test_") and "made" in check.__annotations__ and "gpu" not in name
]


@pytest.fixture(scope="module", autouse=True)
def _dropped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put the page's file beside the other defenses, in a folder of its own."""
    folder = tmp_path_factory.mktemp("defenses")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (folder / f"{NAME}.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defenses, "__path__", [*defenses.__path__, str(folder)])
        importlib.invalidate_caches()
        yield
    sys.modules.pop(f"defenses.{NAME}", None)
    vars(defenses).pop(NAME, None)
    importlib.invalidate_caches()


def test_the_page_has_less_than_40_lines() -> None:
    lines = PAGE.splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 125


def test_the_pages_command_searches_the_pages_defense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = re.findall(r"^ *python (launch\.py search .*)$", PAGE, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), *QUICK, "--storage", str(tmp_path)])
    assert main() == 0
    rows = list(csv.DictReader((tmp_path / "mine" / "candidates.csv").open()))
    settings = {(row["noise"], row["strength"]) for row in rows if row["defense"] == NAME}
    assert settings == {(noise, strength) for noise in ("0.1", "0.3") for strength in ("0.5", "1.0")}
    assert all(0 <= float(row["attacked_accuracy"]) <= 1 and float(row["latency_ms_p50"]) > 0 for row in rows[:4])


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_pages_defense_conforms(
    check: Callable[..., None], digits: tuple[Tensor, Tensor], classifier: nn.Module
) -> None:
    made = test_conformance.Made(defenses.find(NAME), {}, digits, classifier)
    given: dict[str, Any] = {"made": made, "classifier": classifier, "shape": test_conformance.DIGITS}
    check(**{name: given[name] for name in inspect.signature(check).parameters})
