"""What was done for one number of a paper, in our words: task, defense, attack, and what the attacker truly sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import defenses
from attacks.catalog import ATTACKS
from attacks.threat import Knowledge, Norm, ThreatModel
from search.classifiers.architectures import ARCHITECTURES
from search.classifiers.task import TASKS
from search.data.datasets import DATASETS
from search.data.splits import check
from spaces.domain import Scalar
from spaces.exceptions import InputError, choose
from spaces.space import SearchSpace

Measure = Literal["attacked", "clean", "error", "rejection", "reclassified", "seconds", "ratio"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What was done for one number of a paper, in our words.

    Args:
        task: the data set and the classifier that the defense is trained with.
        protect: the task whose classifier is attacked, where that is another one.
        defense: `none` is the bare classifier.
        knobs: of the defense, where the paper's are not its defaults.
        attack: by its name in attacks/suites.py; None: clean images.
        eps: in pixel units of [0, 1]; None where the attack keeps to none.
        knowledge: what the attacker truly sees, whatever the paper calls it.
        substitute: the architecture of the black-box attacker's own network.
        oracle: whom that attacker asks for classes: the defended classifier, or the bare one.
        images: of the test split that the number is of; None: all.
        limit_s: the defense may take so many seconds for a batch of 128, and descends as far as it gets in them.
        measure: accuracy under attack (`attacked`) or on `clean` images; share of the images, attacked where there is
            an attack, that are accepted and wrong (`error`) or rejected (`rejection`); accuracy on those that were
            rejected and then searched (`reclassified`); `seconds` that purifying `images` takes, or their `ratio` to
            those of the cell that is 1.
        note: why it cannot be run here; empty where it can.
    """

    task: str
    protect: str | None = None
    defense: str = "none"
    knobs: Mapping[str, Scalar] = field(default_factory=dict, hash=False)
    attack: str | None = None
    eps: float | None = None
    norm: Norm = "Linf"
    knowledge: Knowledge = "oblivious"
    substitute: str | None = None
    oracle: Literal["defended", "bare"] = "defended"
    images: int | None = None
    limit_s: float | None = None
    measure: Measure = "attacked"
    note: str = ""

    @property
    def targeted(self) -> bool:
        """Whether the attack aims at a random wrong class."""
        return self.attack is not None and ATTACKS[self.attack].targeted

    def obstacle(self, data_dir: str | Path | None = None) -> str:
        """Say why this cannot be run on this machine; empty where it can."""
        dataset = self.task.partition("/")[0]
        if self.note or not DATASETS[dataset].origin.closed:
            return self.note
        if check(dataset, data_dir).state == "ready":
            return ""
        why = DATASETS[dataset].origin.closed
        return f"{dataset} is not here and cannot be downloaded, {why}; python launch.py data check {dataset} says more"


def setting(given: Iterable[Mapping[str, Any]]) -> Setting:
    """Return the setting that the fields in each of `given` make, the later over the earlier; knobs are put together.

    Beside the fields of a Setting there may be `dataset` and `classifier`, which make its task, and `knobs_of`: knobs
    by defense, of which those of the one in use are taken. What no attack looks at takes its default, so that
    settings that are the same are equal.

    Raises:
        InputError: a word stands for nothing.
    """
    merged: dict[str, Any] = {"knobs": {}, "knobs_of": {}}
    for fields in given:
        merged |= {**fields, **{name: {**merged[name], **fields.get(name, {})} for name in ("knobs", "knobs_of")}}
    dataset, classifier = merged.pop("dataset", None), merged.pop("classifier", None)
    if dataset:
        merged["task"] = f"{dataset}/{classifier}"
    knobs_of = merged.pop("knobs_of")
    merged["knobs"] |= knobs_of.get(merged.get("defense"), {})
    attack = merged.get("attack")
    if attack is None:
        merged |= {"eps": None, "knowledge": "oblivious"}
    elif ATTACKS[choose("an attack", attack, list(ATTACKS))].unbounded:
        merged["eps"] = None
    if merged.get("knowledge") != "black-box":
        merged |= {"substitute": None, "oracle": "defended"}
    made = Setting(**merged)
    _check(made)
    return made


def _check(setting: Setting) -> None:
    """Refuse a setting whose words stand for nothing.

    Raises:
        InputError: one does.
    """
    for name in filter(None, (setting.task, setting.protect)):
        choose("a task", name, TASKS)
    if setting.substitute:
        choose("a substitute", setting.substitute, list(ARCHITECTURES))
    choose("a measure", setting.measure, get_args(Measure))
    ThreatModel(setting.norm, setting.eps or 0.0, setting.knowledge)
    if setting.defense != "none":
        _fits(setting.defense, tuple(sorted(setting.knobs.items())))
    elif setting.knobs:
        raise InputError(f"the bare classifier has no knobs, but is given {dict(setting.knobs)}")


@cache
def _fits(defense: str, knobs: tuple[tuple[str, Scalar], ...]) -> None:
    SearchSpace.of(defenses.find(defense)).narrow(dict(knobs))
