"""Fingerprints: the key of a stored object, which changes when anything that shaped the object changes."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import json
from functools import cache

OURS = ("spaces", "attacks", "defenses", "search")
FOLLOWED = ("attacks", "defenses")
"""Packages whose modules count as part of the module that imports them."""


def fingerprint(**parts: object) -> str:
    """Return 16 hex digits that change when any part changes. The parts must be JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code_digests(*modules: str) -> list[str]:
    """Return a digest of the behaviour of each module, and of each module that they import from `FOLLOWED`, sorted.

    A digest does not depend on comments, docstrings, layout, annotations of arguments and variables, the style of
    imports, or the module's name and place. It changes with any other change of a statement.
    """
    digests, pending = dict[str, str](), list(modules)
    while pending:
        name = pending.pop()
        if name not in digests:
            digests[name], imported = _digest(name)
            pending += [each for each in imported if each.partition(".")[0] in FOLLOWED]
    return sorted(digests.values())


def loaded_digests(*modules: str) -> dict[str, str]:
    """Return the digest of each module, and of each of ours that is loaded with it: imported at the top of files.

    An import inside a function is not followed. In our defenses only `fit` and what it calls import so, since a model
    that answers needs no attacks: a change of an attack that a defense was trained with is no change of the model. An
    export whose model does load more of ours while it answers is refused (search/export/confirm.py).
    """
    digests, pending = dict[str, str](), list(modules)
    while pending:
        name = pending.pop()
        if name not in digests:
            digests[name], _ = _digest(name)
            pending += sorted(_at_the_top(name))
    return dict(sorted(digests.items()))


def _at_the_top(module: str) -> frozenset[str]:
    """Return our own modules that a module imports when it is loaded itself."""
    return frozenset(_Loaded(ast.parse(inspect.getsource(importlib.import_module(module)))).ours)


@cache
def _digest(module: str) -> tuple[str, frozenset[str]]:
    """Return the digest of one module, and our own modules that it imports."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    imports = _Imports(tree)
    canonical = repr(_canonical(_Meaning(imports).visit(tree)))
    return hashlib.sha256(canonical.encode()).hexdigest(), frozenset(imports.ours)


class _Imports(ast.NodeVisitor):
    """What the imported names of a module refer to.

    Attributes:
        ours: imported modules of our own packages.
        names: the replacement of each imported name: for ours, its name where it is defined; for others, the full path.
        paths: the dotted paths that refer to modules of ours.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.ours: set[str] = set()
        self.names: dict[str, str] = {}
        self.paths: set[str] = set()
        self.visit(tree)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.partition(".")[0] in OURS:
                self._module(alias.name, alias.asname or alias.name)
            elif alias.asname:
                self.names[alias.asname] = alias.name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        source = node.module or ""
        for alias in node.names:
            name, local = f"{source}.{alias.name}", alias.asname or alias.name
            if source.partition(".")[0] not in OURS:
                self.names[local] = name
            elif _is_module(name):
                self._module(name, local)
            else:
                self.ours.add(source)
                self.names[local] = alias.name

    def _module(self, name: str, path: str) -> None:
        self.ours.add(name)
        self.paths.add(path)


class _Loaded(_Imports):
    """The imports of a module outside its functions."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Do not look inside."""


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the part before the last dot is not a package
        return False


class _Meaning(ast.NodeTransformer):
    """Removes what does not affect behaviour from a syntax tree, and replaces imported names by what they refer to."""

    def __init__(self, imports: _Imports) -> None:
        self.imports = imports

    def _gone(self, node: ast.AST) -> None:
        return None

    visit_Import = visit_ImportFrom = visit_Pass = _gone

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None  # a docstring, also one of an attribute
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        # Annotations of a class's own fields affect behaviour: a dataclass is built from them.
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        for field in fields:
            field.simple = 2
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.simple == 2:
            return self.generic_visit(node)
        return node.value and self.visit(ast.Assign([node.target], node.value))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.imports.names.get(node.id, node.id)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if _dotted(node.value) in self.imports.paths:
            return ast.Name(node.attr, node.ctx)
        return self.generic_visit(node)


def _dotted(node: ast.expr) -> str:
    """Return a name with its attributes, as `attacks.threat`; empty for any other expression."""
    if isinstance(node, ast.Attribute):
        return (inner := _dotted(node.value)) and f"{inner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _canonical(node: object) -> object:
    """Return a syntax tree as tuples, without parts that are empty or differ between versions of Python."""
    if isinstance(node, ast.AST):
        parts = [(name, value) for name, value in ast.iter_fields(node) if name not in ("ctx", "kind", "type_comment")]
        return type(node).__name__, *((name, _canonical(value)) for name, value in parts if value not in (None, []))
    return [_canonical(each) for each in node] if isinstance(node, list) else node
