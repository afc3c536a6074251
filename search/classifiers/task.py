"""Tasks: a data set and a classifier on it."""

from __future__ import annotations

from dataclasses import dataclass

from defenses.base import Shape
from search.classifiers.architectures import ARCHITECTURES, PARTNERS, least
from search.data.datasets import DATASETS
from spaces.exceptions import InputError, choose


@dataclass(frozen=True)
class Task:
    """A data set with a classifier on it; `eps` is the usual L-inf budget, in pixel units of [0, 1]."""

    name: str
    dataset: str
    classifier: str
    shape: Shape
    eps: float

    @property
    def partner(self) -> str:
        """The architecture of PuVAE's source classifier."""
        return PARTNERS[self.classifier]


def _fitting(dataset: str) -> list[str]:
    """Return the architectures that can be built for a data set."""
    return [name for name, architecture in ARCHITECTURES.items() if architecture.fits(DATASETS[dataset].shape)]


TASKS = [f"{dataset}/{classifier}" for dataset in DATASETS for classifier in _fitting(dataset)]


def find_task(name: str) -> Task:
    """Return the task called `name`, such as mnist/A or mnist/advae-X; an InputError lists the legal names.

    Raises:
        InputError: an unknown data set or classifier, or images that are too small for the classifier.
    """
    dataset, _, classifier = name.partition("/")
    data = DATASETS[choose("a data set", dataset, list(DATASETS))]
    if classifier in ("puvae-A", "puvae-B", "puvae-C", "puvae-D"):
        classifier = classifier.removeprefix("puvae-")
    choose(f"the classifier of task {name!r}, after the slash,", classifier, list(ARCHITECTURES))
    if classifier not in _fitting(dataset):
        side = least(classifier, data.shape)
        raise InputError(
            f"classifier {classifier} needs images of at least {side} x {side}, but {dataset} has "
            f"{data.shape.height} x {data.shape.width}; choose one of {', '.join(_fitting(dataset))}"
        )
    return Task(f"{dataset}/{classifier}", dataset, classifier, data.shape, data.eps)
