"""The experiment behind one number of a paper: task, defense, attack, and the true knowledge of the attacker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import defenses
from attacks.catalog import ATTACKS
from attacks.gradient_view import Gradient
from attacks.threat import Knowledge, Norm, ThreatModel
from search.classifiers.architectures import ARCHITECTURES
from search.classifiers.task import TASKS
from search.data.datasets import DATASETS
from search.data.splits import check
from spaces.domain import Scalar
from spaces.exceptions import InputError, choose
from spaces.space import SearchSpace

Measure = Literal["attacked", "clean", "error", "rejection", "reclassified", "fooled", "seconds", "ratio"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The experiment behind one number of a paper, in the terms of this project.

    Args:
        task: the data set and the classifier that the defense is trained with.
        protect: the task whose classifier is attacked; None: that of `task`.
        classifier_recipe, classifier_epochs: how the classifiers are trained, as the fields of a study.
        defense: `none` is the bare classifier.
        knobs: those of the defense whose values in the paper differ from the defaults.
        attack: its name in attacks/catalog.py; None: clean images.
        eps: in pixel units of [0, 1]; None for an attack without a bound.
        knowledge: the true knowledge of the attacker, whatever the paper calls it.
        substitute: the architecture of the black-box attacker's network.
        gradient: the gradient source of a white-box attack, where the paper had one; None: the worst of all per image.
        oracle: the model that a black-box attacker queries: the defended classifier or the bare one.
        every_target: whether a white-box attack is run once for each wrong class as its target; each run counts.
        images: number of test images of the paper's number; None: all.
        limit_s: time limit for a batch of 128, in seconds; the defense does as many gradient steps as fit into it.
        measure: accuracy under attack (`attacked`) or on `clean` images; fraction of the images (attacked if there is
            an attack) that are accepted and wrong (`error`) or rejected (`rejection`); accuracy on the images that
            were rejected and then reclassified (`reclassified`); fraction of fooling images, `images` for each class,
            that are accepted as it (`fooled`); the `seconds` to purify `images`, or their `ratio` to those of the cell
            whose ratio is 1.
        note: why the cell cannot be run here; empty if it can.
    """

    task: str
    protect: str | None = None
    classifier_recipe: Literal["plain", "augmented"] = "plain"
    classifier_epochs: int = 10
    defense: str = "none"
    knobs: Mapping[str, Scalar] = field(default_factory=dict, hash=False)
    attack: str | None = None
    eps: float | None = None
    norm: Norm = "Linf"
    knowledge: Knowledge = "oblivious"
    gradient: Gradient | None = None
    substitute: str | None = None
    oracle: Literal["defended", "bare"] = "defended"
    every_target: bool = False
    images: int | None = None
    limit_s: float | None = None
    measure: Measure = "attacked"
    note: str = ""

    @property
    def attacks(self) -> bool:
        """Whether anything is attacked, be it noise that becomes fooling images."""
        return self.attack is not None or self.measure == "fooled"

    @property
    def targeted(self) -> bool:
        """Whether the attack targets a random wrong class."""
        return self.attack is not None and ATTACKS[self.attack].targeted

    def obstacle(self, data_dir: str | Path | None = None) -> str:
        """Return why this cannot be run on this machine; empty if it can."""
        dataset = self.task.partition("/")[0]
        if self.note or not DATASETS[dataset].origin.closed:
            return self.note
        if check(dataset, data_dir).state == "ready":
            return ""
        why = DATASETS[dataset].origin.closed
        return f"{dataset} is not here and cannot be downloaded, {why}; python launch.py data check {dataset} says more"


def setting(given: Iterable[Mapping[str, Any]]) -> Setting:
    """Return the setting from the fields in `given`, where later ones override earlier ones; knobs are merged.

    Besides the fields of Setting, `dataset` and `classifier` together give the task, and `knobs_of` has knobs by
    defense, of which those of the chosen defense apply. Fields that have no effect are set to their defaults, so that
    equivalent settings are equal.

    Raises:
        InputError: a name or value is invalid.
    """
    merged: dict[str, Any] = {"knobs": {}, "knobs_of": {}}
    for fields in given:
        own = {name: {**merged["knobs_of"].get(name, {}), **more} for name, more in fields.get("knobs_of", {}).items()}
        merged |= {
            **fields,
            "knobs": {**merged["knobs"], **fields.get("knobs", {})},
            "knobs_of": {**merged["knobs_of"], **own},
        }
    dataset, classifier = merged.pop("dataset", None), merged.pop("classifier", None)
    if dataset:
        merged["task"] = f"{dataset}/{classifier}"
    knobs_of = merged.pop("knobs_of")
    merged["knobs"] |= knobs_of.get(merged.get("defense"), {})
    attack = merged.get("attack")
    if attack is None:
        merged |= {"eps": None, "knowledge": "white-box" if merged.get("measure") == "fooled" else "oblivious"}
    elif ATTACKS[choose("an attack", attack, list(ATTACKS))].unbounded:
        merged["eps"] = None
    if merged.get("knowledge") != "white-box":
        merged["gradient"] = None
    if merged.get("knowledge") != "black-box":
        merged |= {"substitute": None, "oracle": "defended"}
    made = Setting(**merged)
    _check(made)
    return made


def _check(setting: Setting) -> None:
    """Check the names and values of a setting.

    Raises:
        InputError: a name or value is invalid.
    """
    for name in filter(None, (setting.task, setting.protect)):
        choose("a task", name, TASKS)
    if setting.substitute:
        choose("a substitute", setting.substitute, list(ARCHITECTURES))
    choose("a measure", setting.measure, get_args(Measure))
    if setting.gradient:
        choose("a gradient", setting.gradient, get_args(Gradient))
    ThreatModel(setting.norm, setting.eps or 0.0, setting.knowledge)
    if setting.defense != "none":
        _fits(setting.defense, tuple(sorted(setting.knobs.items())))
    elif setting.knobs:
        raise InputError(f"the bare classifier has no knobs, but is given {dict(setting.knobs)}")


@cache
def _fits(defense: str, knobs: tuple[tuple[str, Scalar], ...]) -> None:
    SearchSpace.of(defenses.find(defense)).narrow(dict(knobs))
