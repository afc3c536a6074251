"""The defenses, one file each, found by name; a file added to this folder works everywhere."""

from __future__ import annotations

import importlib
import pkgutil

from defenses.base import Defense
from spaces.exceptions import choose


def names() -> list[str]:
    """Return the names of all defenses, which are their file names; a folder, such as `layers`, is none."""
    return sorted(
        module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg and module.name != "base"
    )


def find(name: str) -> type[Defense]:
    """Return the defense class of a file in this folder.

    Raises:
        InputError: there is no such file.
    """
    module = importlib.import_module(f"defenses.{choose('the defense', name, names())}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Defense) and value.__module__ == module.__name__
    )
    return found
