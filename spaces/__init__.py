"""Search spaces: knobs, settings and the named spaces, one file per defense."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from spaces.domain import Domain, Scalar
from spaces.exceptions import choose


def names(defense: str) -> list[str]:
    """Return the names of a defense's named spaces, in lower case; empty if it has no file here."""
    found = vars(_module(defense)) if defense in _files() else {}
    return [name.lower() for name, value in found.items() if name.isupper() and isinstance(value, dict)]


def named(defense: str, space: str) -> Mapping[str, Domain]:
    """Return a named space; a defense without a file only has `default`, with nothing to search.

    Raises:
        InputError: the defense has no space of this name.
    """
    choose(f"the space of {defense}", space, names(defense) or ["default"])
    found: dict[str, Domain] = getattr(_module(defense), space.upper()) if defense in _files() else {}
    return found


def starts(defense: str) -> tuple[Mapping[str, Scalar], ...]:
    """Return the settings that a search tries first if its space contains them."""
    return getattr(_module(defense), "STARTS", ()) if defense in _files() else ()


def _files() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name not in ("domain", "space")]


def _module(defense: str) -> Any:
    return importlib.import_module(f"spaces.{defense}")
