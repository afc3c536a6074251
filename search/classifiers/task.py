"""Tasks: a data set and a classifier on it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import nn

from defenses.base import Shape
from search.classifiers import own
from search.classifiers.architectures import ARCHITECTURES, PARTNERS, least
from search.classifiers.own import OwnClassifier
from search.data.datasets import DATASETS
from search.data.registry import data_set_names, find_data_set
from spaces.exceptions import InputError, choose


@dataclass(frozen=True)
class Task:
    """A data set with a classifier on it.

    Args:
        eps: the usual L-inf budget, in pixel units of [0, 1].
        data_dir: the data folder, which holds what users added; None: the usual one.
    """

    name: str
    dataset: str
    classifier: str
    shape: Shape
    eps: float
    data_dir: str | None = None

    @property
    def partner(self) -> str:
        """The usual source classifier of PuVAE; a user's own classifier is its own."""
        return PARTNERS.get(self.classifier, self.classifier)

    def beside(self, classifier: str) -> Task:
        """Return the task of another classifier on the same data; raises the errors of `find_task`."""
        return find_task(f"{self.dataset}/{classifier}", self.data_dir)

    def build(self, classifier: str) -> nn.Module:
        """Return an untrained classifier for these images."""
        return (self.added(classifier) or ARCHITECTURES[classifier]).build(self.shape)

    def added(self, classifier: str) -> OwnClassifier | None:
        """Return a classifier that a user added; None for a built-in architecture."""
        return None if classifier in ARCHITECTURES else own.find_own(self.dataset, classifier, self.data_dir)

    def given_weights(self, classifier: str) -> bytes | None:
        """Return the trained weights that a user's classifier came with, as safetensors; None: the search trains it.

        Raises:
            InputError: they were altered.
        """
        found = self.added(classifier)
        if found is None or found.weights is None:
            return None
        content = found.weights.read_bytes()
        if hashlib.sha256(content).hexdigest() != found.sha256:
            raise InputError(f"{found.weights} was altered: remove the classifier and add it again")
        return content

    def is_given(self, classifier: str) -> bool:
        """Return whether a classifier came with trained weights, and so is never trained."""
        found = self.added(classifier)
        return found is not None and found.weights is not None


def _fitting(dataset: str, data_dir: str | None) -> list[str]:
    """Return the classifiers that can be built for a data set, a user's own last."""
    shape = find_data_set(dataset, data_dir).shape
    built_in = [name for name, architecture in ARCHITECTURES.items() if architecture.fits(shape)]
    return [*built_in, *own.names(dataset, data_dir)]


def tasks(data_dir: str | None = None) -> list[str]:
    """Return the names of all tasks, those on data and with classifiers that users added too."""
    return [f"{name}/{classifier}" for name in data_set_names(data_dir) for classifier in _fitting(name, data_dir)]


TASKS = [
    f"{dataset}/{name}"
    for dataset, data in DATASETS.items()
    for name, architecture in ARCHITECTURES.items()
    if architecture.fits(data.shape)
]
"""The names of the built-in tasks."""


def find_task(name: str, data_dir: str | None = None) -> Task:
    """Return the task called `name`, such as mnist/A or mnist/advae-X; an InputError lists the legal names.

    Raises:
        InputError: an unknown data set or classifier, or images that are too small for the classifier.
    """
    dataset, _, classifier = name.partition("/")
    data = find_data_set(dataset, data_dir)
    if not classifier:
        names = [*own.names(dataset, data_dir), *_fitting(dataset, data_dir)]
        legal = ", ".join(f"{dataset}/{each}" for each in dict.fromkeys(names))
        raise InputError(f"a task must be a data set and a classifier on it, one of {legal}, but is {name!r}")
    if classifier in ("puvae-A", "puvae-B", "puvae-C", "puvae-D"):
        classifier = classifier.removeprefix("puvae-")
    fitting = _fitting(dataset, data_dir)
    added = [each for each in fitting if each not in ARCHITECTURES]
    choose(f"the classifier of task {name!r}, after the slash,", classifier, [*ARCHITECTURES, *added])
    if classifier not in fitting:
        side = least(classifier, data.shape)
        raise InputError(
            f"classifier {classifier} needs images of at least {side} x {side}, but {dataset} has "
            f"{data.shape.height} x {data.shape.width}; choose one of {', '.join(fitting)}"
        )
    return Task(f"{dataset}/{classifier}", dataset, classifier, data.shape, data.eps, data_dir)
