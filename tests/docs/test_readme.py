"""The pages keep their word: a command in a block runs here or says what it needs, and every link leads somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from search.cli.flags import given
from search.cli.listings import rows
from search.study.fields import Fields
from search.study.loading import make_study
from tests.search.cli.test_cli import Said, parsed, said
from tests.support.paths import ROOT

PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"(?:^<!-- needs: ([^>]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`python (launch\.py [^`]+|-m benchmarks[^`]+)`")
OTHERS = {"cd", "ray", "sbatch", "wandb", ".ci/run"}
"""What a block that needs something may name beside Python and make."""
SMALL = {
    "search": "--task digits/A --space smoke --trials 1 --epochs 1 --classifier-epochs 2 --suite quick "
    "--eval-images 40 --cheap-images 20 --train-images 400 --wandb disabled --debug",
    "resume": "--debug",
    "export": "--despite-alarms",
    "attack": "--suite quick --images 20",
}
"""What makes a command of the README run in seconds; each is added to it as it stands there."""


@dataclass(frozen=True)
class Command:
    page: str
    words: tuple[str, ...]
    needs: str

    @property
    def launched(self) -> tuple[str, ...]:
        """What follows launch.py; of the Slurm script, the search that it starts."""
        if "deploy/slurm.sh" in self.words:
            name, storage, *flags = self.words[self.words.index("deploy/slurm.sh") + 1 :]
            return ("search", "--name", name, "--storage", storage, *flags)
        return self.words[self.words.index("launch.py") + 1 :] if "launch.py" in self.words else ()

    @property
    def module(self) -> str:
        return self.words[self.words.index("-m") + 1] if "-m" in self.words else ""

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def commands() -> Iterator[Command]:
    """Yield the commands of every page: those in blocks, and those in the text."""
    for page in PAGES:
        for needs, language, text in BLOCK.findall(page.read_text()):
            for line in text.replace("\\\n", " ").splitlines() if language == "sh" else ():
                if words := tuple(shlex.split(line, comments=True)):
                    yield Command(page.name, words, needs)
        for text in INLINE.findall(BLOCK.sub("", page.read_text()).replace("\n", " ")):
            yield Command(page.name, ("python", *shlex.split(text)), "in the text")


COMMANDS = list(commands())


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.launched], ids=str)
def test_the_command_line_takes_every_command_of_the_pages(
    command: Command, leaves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRUCIBLE_DATA", str(leaves))
    found = parsed(*command.launched)
    if command.launched[0] == "search":
        make_study(given({name: value for name, value in found.items() if name in Fields.model_fields}))
    if command.launched[0] == "list":
        assert rows(found["what"], "runs") or found["what"] == "searches"
    if command.launched[0] == "reproduce":
        assert found["table"] in {row["table"] for row in rows("tables", "runs")}


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.launched], ids=str)
def test_every_other_command_exists_and_says_what_it_needs(command: Command) -> None:
    first = next(word for word in command.words if "=" not in word)
    if first == "make":
        subprocess.run(["make", "--dry-run", *command.words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif command.module:
        assert importlib.util.find_spec(command.module)
    elif command.words != (".", ".venv/bin/activate"):
        assert first in OTHERS
    assert command.needs or first == "."


def test_a_block_is_of_commands_of_python_or_of_what_they_print() -> None:
    for page in PAGES:
        for _, language, text in BLOCK.findall(page.read_text()):
            assert language in ("sh", "python", "text", "")
            assert language in ("sh", "python") or "python launch.py" not in text, text
        assert page.read_text().count("```") == 2 * len(BLOCK.findall(page.read_text())), page.name


def test_commands_that_need_nothing_stand_where_they_are_run() -> None:
    """Those of the README here, those of the tour in test_tour.py."""
    assert {command.page for command in COMMANDS if not command.needs} == {"README.md", "tour.md"}
    assert len(COMMANDS) > 30


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Said]]:
    """What the README's commands that need nothing say, run in their order in one folder, which stays the current."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("walk"))
        heard = dict[str, Said]()
        mine = [c for c in COMMANDS if c.page == "README.md" and c.launched and not c.needs]
        for command in sorted(mine, key=lambda command: command.launched[0] != "search"):  # `make search` comes first
            words = [placed(word) for word in command.launched]
            heard[" ".join(command.launched)] = said(*words, *shlex.split(SMALL.get(words[0], "")))
        yield heard


def placed(text: str) -> str:
    """Put the search of this walk in the place of the quickstart, and its export in that of CANDIDATE."""
    exported = next((path.parent.name for path in Path().glob("runs/night/export/*/evidence.json")), "CANDIDATE")
    return text.replace("quickstart", "night").replace("CANDIDATE", exported)


@pytest.mark.slow
def test_the_readmes_commands_run_one_after_the_other(walk: dict[str, Said]) -> None:
    assert {line: heard for line, heard in walk.items() if heard.code} == {} and len(walk) >= 7
    said_of = {line.split()[0]: heard.out for line, heard in walk.items()}
    assert "night" in said_of["status"] and said_of["report"].endswith("runs/night/report.html\n")
    assert "exported   runs/night/export" in said_of["export"].replace(f"{os.getcwd()}/", "")


@pytest.mark.slow
def test_after_an_export_the_report_has_the_audited_figure(walk: dict[str, Said]) -> None:
    assert "report     runs/night/report.html" in walk["export quickstart --pareto"].out.replace(f"{os.getcwd()}/", "")
    page = " ".join(Path("runs/night/report.html").read_text().split())
    alarms = [json.loads(path.read_text())["alarms"] for path in Path("runs/night/export").glob("*/evidence.json")]
    assert 'id="audits"' in page and alarms
    # What is exported despite a failed check is no winner.
    assert (", audited, classifies" in page) or all(alarms)


@pytest.mark.slow
def test_the_readmes_python_loads_the_export(walk: dict[str, Said]) -> None:
    ((_, _, code),) = [block for block in BLOCK.findall((ROOT / "README.md").read_text()) if block[1] == "python"]
    found: dict[str, Any] = {}
    exec(placed(code), found)
    assert found["model"](torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "status",
        "status night",
        "export night --top 1 --despite-alarms",
        "attack runs/night/export --suite quick --images 20",
        "list searches",
    ],
)
def test_json_alone_is_printed_of_a_real_search(words: str, walk: dict[str, Said]) -> None:
    heard = said(*words.split(), "--json")
    assert heard.code == 0 and json.loads(heard.out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("status nihgt", "did you mean 'night'?"),
        ("attack runs/nihgt/export", "did you mean 'runs/night'?"),
        ("final runs/night/exprot", "did you mean 'runs/night/export'?"),
        ("attack runs/night/export --suite standart", "did you mean 'standard'?"),
        ("wandb-view nigth", "did you mean 'night'?"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_nearest(words: str, hint: str, walk: dict[str, Said]) -> None:
    heard = said(*words.split())
    assert heard.code == 2 and hint in heard.err and heard.out == ""


def slugs(page: Path) -> set[str]:
    """Return the anchors that a page's headings have on GitHub."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), target
        assert not heading or heading in slugs(there), target


def test_every_page_of_docs_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in ROOT.glob("docs/*.md") if f"(docs/{page.name})" not in readme] == []
