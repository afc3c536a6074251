"""The looks that were taken at the test split for an export: each is noted in its folder."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from search.final.results import FinalSettings
from search.storage.atomic import write_atomic

OPENED = "final/opened.json"
SAME = ("dataset", "images", "of", "seeds", "code")
"""What makes two looks one: a run that died, or is read again, looks no second time."""

Look = dict[str, Any]


def looks(folder: Path, settings: FinalSettings) -> list[Look]:
    """Return the looks for an export up to the one that is asked for, which comes last and may not be taken yet."""
    path, this = folder / OPENED, {name: getattr(settings, name) for name in SAME}
    taken: list[Look] = json.loads(path.read_text()) if path.exists() else []
    for place, look in enumerate(taken):
        if {name: look[name] for name in SAME} == this:
            return taken[: place + 1]
    return [*taken, this]


def note_opening(folder: Path, settings: FinalSettings) -> list[Look]:
    """Note that the test split is opened for an export, unless it was for the same, and return the looks so far."""
    with FileLock(f"{folder / OPENED}.lock"):  # another run may be at the same export
        found = looks(folder, settings)
        if "when" not in found[-1]:
            found[-1] = {"when": datetime.now(UTC).isoformat(timespec="seconds"), **found[-1]}
            write_atomic(folder / OPENED, json.dumps(found, indent=1).encode())
    return found


def opened_beside(folder: Path) -> list[str]:
    """Return the other exports in the folder of an export for which the test split was opened."""
    return sorted(path.parents[1].name for path in folder.parent.glob(f"*/{OPENED}") if path.parents[1] != folder)
