"""A stand-in for what workers do, which trains nothing: the engine itself is what is tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from attacks.threat import ThreatModel
from search.engine.worker import Report, Work
from search.storage.fingerprint import fingerprint
from search.study.candidate import Candidate, Latency, Proposal, Score
from search.study.study import Study
from spaces.space import GRID_LIMIT, Params

LATENCY = Latency(ms_p50=5.0, ms_p95=6.0, single_ms_p50=1.0, drift=0.0, device="none", repeats=3)


def scored(
    params: Params, attacked: float, *, clean: float = 0.95, ms: float = 5.0, defense: str = "puvae"
) -> Candidate:
    score = Score(
        threat=ThreatModel("Linf", 0.3, "white-box"),
        attacked_accuracy=attacked,
        attacked_error=1 - attacked,
        attacked_rejection=0.0,
        oblivious_accuracy=attacked,
        white_box_accuracy=attacked,
        clean_accuracy=clean,
        clean_rejection=0.0,
        latency_ms_p50=ms,
        latency_ms_p95=ms,
        images=100,
    )
    name, fit = fingerprint(**params.flat()), fingerprint(**params.train)
    return Candidate(candidate=name, fit=fit, defense=defense, task="digits/A", params=params, score=score)


class Pretence:
    """Work that notes what it was asked for, and scores a setting by a function.

    Args:
        attacked: the attacked accuracy of a setting.
        dies_at: the driver is interrupted when this many proposals were carried out.
    """

    def __init__(self, attacked: Callable[[Params], float], dies_at: int | None = None) -> None:
        self.attacked = attacked
        self.dies_at = dies_at
        self.asked: list[Proposal] = []

    def work(self) -> Work:
        return Work(
            needed=lambda study: [],
            classifier=lambda study, architecture: None,
            quick=lambda study: 0.1,
            undefended=lambda study: scored(Params({}, {}), 0.1),
            execute=self.execute,
            remeasure=lambda study, candidate: LATENCY,
        )

    def execute(self, study: Study, proposal: Proposal, report: Report) -> dict[str, Any]:
        if len(self.asked) == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append(proposal)
        settings = [proposal.params] if proposal.refines else settings_of(study, proposal.params)
        candidates = [scored(params, self.attacked(params), defense=study.defense) for params in settings]
        return {"candidates": [c.to_json() for c in candidates], "curve": [], "picture": ""}


class Trained(Pretence):
    """Work that also reports two epochs, and draws a picture."""

    def execute(self, study: Study, proposal: Proposal, report: Report) -> dict[str, Any]:
        for epoch in (1, 2):
            report("fit", epoch, {"cheap": 0.2 * epoch, "loss": 1 / epoch})
        picture = study.folder / "picture.png"
        Image.new("RGB", (8, 8)).save(picture)
        return super().execute(study, proposal, report) | {"picture": str(picture)}


def settings_of(study: Study, params: Params) -> Sequence[Params]:
    """Return the settings at which a fit is scored, as Scorer.settings has them."""
    space = study.resolved.space.at(params.train)
    rng = np.random.default_rng(study.seed)
    whole = (space.size() or GRID_LIMIT + 1) <= GRID_LIMIT
    others = list(space.grid()) if whole else [space.drawn(rng) for _ in range(5)]
    return [params, *(other for other in others if other != params)]
