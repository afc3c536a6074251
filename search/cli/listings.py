"""The rows of `list`: defenses with their knobs, attacks, spaces, tasks, tables and searches.

Each kind imports only the modules that it needs, so that shell completion is fast.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import defenses
import spaces
from spaces.domain import spoken, written
from spaces.exceptions import InputError, choose
from spaces.space import SearchSpace, conditions

Row = dict[str, Any]


def rows(what: str, storage: str, data_dir: str | None = None) -> list[Row]:
    """Return the rows of `list` for one kind.

    Args:
        data_dir: where tasks on users' own data lie, and those with their classifiers.

    Raises:
        InputError: there is no such kind.
    """
    kinds: dict[str, Callable[[], list[Row]]] = {
        "defenses": _defenses,
        "attacks": _attacks,
        "spaces": _spaces,
        "tasks": lambda: _tasks(data_dir),
        "tables": _tables,
        "searches": lambda: _searches(storage),
    }
    return kinds[choose("what to list", what, list(kinds))]()


def states(name: str | None, storage: str, warn: Callable[[str], None]) -> list[Row]:
    """Return the progress of one search, or of all in a storage, with a warning for each that cannot be read."""
    from search import session
    from search.study.catalog import open_search, search_names

    if name is not None:
        return [session.status(open_search(name, storage, whole=False))]
    found = []
    for each in search_names(storage):
        try:
            found.append(session.status(open_search(each, storage, whole=False)))
        except InputError as error:
            warn(f"{each}: {error}")
    return found


def exports(paths: Iterable[Path]) -> list[Path]:
    """Return the exports at these paths; each path is an export, or a folder of exports.

    Raises:
        InputError: a path is neither; the message suggests the most similar existing name.
    """
    found = []
    for path in paths:
        inside = sorted(each.parent for each in path.glob("*/evidence.json"))
        if not inside and not (path / "evidence.json").exists():
            raise InputError(f"an export must be a folder with whole files, but {path} is none{_near(path)}")
        found += inside or [path]
    return found


def export(path: Path) -> Path:
    """Return the only export at a path.

    Raises:
        InputError: there is no export, or more than one.
    """
    found = exports([path])
    if len(found) > 1:
        raise InputError(f"an export must be one folder, but {path} holds {', '.join(each.name for each in found)}")
    return found[0]


def _near(path: Path) -> str:
    """Return a suggestion if the first missing part of the path is similar to an existing folder; else nothing."""
    whole = path.absolute()
    there = next(parent for parent in (whole, *whole.parents) if parent.is_dir())
    missing = whole.relative_to(there).parts
    names = [each.name for each in there.iterdir() if each.is_dir()]
    near = difflib.get_close_matches(missing[0], names, n=1) if missing else []
    return f"; did you mean {str(path)[: -len(str(Path(*missing)))] + near[0]!r}?" if near else ""


def _defenses() -> list[Row]:
    return [
        {
            "defense": name,
            "knob": knob,
            "when": when,
            "default": space.defaults[knob],
            "domain": spoken(domain),
            "matters where": conditions(space.given.get(knob, {})),
        }
        for name in defenses.names()
        for space in [SearchSpace.of(defenses.find(name))]
        for when, domains in (("train", space.train), ("inference", space.inference))
        for knob, domain in domains.items()
    ]


def _attacks() -> list[Row]:
    from attacks.suites import SUITES

    return [
        {
            "suite": suite.name,
            "knowledge": knowledge,
            "attack": attack.name,
            "parameters": attack.spoken(),
            "norm": "least L2" if attack.unbounded else ", ".join(attack.norms),
            "eps": "the task's" if suite.eps is None else written(suite.eps),
            "for": attack.aims or "any",
            "source": attack.source,
        }
        for suite in SUITES.values()
        for knowledge, group in (("oblivious, black-box", suite.oblivious), ("white-box", suite.white_box))
        for attack in group
    ]


def _spaces() -> list[Row]:
    return [
        {
            "defense": defense,
            "space": name,
            "trainings": space.trainings() or "continuous",
            "candidates": space.size() or "continuous",
            "searched": "; ".join(_searched(space)),
        }
        for defense in defenses.names()
        for name in spaces.names(defense)
        for space in [SearchSpace.of(defenses.find(defense)).narrow(spaces.named(defense, name))]
    ]


def _searched(space: SearchSpace) -> Iterable[str]:
    for name, domain in space.searched().items():
        where = f" (where {conditions(space.given[name])})" if name in space.given else ""
        yield f"{name}: {spoken(domain)}{where}"


def _tasks(data_dir: str | None) -> list[Row]:

    from search.classifiers.task import find_task, tasks

    found = [find_task(name, data_dir) for name in tasks(data_dir)]
    return [{"task": task.name, **vars(task.shape), "eps": task.eps} for task in found]


def _tables() -> list[Row]:
    from search.reproduce import paper_tables

    return paper_tables.rows()


def _searches(storage: str) -> list[Row]:

    from search.study.catalog import search_names

    return [{"search": name} for name in search_names(storage)]
