"""The rows of `list`: defenses with their knobs, one defense, attacks, spaces, tasks, tables and searches.

Each kind imports only the modules that it needs, so that shell completion is fast.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import defenses
import spaces
from spaces.domain import spoken, written
from spaces.exceptions import InputError, choose
from spaces.space import SearchSpace, conditions

Row = dict[str, Any]


def rows(what: str, storage: str, data_dir: str | None = None) -> list[Row]:
    """Return the rows of `list`.

    Args:
        what: a kind, or a defense, whose knobs are listed with their meaning.
        data_dir: where tasks on users' own data lie, and those with their classifiers.

    Raises:
        InputError: there is neither such a kind nor such a defense.
    """
    kinds: dict[str, Callable[[], list[Row]]] = {
        "defenses": _defenses,
        "attacks": _attacks,
        "spaces": _spaces,
        "tasks": lambda: _tasks(data_dir),
        "tables": _tables,
        "searches": lambda: _searches(storage),
    }
    chosen = choose("what to list", what, [*kinds, *defenses.names()])
    return kinds[chosen]() if chosen in kinds else _knobs(chosen)


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
    every = [{"defense": name, **row} for name in defenses.names() for row in _knobs(name)]
    return [{key: value for key, value in row.items() if key != "meaning"} for row in every]  # too long for all


def _knobs(name: str) -> list[Row]:
    """Return the knobs of a defense, with what each means."""
    defense = defenses.find(name)
    space, declared = SearchSpace.of(defense), (*fields(defense.Train), *fields(defense.Inference))
    return [
        {
            "knob": knob.name,
            "when": "train" if knob.name in space.train else "inference",
            "default": space.defaults[knob.name],
            "domain": spoken(space.flat()[knob.name]),
            "matters where": conditions(space.given.get(knob.name, {})),
            "meaning": knob.metadata["meaning"],
        }
        for knob in declared
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
    from search.classifiers.task import TASKS, find_task, tasks

    found = sorted((find_task(name, data_dir) for name in tasks(data_dir)), key=lambda task: task.name in TASKS)
    return [
        {"task": t.name, **vars(t.shape), "eps": t.eps, "classifier": _layers(t.dataset, t.classifier, data_dir)}
        for t in found
    ]


def _layers(dataset: str, classifier: str, data_dir: str | None) -> str:
    """Return what a classifier is: whose, and its layers before the last, which has a unit for each class."""
    from search.classifiers import own
    from search.classifiers.architectures import ARCHITECTURES, FC, Conv, Drop, Pool, ResNetV2

    if classifier not in ARCHITECTURES:
        about = own.read_about(dataset, classifier, data_dir)
        return f"yours, {about['source']}, {'with its weights' if about['weights_sha256'] else 'trained by searches'}"
    paper, _, letter = classifier.rpartition("-")
    whose = {"": "PuVAE", "defensegan": "Defense-GAN", "advae": "AdvAE"}[paper]
    network = ARCHITECTURES[classifier]
    if isinstance(network, ResNetV2):
        return f"ResNet v2 of {9 * network.n + 2} layers, which AdvAE protects"
    said = []
    for layer in network.layers:
        match layer:
            case Conv(maps, size, stride, _):
                said.append(f"conv {maps} {size}x{size}" + (f" stride {stride}" if stride > 1 else ""))
            case Pool(size):
                said.append(f"max pool {size}x{size}")
            case FC(units):
                said.append(f"dense {units}")
            case Drop(rate):
                said.append(f"dropout {rate:g}")
    return f"{whose}'s {letter}: {', '.join(said)}"


def _tables() -> list[Row]:
    from search.reproduce.listing import rows

    return rows()


def _searches(storage: str) -> list[Row]:

    from search.study.catalog import search_names

    return [{"search": name} for name in search_names(storage)]
