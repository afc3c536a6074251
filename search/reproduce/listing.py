"""The listing of the papers' tables, with what each costs at its full size, counted without running it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import defenses
from search.classifiers.architectures import PARTNERS
from search.data import splits
from search.data.datasets import DATASETS
from search.reproduce.cell_setting import Setting
from search.reproduce.cells import UNTAUGHT, wanted
from search.reproduce.paper_tables import tables


def rows(data_dir: str | Path | None = None) -> list[dict[str, Any]]:
    """Return the listing of tables: what each covers, what of it can be run on this machine, and what that costs."""
    listed = []
    for one in tables():
        obstacles = [cell.setting.obstacle(data_dir) for cell in one.cells]
        runs = [cell.setting for cell, why in zip(one.cells, obstacles, strict=True) if not why]
        listed.append(
            {
                "table": one.name,
                "source": one.source,
                "title": one.title,
                "threat": one.threat,
                "cells": len(one.cells),
                "runs": len(runs),
                **cost(runs, data_dir),
                "not run": "; ".join(dict.fromkeys(filter(None, obstacles))),
            }
        )
    return listed


def cost(settings: Iterable[Setting], data_dir: str | Path | None = None) -> dict[str, int]:
    """Return how many classifiers and defenses are trained, for how many epochs, and how many images are attacked.

    What several cells share counts once, as it is stored. The epochs of different defenses take different times:
    `reproduce` times a step of each and says how long all take.
    """
    classifiers: dict[tuple[str, str, str], int] = {}
    fits: dict[tuple[object, ...], int] = {}
    attacked: dict[Setting, int] = {}
    for setting in settings:
        dataset = setting.task.partition("/")[0]
        free = splits.sizes(dataset, data_dir).attackable(setting.knowledge)
        if setting.measure in ("seconds", "ratio"):  # untrained networks are timed
            continue
        for architecture in _classifiers(setting):
            classifiers[dataset, architecture, setting.classifier_recipe] = setting.classifier_epochs
        if setting.defense != "none":
            train = wanted(setting).train
            taught = "" if setting.defense in UNTAUGHT else setting.task
            fits[setting.defense, dataset, taught, *sorted(train.items())] = int(train.get("epochs", 1))
        if setting.attacks:
            classes = DATASETS[dataset].shape.classes
            each = classes if setting.measure == "fooled" else classes - 1 if setting.every_target else 1
            attacked[setting] = each * min(setting.images or free, free)
    return {
        "trainings": len(classifiers) + len(fits),
        "epochs": sum(classifiers.values()) + sum(fits.values()),
        "attacked images": sum(attacked.values()),
    }


def _classifiers(setting: Setting) -> set[str]:
    """Return the architectures of the classifiers that a cell needs."""
    own = setting.task.partition("/")[2]
    found = {own, (setting.protect or setting.task).partition("/")[2]}
    if setting.defense == "none":
        return found
    if defenses.find(setting.defense).consults == "partner":
        found.add(PARTNERS[own])
    bases = str(setting.knobs.get("bases", "task"))
    return found | (set() if bases == "task" else set(bases.split("+")))
