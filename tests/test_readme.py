"""The README's and the docs' commands exist, their links lead somewhere, and `make` has what they name."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.test_cli import ROOT, launch

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    return sorted({line.strip() for line in re.findall(r"^\s*(python launch\.py [^#\n`]*)", text, re.MULTILINE)})


@functools.cache
def help_of(*path: str) -> str:
    return launch(*path, "--help", COLUMNS="250").stdout


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_exists_with_its_flags(command: str) -> None:
    words = shlex.split(command)[2:]
    path = words[:2] if words[0] == "data" else words[:1]
    shown = help_of(*path)
    for flag in (word for word in words if word.startswith("--")):
        assert re.search(rf"{flag}\b", shown), (flag, shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z]+)\b  ", (ROOT / "README.md").read_text()))))
def test_make_has_what_the_readme_names(target: str) -> None:
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_pages_have_commands_at_all() -> None:
    assert len(commands()) >= 6
