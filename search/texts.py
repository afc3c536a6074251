"""The source of what shapes a stored thing: a part of its fingerprint."""

from __future__ import annotations

import inspect
import sys
from functools import cache


@cache
def texts(*modules: str) -> list[str]:
    """Return the source of modules and, of the defenses and attacks, of those from which they take anything."""
    found, left = set[str](), list(modules)
    while left:
        name = left.pop()
        if name not in found and (name in modules or name.partition(".")[0] in ("defenses", "attacks")):
            found.add(name)
            taken = vars(sys.modules[name]).values()
            left += [str(getattr(v, "__name__" if inspect.ismodule(v) else "__module__", "")) for v in taken]
    return [inspect.getsource(sys.modules[name]) for name in sorted(found)]
