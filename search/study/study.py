"""The study: the whole configuration of one search, validated before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml
from pydantic import ValidationError

from search.exceptions import RefusedField
from search.storage.atomic import write_atomic
from search.storage.mirror import Mirror, mirror_of
from search.storage.store import Store
from search.storage.uri import local_folder, mask_credentials
from search.study.fields import Fields
from spaces.exceptions import InputError, choose

if TYPE_CHECKING:
    from search.study.resolved import ResolvedStudy  # imports torch, for which `status` must not wait


class Study(Fields):
    """One search: its fields, and the objects that they refer to.

    Raises:
        InputError: a field is unknown or invalid.
    """

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise RefusedField(*_refusal(error)) from None

    @property
    def root(self) -> Path:
        """The folder in which this node works: the storage, or this node's local folder for a URI."""
        return local_folder(self.storage)

    @property
    def folder(self) -> Path:
        """The folder with everything that a user sees of this search."""
        return self.root / self.name

    @property
    def mirror(self) -> Mirror | None:
        """The search's folder in a remote storage; None if the storage is a local folder."""
        return mirror_of(self.storage, self.name)

    @property
    def store(self) -> Store:
        """The store that all searches of the storage share; no search can have its name."""
        return Store(self.root / ".store", mirror_of(self.storage, ".store"))

    def gpu_share(self, has_gpus: bool) -> float:
        """Return the GPUs of a trial: by default a quarter of one if there are any, else none."""
        return (0.25 if has_gpus else 0.0) if self.gpus_per_trial is None else self.gpus_per_trial

    @property
    def label(self) -> str:
        """The task, and the protected classifier if that is another one."""
        task, protect = (name and self._named(name) for name in (self.task, self.protect))
        return f"{task} protecting {protect}" if protect else str(task)

    def _named(self, task: str) -> str:
        """Return the name of a task that may have been given by another one."""
        if "/puvae-" not in task:
            return task
        from search.classifiers.task import find_task

        return find_task(task, self.data_dir).name

    @cached_property
    def resolved(self) -> ResolvedStudy:
        """The objects that the study's names refer to, looked up once.

        Raises:
            InputError: a name is unknown, or a knob does not fit the defense.
        """
        from search.study.resolved import resolve

        return resolve(self)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a study with other fields, to be resolved again: a data set fetched meanwhile may have other sizes."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("resolved", None)
        return copied

    def __getstate__(self) -> dict[Any, Any]:
        """Exclude the resolved objects from the pickle: a worker resolves them on its own machine."""
        state = super().__getstate__()
        return {**state, "__dict__": {name: v for name, v in state["__dict__"].items() if name != "resolved"}}

    def write(self) -> Path:
        """Write study.yaml into the search's folder."""
        self.folder.mkdir(exist_ok=True)
        return write_atomic(self.folder / "study.yaml", self.to_yaml().encode())

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def _refusal(error: ValidationError) -> tuple[str, str]:
    """Return the first invalid field, unknown fields before others, and the reason."""
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return name, _unknown(name)
    if first["type"] == "literal_error":
        try:
            choose(name, str(first["input"]), re.findall(r"'([^']*)'", first["ctx"]["expected"]))
        except InputError as error:
            return name, str(error)
    if len(first["loc"]) > 1:  # pydantic's own words are about one type of several
        knob, is_key = first["loc"][1], first["loc"][-1] == "[key]"
        forms = "a name" if is_key else "one value, a grid [V1, V2] or a range LOW..HIGH or LOW..HIGH:log"
        return name, f"{name}: {knob} must be {forms}, but is {first['input']!r}"
    law = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    law = law.replace("a valid boolean, unable to interpret input", "true or false")
    given = mask_credentials(first["input"])
    return name, f"{name} {law}, but is {given!r}"


def _unknown(name: str) -> str:
    try:
        return choose("a field of a study", name, list(Study.model_fields))
    except InputError as error:
        return str(error)
