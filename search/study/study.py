"""The study: the whole configuration of one search, validated before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError

import defenses
import spaces
from attacks.suites import SUITES, Suite
from attacks.threat import ThreatModel
from defenses.base import Defense
from search.classifiers.task import Task, find_task
from search.data import splits
from search.data.guard import closed
from search.exceptions import RefusedField
from search.storage.atomic import write_atomic
from search.storage.mirror import Mirror, mirror_of
from search.storage.store import Store
from search.storage.uri import local_folder, mask_credentials
from search.study.fields import Fields
from spaces.domain import finite
from spaces.exceptions import InputError, choose
from spaces.space import SearchSpace


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
        task, protect = (name and find_task(name, self.data_dir).name for name in (self.task, self.protect))
        return f"{task} protecting {protect}" if protect else str(task)

    @cached_property
    def resolved(self) -> ResolvedStudy:
        """The objects that the study's names refer to, looked up once.

        Raises:
            InputError: a name is unknown, or a knob does not fit the defense.
        """
        task = find_task(self.task, self.data_dir)
        sizes = splits.sizes(task.dataset, self.data_dir)
        with closed("imported"):
            defense, wishes = defenses.find(self.defense), {**spaces.named(self.defense, self.space), **self.knobs}
        protected = task if self.protect is None else find_task(self.protect, self.data_dir)
        if protected.dataset != task.dataset:
            raise InputError(f"protect must be a task on {task.dataset}, as {self.task} is, but is {self.protect}")
        if self.epochs is not None and "epochs" in SearchSpace.of(defense).train:
            wishes["epochs"] = self.epochs
        space = SearchSpace.of(defense).narrow(wishes)
        if self.method == "grid":
            next(space.grid())
        suite = SUITES[choose("the suite", self.suite, list(SUITES))]
        free = sizes.attackable(self.threat)
        kept = f", as {sizes.validation - free} of the validation images are kept from it"
        for name, most, why in (("train_images", sizes.train, ""), ("eval_images", free, kept)):
            asked = getattr(self, name)
            if asked is not None and asked > most:
                raise InputError(f"{name} must be at most {most} on {task.dataset}{why}, but is {asked}")
        images = min(1000, free) if self.eval_images is None else self.eval_images
        if self.partner is not None and defense.consults != "partner":
            law = "partner must be left out where the defense is trained with the attacked classifier itself"
            raise InputError(f"{law}, as {self.defense} is, but is {self.partner}")
        partner, substitute = self.partner or task.partner, self.substitute or protected.partner
        partner, substitute = (task.beside(name).classifier for name in (partner, substitute))
        threat = ThreatModel(self.norm, self._eps(suite, task), self.threat)
        within = suite.within(threat)
        return ResolvedStudy(task, protected.classifier, partner, substitute, defense, space, threat, within, images)

    def _eps(self, suite: Suite, task: Task) -> float:
        if self.eps is not None:
            return self.eps
        if self.norm == "L2":
            raise InputError("eps must be given in L2, where no paper has one for a task, but is not: --eps 1.5, say")
        return task.eps if suite.eps is None else suite.eps

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


@dataclass(frozen=True)
class ResolvedStudy:
    """The objects that a study's names refer to.

    Args:
        protected: the classifier that is attacked.
        partner: PuVAE's source classifier.
        substitute: the architecture of the black-box attacker's own network.
    """

    task: Task
    protected: str
    partner: str
    substitute: str
    defense: type[Defense]
    space: SearchSpace
    threat: ThreatModel
    suite: Suite
    eval_images: int

    @property
    def epochs(self) -> int:
        """The number of epochs of the longest training."""
        domain = self.space.train.get("epochs")
        values = () if domain is None else finite(domain) or (domain.high,)  # type: ignore[attr-defined]
        return max((int(value) for value in values), default=1)


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
    law = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    law = law.replace("a valid boolean, unable to interpret input", "true or false")
    given = mask_credentials(first["input"])
    return name, f"{name} {law}, but is {given!r}"


def _unknown(name: str) -> str:
    try:
        return choose("a field of a study", name, list(Study.model_fields))
    except InputError as error:
        return str(error)
