"""The shape of the code: who may import whom, and who may open the test split."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["spaces", "attacks", "defenses", "search", "launch"]
FILES = sorted(p for top in ORDER for p in [*ROOT.glob(f"{top}.py"), *ROOT.glob(f"{top}/**/*.py")])


def imports(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, wherever in it, as `package.module` or `package.module.name`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_imports_only_from_those_to_its_left(path: Path) -> None:
    here = ORDER.index(path.relative_to(ROOT).parts[0].removesuffix(".py"))
    tops = {name.split(".")[0] for name in imports(path)} & set(ORDER)
    assert all(ORDER.index(top) <= here for top in tops), tops


def test_only_final_opens_the_test_split() -> None:
    openers = {p.name for p in FILES if "open_test" in p.read_text()}
    assert openers <= {"splits.py", "final_run.py"}


@pytest.mark.parametrize(
    "module", ["trial.runner", "study.candidate", "storage.store", "trial.latency", "optimizer.early_stopping"]
)
def test_what_a_trial_needs_is_free_of_ray_optuna_and_wandb(module: str) -> None:
    """Transitively inside search/; a space's domains are Optuna distributions, which is another matter."""
    seen, todo = set[str](), [f"search.{module}"]
    while todo:
        name = todo.pop()
        seen.add(name)
        for imported in imports(ROOT / f"{name.replace('.', '/')}.py"):
            assert imported.split(".")[0] not in {"ray", "optuna", "wandb"}, (name, imported)
            modules = [found for found in (imported, imported.rpartition(".")[0]) if is_module(found)][:1]
            todo += [found for found in modules if found.startswith("search.") and found not in seen]


def is_module(name: str) -> bool:
    return (ROOT / f"{name.replace('.', '/')}.py").exists()


def test_the_top_level_holds_only_what_was_agreed() -> None:
    agreed = {*ORDER[:-1], "launch.py", "tests", "README.md", "Makefile", "pyproject.toml", "requirements.lock"}
    agreed |= {"requirements.in", "benchmarks", "deploy", "docs", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))} - {"runs"}
    assert found <= agreed, found - agreed
