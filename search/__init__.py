"""The search: studies, tasks, the store, trials, Optuna, Ray, W&B, reports and exports.

In a notebook, from the repository's root: `from search import Study, search, candidates, front, load` (docs/tour.md).
"""

from __future__ import annotations

import importlib
import os
from typing import Any

# Threads that spin while they wait make runs beside each other many times slower. OpenMP reads it when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

HOMES = {
    "Study": "study.study",
    "search": "api",
    "candidates": "api",
    "front": "api",
    "load": "export.loader",
}
"""The modules of what the package offers: none is imported before it is asked for, as loading needs few of them."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
