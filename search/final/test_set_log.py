"""Logs each opening of the test split for an export in the folder of the export."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from search.data.folders import lock
from search.final.results import FinalSettings
from search.storage.atomic import write_atomic

OPENED = "final/opened.json"
SAME = ("dataset", "images", "of", "seeds", "code")
"""Settings that identify an opening: a run with the same settings continues or repeats it, and is not logged again."""

Look = dict[str, Any]


def looks(folder: Path, settings: FinalSettings) -> list[Look]:
    """Return the openings for an export up to the one with these settings, which may not have happened yet."""
    path, this = folder / OPENED, {name: getattr(settings, name) for name in SAME}
    taken: list[Look] = json.loads(path.read_bytes()) if path.exists() else []
    for place, look in enumerate(taken):
        if {name: look[name] for name in SAME} == this:
            return taken[: place + 1]
    return [*taken, this]


def note_opening(folder: Path, settings: FinalSettings) -> list[Look]:
    """Log that the test split is opened for an export, unless already logged, and return the openings so far."""
    with lock(folder / f"{OPENED}.lock"):  # another run may use the same export
        found = looks(folder, settings)
        if "when" not in found[-1]:
            found[-1] = {"when": datetime.now(UTC).isoformat(timespec="seconds"), **found[-1]}
            write_atomic(folder / OPENED, json.dumps(found, indent=1).encode())
    return found


def opened_beside(folder: Path) -> list[str]:
    """Return the other exports in the same parent folder for which the test split was opened."""
    return sorted(path.parents[1].name for path in folder.parent.glob(f"*/{OPENED}") if path.parents[1] != folder)
