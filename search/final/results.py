"""What a final run looks at, and what each of its parts found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from attacks.threat import ThreatModel
from search.final.evaluation import FinalVerdicts
from search.study.candidate import Latency


@dataclass(frozen=True, kw_only=True)
class FinalSettings:
    """What a final run looks at.

    Args:
        images: test images that are attacked, of `of`.
        train, validation: sizes of the splits that are trained on.
        seeds: of the trainings; `trained` those that ended, `failed` why the others did not.
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
    """What one model of one seed kept; `export` is empty for a baseline, whose latency is not measured."""

    export: str
    model: str
    threat: ThreatModel
    verdicts: FinalVerdicts
    latency: Latency | None


@dataclass(frozen=True)
class SeedResult:
    """What the models of one seed kept, and each winner under the attacks of its search and its audit."""

    models: Sequence[ModelResult]
    compared: Mapping[str, FinalVerdicts]


@dataclass(frozen=True)
class FinalResults:
    """What each seed kept, and each export as it was exported, by its name."""

    seeds: Sequence[SeedResult]
    exports: Mapping[str, FinalVerdicts]
