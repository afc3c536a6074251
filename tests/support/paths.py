"""Where the repository lies, and a folder that hides it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def hiding(folder: Path) -> Path:
    """Return a user's folder that has names of our packages."""
    for name in ("attacks/__init__.py", "search/__init__.py", "defenses.py", "spaces.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("raise RuntimeError('this is not what was asked for')\n")
    return folder
