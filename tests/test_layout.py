"""The shape of the code: who may import whom, how large rooms, files and functions are, who opens the test split."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

import pytest

from tests.support.paths import ROOT

PACKAGES = ["spaces", "attacks", "defenses", "search", "launch"]
BASE = {"exceptions", "formatting", "console", "templates"}
"""Files of search/ that every room may use; of search/ they import each other alone."""
FLOORS = [
    {"storage", "data"},
    {"classifiers"},
    {"study"},
    {"trial", "optimizer"},
    {"engine", "tracking", "reproduce"},
    {"export"},
    {"report", "final"},
    {"session", "auditing"},
    {"api", "cli", "__init__"},
]
"""The rooms of search/ and the files beside them: each imports only from floors before its own."""
PIP = {"build", "crucible.egg-info"}
"""What pip leaves where an extra is installed."""
FILES = sorted(p for top in PACKAGES for p in [*ROOT.glob(f"{top}.py"), *ROOT.glob(f"{top}/**/*.py")])
SEARCH = [path for path in FILES if path.is_relative_to(ROOT / "search")]
ROOMS = sorted({path.parent for path in SEARCH} - {ROOT / "search"})


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def imports(path: Path) -> list[str]:
    """Return every module that a file imports, wherever in it, as `package.module` or `package.module.name`."""
    found = list[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(parts: tuple[str, ...]) -> str:
    """Return the room of search/ in which a file lies, or its own name where it lies beside the rooms."""
    return parts[1].removesuffix(".py") if len(parts) > 1 else "__init__"


def floor(name: str) -> int:
    (found,) = [-1] if name in BASE else [number for number, rooms in enumerate(FLOORS) if name in rooms]
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_package_imports_only_from_those_to_its_left(path: Path) -> None:
    here = PACKAGES.index(path.relative_to(ROOT).parts[0].removesuffix(".py"))
    tops = {name.split(".")[0] for name in imports(path)} & set(PACKAGES)
    assert all(PACKAGES.index(top) <= here for top in tops), tops


@pytest.mark.parametrize("path", SEARCH, ids=name_of)
def test_a_room_imports_only_from_rooms_below_it(path: Path) -> None:
    here = room(path.relative_to(ROOT).parts)
    others = {room(tuple(name.split("."))) for name in imports(path) if name.split(".")[0] == "search"} - {here}
    assert all(floor(other) < floor(here) or {here, other} <= BASE for other in others), others


def test_no_module_imports_itself_through_others() -> None:
    """A circle within a room, say; only imports at the top of a file count, as those in functions come later."""
    graph = {module(path): set(modules_at_the_top(path)) for path in FILES}
    done, circles = set[str](), list[tuple[str, ...]]()

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            circles.append((*way[way.index(name) :], name))
        elif name not in done:
            for other in graph.get(name, ()):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert circles == []


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules_at_the_top(path: Path) -> Iterator[str]:
    """Yield the modules of ours that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            found = next((n for n in (name, name.rpartition(".")[0]) if is_module(n)), None)
            if found is not None and found != module(path):
                yield found


def is_module(name: str) -> bool:
    return any((ROOT / f"{name.replace('.', '/')}{end}.py").exists() for end in ("", "/__init__"))


@pytest.mark.parametrize("start", [path for path in SEARCH if path.parent.name == "trial"], ids=name_of)
def test_what_a_trial_needs_is_free_of_ray_optuna_and_wandb(start: Path) -> None:
    """With all that it imports inside search/; a space's domains are Optuna distributions, which is another matter."""
    seen, left = set[str](), [module(start)]
    while left:
        name = left.pop()
        seen.add(name)
        path = ROOT / f"{name.replace('.', '/')}.py"
        for imported in imports(path) if path.exists() else ():
            assert imported.split(".")[0] not in {"ray", "optuna", "wandb"}, (name, imported)
            found = [n for n in (imported, imported.rpartition(".")[0]) if is_module(n)][:1]
            left += [n for n in found if n.startswith("search.") and n not in seen]


def test_only_final_opens_the_test_split() -> None:
    openers = {name_of(p) for p in FILES if "open_test" in p.read_text()}
    assert openers == {"search/data/splits.py", "search/final/final_run.py"}


@pytest.mark.parametrize("path", [*FILES, *ROOT.glob("benchmarks/*.py")], ids=name_of)
def test_text_is_utf_8_whatever_the_locale(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)]
    unsaid = [call for call in calls if _is_text(call) and "encoding" not in {each.arg for each in call.keywords}]
    assert [call.lineno for call in unsaid] == []


def _is_text(call: ast.Call) -> bool:
    """Return whether a call reads or writes text: a file, or the output of another process."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    decodes = [each.value for each in call.keywords if each.arg in ("text", "universal_newlines")]
    if name in ("read_text", "write_text") or any(isinstance(each, ast.Constant) for each in decodes):
        return True
    words = [each.value for each in call.args[:2] if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    modes = [word for word in words if set(word) <= set("rwaxbt+")]
    opens = name in ("open", "fdopen", "TemporaryFile", "NamedTemporaryFile")
    return (isinstance(call.func, ast.Name) and name == "open" and not modes) or (
        opens and any("b" not in mode for mode in modes)
    )


def test_search_reads_as_a_table_of_contents() -> None:
    beside = [path for path in (ROOT / "search").iterdir() if path.is_file()]
    assert len(beside) <= 8, beside
    assert {path.name for path in ROOMS} == set().union(*FLOORS[:7]) | {"auditing", "cli"}
    assert len(FLOORS) <= 9


@pytest.mark.parametrize("folder", ROOMS, ids=name_of)
def test_a_room_has_at_most_twelve_files(folder: Path) -> None:
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 12
    assert (folder / "__init__.py").read_text() == "", "a room hands nothing on"


def test_files_and_functions_are_short() -> None:
    lines = {name_of(path): len(path.read_text().splitlines()) for path in FILES if path.name != "__init__.py"}
    assert median(lines.values()) <= 150 and max(lines.values()) <= 300, max(lines, key=lambda name: lines[name])
    functions = [
        f"{name_of(path)}: {node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > 50
    ]
    assert len(functions) <= 3, functions


def test_tests_mirror_the_packages() -> None:
    """A folder of tests for each package and each room; what is for many of them lies in four further ones."""
    tests = ROOT / "tests"
    folders = {path.name for path in tests.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == {"spaces", "attacks", "defenses", "search", "benchmarks", "docs", "end_to_end", "support"}
    assert {path.name for path in (tests / "search").iterdir() if path.is_dir()} - {"__pycache__"} == {
        path.name for path in ROOMS
    }
    assert {path.name for path in tests.glob("test_*.py")} == {"test_layout.py"}


def test_the_top_level_holds_only_what_was_agreed() -> None:
    agreed = {*PACKAGES[:-1], "launch.py", "tests", "README.md", "Makefile", "pyproject.toml", "requirements.lock"}
    agreed |= {"requirements.in", "benchmarks", "deploy", "docs", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))} - {"runs", *PIP}
    assert found <= agreed, found - agreed
