"""The hyperparameter search: studies, tasks, the store, trials, Optuna, Ray, W&B, reports and exports.

In a notebook, from the repository root: `from search import Study, search, candidates, front, load` (docs/tour.md).
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

# Threads that spin while waiting make parallel runs many times slower. OpenMP reads this when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    Path.home()
except RuntimeError:  # a uid without an entry in passwd; Ray and wandb fail where a ~ stands for nothing
    os.environ["HOME"] = "/nonexistent"

HOMES = {
    "Study": "study.study",
    "search": "api",
    "candidates": "api",
    "front": "api",
    "load": "export.loader",
    "audit": "auditing.run",
    "ThreatModel": "auditing.run",
}
"""The module of each public name; modules are imported on first use, because loading an export needs few of them."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
