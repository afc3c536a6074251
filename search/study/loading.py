"""Create a study from a user's values or a file, and check it before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from search.exceptions import RefusedField
from search.study.study import Study
from spaces.domain import extremes
from spaces.exceptions import InputError

EARLIER: Mapping[str, Any] = {"precision": "float32", "scoring": "all"}
"""What the fields were that stored studies of an earlier version lack."""

FROM_YAML = (RecursionError, ValueError, LookupError, TypeError, AttributeError, OverflowError)
"""What PyYAML raises, besides its own errors, for a value that is not of the type its tag says, or too deep."""


def make_study(
    values: Mapping[str, Any], where: Callable[[str], str] = lambda field: "", *, checked: bool = True
) -> Study:
    """Return a checked study.

    Args:
        values: fields of Study.
        where: returns where a field was given, as a prefix for its error.
        checked: check its names too.

    Raises:
        InputError: a field is unknown or invalid.
    """
    try:
        study = Study(**values)
    except RefusedField as error:
        raise InputError(where(error.field) + str(error)) from None
    return check_study(study) if checked else study


def check_study(study: Study) -> Study:
    """Return the study after checking that all its names exist and that its defense can be built.

    Raises:
        InputError: a check fails.
    """
    _see_buildable(study)
    return study


def read_study(
    path: Path, over: Mapping[str, Any] | None = None, *, stored: bool = False, checked: bool = True
) -> Study:
    """Read a study from YAML; the fields in `over` take precedence.

    Args:
        stored: it is the study of a search that has begun, perhaps of an earlier version.
        checked: see that its names exist and its defense can be built, for which torch is imported.

    Raises:
        InputError: the file is missing, is not YAML, or has an invalid field (the message gives its line).
    """
    over = over or {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"a study must be a file that can be read, but {path}: {reason}") from None
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, *FROM_YAML) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}{line}: a study must be YAML, but {reason}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a study must be fields with values, but is {type(values).__name__}")
    lines: dict[str, int] = {}
    for key, _ in tree.value if tree else ():
        if key.value in lines:
            raise InputError(
                f"{path}, line {key.start_mark.line + 1}: a field must stand once, but {key.value} came before"
            )
        lines[key.value] = key.start_mark.line + 1
    values = {str(name): value for name, value in values.items()}
    if isinstance(values.get("knobs"), dict) and "knobs" in over:
        over = {**over, "knobs": {**values["knobs"], **over["knobs"]}}
    try:
        return make_study(
            {**(EARLIER if stored else {}), **values, **over},
            where=lambda name: f"{path}, line {lines[name]}: " if name in lines and name not in over else "",
            checked=checked,
        )
    except InputError as error:
        raise error if str(error).startswith(str(path)) else InputError(f"{path}: {error}") from None


def _see_buildable(study: Study) -> None:
    """Build the defense on the meta device at one setting, and with each train-time knob in turn at its extremes.

    Raises:
        InputError: a setting cannot be built for the task's images.
    """
    import torch

    resolved = study.resolved
    defense, space, task = resolved.defense, resolved.space, resolved.task
    usual = {name: space.usual_of(name, domain) for name, domain in space.train.items()}
    turns = [{name: value} for name, domain in space.train.items() for value in extremes(domain)]
    for turn in ({}, *turns):
        with torch.device("meta"):
            built = defense(usual | turn, space.usual(), task.shape)
        for base in built.bases():
            task.beside(base)
