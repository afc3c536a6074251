"""Audit check 13, `unpatched`: what measures is the code of its files.

A model's code runs in the process that attacks it, and could put weaker attacks in the place of ours, or another
operation in that of one of torch's. What undoes this before it is looked for is not seen.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torchattacks
from torch.nn import functional

import attacks
from attacks.audit.gate import Gate, at_most
from attacks.installed import LIBRARY, PACKAGES

ROOT = Path(attacks.__file__).parents[1]
OURS = tuple(str(ROOT / room) for room in ("spaces", "attacks", "search"))
"""Not `defenses`: there lies the code of who is judged."""
INSTALLED = *LIBRARY, *PACKAGES
TOOLS: tuple[Any, ...] = (torch, torch.Tensor, torch.autograd, functional, torch.nn.Module, torchattacks.PGD)
"""What attacks compute with, besides our own code."""
GENERATED = "__init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__", "__replace__"
"""Methods that a dataclass writes itself."""


def unpatched() -> Gate:
    """Check 13: attacks and torch are what their files say."""
    found = [*_of_attacks(), *_of_tools()]
    said = f", but {', '.join(found[:3])} {'is' if len(found) == 1 else 'are'} not" if found else ""
    law = f"the functions and limits of our attacks, and those of torch, are the ones in their files{said}"
    return at_most(13, "unpatched", law, len(found), 0.0)


def _of_attacks() -> Iterator[str]:
    """Yield what is another than in the file of its module: functions, methods, and numbers and words."""
    modules = [module for name, module in sorted(sys.modules.items()) if name.partition(".")[0] == attacks.__name__]
    for module in modules:
        if module.__file__ is None:
            continue
        for name, value in _constants(Path(module.__file__)).items():
            if repr(vars(module).get(name)) != repr(value):
                yield f"{module.__name__}.{name}"
        for name, value in list(vars(module).items()):
            if not isinstance(value, type) or value.__module__ == module.__name__:
                yield from (f"{module.__name__}.{one}" for one in _foreign(name, value))


def _of_tools() -> Iterator[str]:
    for tool in TOOLS:
        for name, value in list(vars(tool).items()):
            if not isinstance(value, type | ModuleType) and next(_foreign(name, value), None):
                yield f"{tool.__name__}.{name}"


def _foreign(name: str, value: object, of: type | None = None) -> Iterator[str]:
    """Yield the name of a value, or those of a class's methods, if neither we nor an installed package define it."""
    if isinstance(value, type) and value.__module__.partition(".")[0] == attacks.__name__ and of is None:
        for one, method in list(vars(value).items()):
            yield from (f"{name}.{each}" for each in _foreign(one, method, value))
        return
    value = getattr(value, "__func__", value)
    value = value.fget if isinstance(value, property) else value
    while isinstance(value, FunctionType):
        generated = name in GENERATED and hasattr(of, "__dataclass_fields__")
        if not (generated or _known(value.__code__)):
            yield name
        value = getattr(value, "__wrapped__", None)
    file = getattr(sys.modules.get(type(value).__module__), "__file__", None)
    if callable(value) and not isinstance(value, type) and file and not file.startswith((*INSTALLED, *OURS)):
        yield name


def _known(code: CodeType) -> bool:
    """Return whether a function is one of a file of ours, as it is there, or lies in an installed package."""
    file = code.co_filename
    if file.startswith(OURS) and not file.startswith(INSTALLED):
        return code in _codes(Path(file))
    return file.startswith((*INSTALLED, "<frozen "))


@cache
def _codes(file: Path) -> frozenset[CodeType]:
    """Return the code of all functions in a file."""

    def inside(code: CodeType) -> Iterator[CodeType]:
        for part in code.co_consts:
            if isinstance(part, CodeType):
                yield part
                yield from inside(part)

    return frozenset(inside(compile(file.read_bytes(), file, "exec", dont_inherit=True)))


@cache
def _constants(file: Path) -> dict[str, object]:
    """Return the numbers, words and tuples of these that a file gives names."""
    found = dict[str, object]()
    for line in ast.parse(file.read_bytes()).body:
        if isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name):
            try:
                found[line.targets[0].id] = ast.literal_eval(line.value)
            except ValueError:
                continue
    return found
