"""What an export and an attack say while they work, where the output is piped."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from search.export.attack import attack
from tests.search.export.conftest import exported


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.console.EVERY_S", 0.2)


def shares(said: str, doing: str) -> list[int]:
    """Return the percentages that were told of some work, whose name came first."""
    first, *others = said.splitlines()
    assert first.startswith(doing) and others
    line = re.compile(re.escape(first) + r": +(\d+)%, 0:0\d:\d\d so far(, .+ left)?")
    return [int(found[1]) for found in map(line.fullmatch, others) if found]


def test_an_export_says_how_much_of_its_audit_is_done(tmp_path: Path) -> None:
    console = Console(file=(pipe := io.StringIO()), width=300)
    folder = exported(tmp_path, console=console, defense="magnet")
    told = shares(pipe.getvalue(), f"auditing {folder.name} by heavier attacks than it was chosen by")
    assert len(told) > 3 and told == sorted(told) and told[0] < 50 < told[-1]


def test_an_attack_says_how_much_of_it_is_done(small: Path) -> None:
    console = Console(file=(pipe := io.StringIO()), width=300)
    attack(small, "search", images=20, console=console)
    told = shares(
        pipe.getvalue(), f"attacking {small.name}, then the bare classifier: suite search, 20 images, white-box"
    )
    assert len(told) > 1 and told == sorted(told) and told[-1] > told[0]
