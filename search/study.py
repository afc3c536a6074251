"""The study: the whole configuration of one search, validated before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

import defenses
import spaces
from attacks.suite import SUITES, Suite
from attacks.threat import ThreatModel
from defenses.base import Defense
from search.classifiers.task import Task, find_task
from search.data import splits
from search.fields import Fields
from search.storage.atomic import write_atomic
from search.storage.mirror import Mirror, mirror_of
from search.storage.uri import local_folder, mask_credentials
from spaces.domain import extremes, finite
from spaces.exceptions import InputError, choose
from spaces.space import SearchSpace

HELD_OUT = 150
"""Validation images that a black-box attacker starts from. Source: Papernot et al. 2017, section 5.1."""


class Study(Fields):
    """One search: its fields, and what they stand for.

    Raises:
        InputError: a field is unknown or outside its law.
    """

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise InputError(_refused(error)[1]) from None

    @property
    def root(self) -> Path:
        """The folder in which this node works: the storage, or the one that stands for a URI here."""
        return local_folder(self.storage)

    @property
    def folder(self) -> Path:
        """Everything a user sees of this search lies here."""
        return self.root / self.name

    @property
    def mirror(self) -> Mirror | None:
        """The search's folder at the storage's URI, if that is one."""
        return mirror_of(self.storage, self.name)

    @property
    def label(self) -> str:
        """The task, and what is protected where that is another classifier."""
        task, protect = (name and find_task(name).name for name in (self.task, self.protect))
        return f"{task} protecting {protect}" if protect else str(task)

    def plan(self) -> Plan:
        """Return what the study's words stand for.

        Raises:
            InputError: a word stands for nothing, or a knob does not fit the defense.
        """
        defense = defenses.find(self.defense)
        task = find_task(self.task)
        protected = task if self.protect is None else find_task(self.protect)
        if protected.dataset != task.dataset:
            raise InputError(f"protect must be a task on {task.dataset}, as {self.task} is, but is {self.protect}")
        wishes = {**spaces.named(self.defense, self.space), **self.knobs}
        if self.epochs is not None and "epochs" in SearchSpace.of(defense).train:
            wishes["epochs"] = self.epochs
        space = SearchSpace.of(defense).narrow(wishes)
        if self.method == "grid":
            next(space.grid())
        suite = SUITES[choose("the suite", self.suite, list(SUITES))]
        sizes = splits.sizes(task.dataset, self.data_dir)
        for name, most in (("train_images", sizes.train), ("eval_images", sizes.validation)):
            asked = getattr(self, name)
            if asked is not None and asked > most:
                raise InputError(f"{name} must be at most {most} on {task.dataset}, but is {asked}")
        free = sizes.validation - (HELD_OUT if self.threat == "black-box" else 0)
        images = min(1000, free) if self.eval_images is None else self.eval_images
        if images > free:
            raise InputError(
                f"eval_images must leave a black-box attacker {HELD_OUT} images, at most {free}, but is {images}"
            )
        substitute = find_task(f"{task.dataset}/{self.substitute or protected.partner}").classifier
        threat = ThreatModel(self.norm, self._eps(suite, task), self.threat)
        within = suite.within(threat)
        return Plan(task, protected.classifier, substitute, defense, space, threat, within, images)

    def _eps(self, suite: Suite, task: Task) -> float:
        if self.eps is not None:
            return self.eps
        if self.norm == "L2":
            raise InputError("eps must be given in L2, where no paper has one for a task, but is not: --eps 1.5, say")
        return task.eps if suite.eps is None else suite.eps

    def write(self) -> Path:
        """Write study.yaml into the search's folder."""
        self.folder.mkdir(exist_ok=True)
        return write_atomic(self.folder / "study.yaml", self.to_yaml().encode())

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


@dataclass(frozen=True)
class Plan:
    """What a study's words stand for.

    Args:
        protected: the architecture that is attacked.
        substitute: that of the black-box attacker's own network.
    """

    task: Task
    protected: str
    substitute: str
    defense: type[Defense]
    space: SearchSpace
    threat: ThreatModel
    suite: Suite
    eval_images: int

    @property
    def epochs(self) -> int:
        """The epochs of the longest training."""
        domain = self.space.train.get("epochs")
        values = () if domain is None else finite(domain) or (domain.high,)  # type: ignore[attr-defined]
        return max((int(value) for value in values), default=1)


def _buildable(defense: type[Defense], space: SearchSpace, task: Task) -> None:
    """Build the defense without memory at one setting, and with each train-time knob in turn at its other values.

    Raises:
        InputError: a setting cannot be built on the task's images.
    """
    usual = {name: space.usual_of(name, domain) for name, domain in space.train.items()}
    turns = [{name: value} for name, domain in space.train.items() for value in extremes(domain)]
    for turn in ({}, *turns):
        with torch.device("meta"):
            built = defense(usual | turn, space.usual(), task.shape)
        for base in built.bases():
            find_task(f"{task.dataset}/{base}")


def make(values: Mapping[str, Any], where: Callable[[str], str] = lambda field: "") -> Study:
    """Return a checked study.

    Args:
        values: fields of Study.
        where: says in which place a field was given, to stand before its error.

    Raises:
        InputError: a field is unknown or outside its law.
    """
    try:
        Fields(**values)
    except ValidationError as error:
        name, law = _refused(error)
        raise InputError(where(name) + law) from None
    return checked(Study(**values))


def checked(study: Study) -> Study:
    """Return a study whose words all stand for something, and whose defense can be built.

    Raises:
        InputError: one does not.
    """
    plan = study.plan()
    _buildable(plan.defense, plan.space, plan.task)  # once: a plan is asked for often
    return study


def read(path: Path, over: Mapping[str, Any] | None = None) -> Study:
    """Read a study from YAML; the fields in `over` win.

    Raises:
        InputError: the file is not there, is not YAML, or has a field that does not fit (with its line).
    """
    over = over or {}
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"a study must be a file that can be read, but {path}: {reason}") from None
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
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
        return make(
            {**values, **over},
            where=lambda name: f"{path}, line {lines[name]}: " if name in lines and name not in over else "",
        )
    except InputError as error:
        raise error if str(error).startswith(str(path)) else InputError(f"{path}: {error}") from None


def _refused(error: ValidationError) -> tuple[str, str]:
    """Return the first field that is refused, an unknown one before others, and why."""
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return name, _unknown(name)
    if first["type"] == "literal_error":
        try:
            choose(name, str(first["input"]), re.findall(r"'([^']*)'", first["ctx"]["expected"]))
        except InputError as error:
            return name, str(error)
    law = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    given = mask_credentials(first["input"])
    return name, f"{name} {law}, but is {given!r}"


def _unknown(name: str) -> str:
    try:
        return choose("a field of a study", name, list(Study.model_fields))
    except InputError as error:
        return str(error)
