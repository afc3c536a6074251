"""The study: the whole configuration of one search, validated before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import defenses
import spaces
from attacks.suite import SUITES, Suite
from attacks.threat import Knowledge, Norm, ThreatModel
from defenses.base import Defense
from search import remote, tasks
from search.store import write_atomic
from search.tasks import Task
from search.tasks import task as find_task
from spaces.space import InputError, Scalar, SearchSpace, choose, extremes, finite

Method = Literal["tpe", "nsga2", "gp", "random", "qmc", "grid"]
HELD_OUT = 150
"""Validation images that a black-box attacker starts from. Source: Papernot et al. 2017, section 5.1."""
KnobWish = Scalar | list[Scalar]


class Study(BaseModel):
    """One search. Each field is a flag of `launch.py search` and a key of its YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("search", description="the search's name: its folder in the storage")
    defense: str = Field("puvae", description="a defense (list defenses)")
    task: str = Field("mnist/A", description="a data set and the classifier to protect (list tasks)")
    space: str = Field("default", description="a named search space of the defense (list spaces)")
    knobs: dict[str, KnobWish] = Field(
        {},
        description="knobs beside the space's: NAME=VALUE fixes one, NAME=V1,V2 is a grid, "
        "NAME=LOW..HIGH or LOW..HIGH:log a range",
    )
    method: Method = Field("tpe", description="how Optuna proposes")
    trials: int = Field(40, ge=1, description="trainings at most")
    threat: Knowledge = Field("white-box", description="what the attacker knows")
    norm: Norm = Field("Linf", description="the norm of the perturbation")
    eps: float | None = Field(
        None, ge=0, description="its bound, in pixel units of [0, 1]; else the suite's paper's, or the task's in Linf"
    )
    substitute: str | None = Field(
        None,
        description="the black-box attacker's architecture (list tasks); else the protected one's partner",
    )
    suite: str = Field("search", description="the attacks that score a candidate (list attacks)")
    max_latency_ms: float | None = Field(
        None, gt=0, description="constraint: p50 of purifying a batch of 128, in milliseconds"
    )
    min_clean_accuracy: float | None = Field(
        None, ge=0, le=1, description="constraint: least accuracy on clean images, a fraction"
    )
    max_clean_rejection: float = Field(
        0.05, ge=0, le=1, description="constraint: most clean images that may be rejected, a fraction"
    )
    protect: str | None = Field(
        None, description="the task whose classifier is attacked, where it is not the one trained with: mnist/C"
    )
    train_images: int | None = Field(None, ge=1, description="training images; else all")
    eval_images: int | None = Field(
        None, ge=1, description="validation images that are attacked; else 1000, or all where there are fewer"
    )
    cheap_images: int = Field(128, ge=1, description="of them, those that score a training after each epoch")
    epochs: int | None = Field(None, ge=1, description="epochs of a training; else the defense's own")
    classifier_epochs: int = Field(10, ge=1, description="epochs of the protected classifier and of its partner")
    stopping: Literal["halving", "median", "none"] = Field(
        "halving", description="the rule that stops trainings early, on their rung scores"
    )
    grace: int | None = Field(None, ge=1, description="epochs before a training may be stopped; else half of all")
    halving: float = Field(3.0, gt=1, description="of those that reach a rung one in so many goes on")
    patience: int = Field(8, ge=0, description="trainings that reach a rung before any is stopped there")
    refine: int = Field(
        24, ge=0, description="settings tried at the end on the best fits, where inference knobs are continuous"
    )
    warm_start: str | None = Field(None, description="a search of the storage, or an export's folder, to begin from")
    trial_timeout: float | None = Field(
        None, gt=0, description="seconds of work after which a trial is given up (not with --debug); else never"
    )
    gpus_per_trial: float | None = Field(None, ge=0, description="a fraction shares one; else 0.25 where there is one")
    cpus_per_trial: float = Field(1.0, gt=0, description="CPU cores of a trial")
    concurrent: int | None = Field(None, ge=1, description="trials at once; else what the cluster holds")
    address: str | None = Field(None, description="a Ray cluster: auto or HOST:PORT; else a local one")
    storage: str = Field(
        "runs", validate_default=True, description="the folder or URI that holds searches and the store they share"
    )
    data_dir: str | None = Field(None, description="the data cache; else $CRUCIBLE_DATA or ~/.cache/crucible")
    wandb: Literal["online", "offline", "disabled"] | None = Field(
        None, description="Weights & Biases; else online where a key is found"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of everything")

    @property
    def root(self) -> Path:
        """The folder in which this node works: the storage, or the one that stands for a URI here."""
        return remote.local(self.storage)

    @property
    def folder(self) -> Path:
        """Everything a user sees of this search lies here."""
        return self.root / self.name

    @property
    def mirror(self) -> remote.Mirror | None:
        """The search's folder at the storage's URI, if that is one."""
        return remote.mirror(self.storage, self.name)

    @property
    def label(self) -> str:
        """The task, and what is protected where that is another classifier."""
        task, protect = (name and find_task(name).name for name in (self.task, self.protect))
        return f"{task} protecting {protect}" if protect else str(task)

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
            raise ValueError("must be letters, digits, '.', '_' and '-', and no path")
        return name

    @field_validator("eps", mode="before")
    @classmethod
    def _may_be_a_fraction(cls, eps: object) -> object:
        return as_written(eps)

    @field_validator("data_dir")
    @classmethod
    def _is_absolute(cls, data_dir: str | None) -> str | None:
        return None if data_dir is None else str(Path(data_dir).expanduser().resolve())

    @field_validator("storage")
    @classmethod
    def _is_a_folder(cls, storage: str) -> str:
        return remote.checked(storage)  # workers have working directories of their own

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
        sizes = tasks.sizes(task.dataset, self.data_dir)
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


def as_written(eps: object) -> object:
    """Take 8/255 as it is written in papers."""
    try:
        return float(Fraction(eps)) if isinstance(eps, str) else eps
    except (ValueError, ZeroDivisionError):
        return eps


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
    for name in values:
        if name not in Study.model_fields:
            raise InputError(where(name) + _unknown(name))
    try:
        study = Study(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        law = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        raise InputError(f"{where(name)}{name} {law}, but is {values[name]!r}") from None
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


def _unknown(name: str) -> str:
    try:
        return choose("a field of a study", name, list(Study.model_fields))
    except InputError as error:
        return str(error)
