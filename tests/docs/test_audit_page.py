"""The page on the audit of any model: its blocks run in order, and print what it shows."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from search.data import splits
from tests.docs.test_tour import without_figures
from tests.search.cli.test_cli import said
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "audit.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_page_has_a_section_on_each_of_four_methods() -> None:
    assert len(re.findall(r"^\| `\w+\(x\)` \|", PAGE, re.MULTILINE)) == 4


@pytest.mark.slow
def test_each_block_runs_and_prints_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "net", raising=False)
    printed, ran = "", list[str]()
    for language, text in BLOCKS:
        ran.append(language)
        if language == "sh":
            words = shlex.split(text)
            assert words[:2] == ["python", "launch.py"]
            heard = said(*words[2:])
            assert heard.code == (0 if "net.py:build" in words else 1), heard
            printed = heard.out
        elif language == "text":
            lines = {without_figures(line) for line in printed.splitlines()}
            assert [line for line in text.splitlines() if without_figures(line) not in lines] == [], printed
        elif "report = audit(" in text:
            x, y = splits.load("digits", "validation", limit=32)
            exec(text, {"model": importlib.import_module("net").build(), "x": x, "y": y})
            assert (tmp_path / "audit-mine" / "report.html").exists()
        elif text.startswith(("import torch\nfrom torch", "class ")):  # parts of net.py
            with (tmp_path / "net.py").open("a") as file:
                file.write(text + "\n\n")
        else:
            exec(text, {})
    assert ran.count("sh") == 3 and ran.count("text") == 3
