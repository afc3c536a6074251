"""What stands in, while an export is loaded, for libraries that are not installed and that a trained model never uses.

A defense's file declares its knobs in Optuna's distributions, and names the attacks that it is trained against. Neither
is called once the knobs have their values and the weights theirs.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DISPENSABLE = ("numpy", "optuna", "scipy", "torchattacks")
INERT = "optuna"
"""Of whose classes there are objects already where a module declares its knobs."""


class _Anything(type):
    """The type of what stands for a name of a library: a class, which may be extended and holds any other name."""

    def __getattr__(cls, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _anything(f"{cls.__module__}.{cls.__name__}", name)

    def __call__(cls, *args: Any, **options: Any) -> Any:
        roots = {kind.__module__.partition(".")[0] for kind in cls.__mro__}
        if lacking := sorted(roots & set(DISPENSABLE) - {INERT}):
            raise ImportError(f"{cls.__name__} is needed for this, but {', '.join(lacking)} is not installed")
        return super().__call__()


def _anything(module: str, name: str) -> _Anything:
    return _Anything(name, (), {"__module__": module})


class _StandIns(MetaPathFinder, Loader):
    """Finds libraries that are not there: modules of which any name is a class.

    Args:
        roots: their top-level packages.
    """

    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = roots

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        known = fullname.partition(".")[0] in self.roots
        return ModuleSpec(fullname, self, is_package=True) if known else None

    def exec_module(self, module: ModuleType) -> None:
        def stand_in(name: str) -> _Anything:
            if name.startswith("__"):
                raise AttributeError(name)
            return _anything(module.__name__, name)

        module.__dict__["__getattr__"] = stand_in


@contextmanager
def dispensed() -> Iterator[None]:
    """Import what declares knobs and names attacks, whether or not the libraries for that are installed."""
    roots = [root for root in DISPENSABLE if not _installed(root)]
    finder, barred = _StandIns(roots), dict[str, Any]()
    for name in [name for name in sys.modules if name.partition(".")[0] in roots]:
        barred[name] = sys.modules.pop(name)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in roots]:
            del sys.modules[name]
        sys.modules.update(barred)


def _installed(root: str) -> bool:
    try:
        return importlib.util.find_spec(root) is not None
    except (ImportError, ValueError):  # what forbids an import may raise, or leave a module without a spec
        return False
