"""The objects that a study's names refer to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import defenses
import spaces
from attacks.suites import SUITES, Suite
from attacks.threat import ThreatModel
from defenses.base import Defense
from search.classifiers.task import Task, find_task
from search.data import splits
from search.data.guard import closed
from search.data.splits import FEW
from search.formatting import of_255
from search.study.fields import spelt
from search.study.study import Study
from spaces.domain import finite
from spaces.exceptions import InputError, choose
from spaces.space import SearchSpace


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


def resolve(study: Study) -> ResolvedStudy:
    """Look up what a study's names refer to.

    Raises:
        InputError: a name is unknown, or a knob does not fit the defense.
    """
    task = find_task(study.task, study.data_dir)
    sizes = splits.sizes(task.dataset, study.data_dir)
    with closed("imported"):
        defense, wishes = defenses.find(study.defense), {**spaces.named(study.defense, study.space), **study.knobs}
    protected = task if study.protect is None else find_task(study.protect, study.data_dir)
    if protected.dataset != task.dataset:
        raise InputError(f"protect must be a task on {task.dataset}, as {study.task} is, but is {study.protect}")
    if study.epochs is not None and "epochs" in SearchSpace.of(defense).train:
        wishes["epochs"] = study.epochs
    space = SearchSpace.of(defense).narrow(wishes)
    if study.method == "grid":
        next(space.grid())
    if study.weights is not None and space.trainings() != 1:
        several = ", ".join(name for name in space.searched() if name in space.train)
        raise InputError(
            f"weights of {study.defense} need every knob of its training fixed, but the space searches {several}: "
            "--knob NAME=VALUE fixes one"
        )
    suite = SUITES[choose("the suite", study.suite, list(SUITES))]
    free = sizes.attackable(study.threat)
    kept = f", as {sizes.validation - free} of the validation images are kept from it"
    for name, most, why in (("train_images", sizes.train, ""), ("eval_images", free, kept)):
        asked = getattr(study, name)
        if asked is not None and asked > most:
            raise InputError(f"{name} must be at most {most} on {task.dataset}{why}, but is {asked}")
    images = min(1000, free) if study.eval_images is None else study.eval_images
    if study.partner is not None and defense.consults != "partner":
        law = "partner must be left out where the defense is trained with the attacked classifier itself"
        raise InputError(f"{law}, as {study.defense} is, but is {study.partner}")
    partner, substitute = study.partner or task.partner, study.substitute or protected.partner
    partner, substitute = (task.beside(name).classifier for name in (partner, substitute))
    threat = threat_of(study.norm, _eps(study, suite, task), study.threat)
    within = (suite.with_known_noise() if study.noise == "known" else suite).within(threat)
    return ResolvedStudy(task, protected.classifier, partner, substitute, defense, space, threat, within, images)


def threat_of(norm: str, eps: float, knowledge: str) -> ThreatModel:
    """Return a threat model, whose norm may be written in small letters.

    Raises:
        InputError: a value is not legal; 8 is answered with 8/255.
    """
    names: Any = {"norm": spelt(norm), "eps": eps, "knowledge": knowledge}
    try:
        return ThreatModel(**names)
    except InputError as error:
        raise InputError(f"{error}{of_255(eps) if names['norm'] == 'Linf' else ''}") from None


def caveat(study: Study, images: int) -> str:
    """Return that a run is too small to prove anything; empty if it is not.

    Args:
        images: how many validation images it attacks.
    """
    if study.train_images is None and images >= FEW:
        return ""
    trained = study.train_images or splits.sizes(study.resolved.task.dataset, study.data_dir).train
    run = f"a run of {trained:,} training images and {images:,} attacked validation images"
    return f"{run} shows the way and proves nothing"


def _eps(study: Study, suite: Suite, task: Task) -> float:
    if study.eps is not None:
        return study.eps
    if study.norm == "L2":
        raise InputError("eps must be given in L2, where no paper has one for a task, but is not: --eps 1.5, say")
    return task.eps if suite.eps is None else suite.eps
