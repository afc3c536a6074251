"""The settings of a final run and its results, by seed and model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from attacks.threat import ThreatModel
from search.final.evaluation import FinalVerdicts
from search.study.candidate import Latency


@dataclass(frozen=True, kw_only=True)
class FinalSettings:
    """The settings of a final run.

    Args:
        images: number of test images to attack, out of `of`.
        train, validation: sizes of the splits used for training.
        seeds: of all trainings; `trained` has those that succeeded, `failed` the reasons for the others.
        code: the fingerprint of the attacks.
    """

    dataset: str
    images: int
    of: int
    train: int
    validation: int
    seeds: Sequence[int]
    code: str
    failed: Mapping[str, str] = field(default_factory=dict)
    trained: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """The result of one model of one seed; for a baseline, `export` is empty and the latency is not measured."""

    export: str
    model: str
    threat: ThreatModel
    verdicts: FinalVerdicts
    latency: Latency | None


@dataclass(frozen=True)
class SeedResult:
    """The results of the models of one seed, and of each winner under the attacks of its search and audit."""

    models: Sequence[ModelResult]
    compared: Mapping[str, FinalVerdicts]


@dataclass(frozen=True)
class FinalResults:
    """The results of each seed, and of each export itself by its name."""

    seeds: Sequence[SeedResult]
    exports: Mapping[str, FinalVerdicts]
