"""The tour's blocks run in order, as a reader would run them, and print what the page shows."""

from __future__ import annotations

import contextlib
import glob
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import launch
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "tour.md"


def blocks() -> list[tuple[str, str]]:
    """Return the language and the text of each block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def without_figures(line: str) -> str:
    """Return a line without names of candidates, numbers and spaces: these are the machine's, and so is who is fast."""
    line = re.sub(r"^\['unet'(, 'cnn')?\]", "FRONT", line)
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.]*", "#", re.sub(r"[0-9a-f]{8}-[0-9a-f]{6}", "ID", line))).strip()


def ran(language: str, text: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a block and return what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), names)
        for command in text.splitlines() if language == "sh" else ():
            words = shlex.split(command)
            assert words[:2] == ["python", "launch.py"]
            found = [glob.glob(word) or [word] for word in words[1:]]
            monkeypatch.setattr("sys.argv", [word for group in found for word in group])
            assert launch.main() == 0, command
    return printed.getvalue()


def test_each_block_runs_and_prints_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    names: dict[str, Any] = {}
    printed, languages = "", []
    for language, text in blocks():
        languages.append(language)
        if language != "text":
            printed = ran(language, text, names, monkeypatch)
            continue
        said = {without_figures(line) for line in printed.replace(f"{tmp_path}/", "").splitlines()}
        missing = [line for line in text.splitlines() if without_figures(line) not in said]
        assert not missing, (missing, printed)
    assert {"python", "sh", "text"} == set(languages)
    assert names["table"]["attacked_accuracy"].between(0, 1).all()
