"""What a search tells those who watch it: the live table, W&B, the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from defenses.base import Metrics
from search.study.candidate import Candidate, Proposal
from search.study.study import Study

State = Literal["finished", "pruned", "failed", "interrupted"]


class Callback:
    """Hears of everything that happens in a search, on the driver, in order; by default it does nothing.

    Its methods must not raise.
    """

    def search_started(self, study: Study, undefended: Candidate) -> None:
        """`undefended` is the bare classifier, scored by the same suite on the same images."""

    def trial_started(self, trial: Proposal) -> None:
        """A trial that is restarted keeps its name."""

    def epoch_ended(self, trial: Proposal, epoch: int, metrics: Metrics) -> None:
        """`epoch` counts from 1; the metrics include `cheap`, the rung score in [0, 1]."""

    def trial_ended(
        self, trial: Proposal, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        """`candidates` is empty unless finished; `picture` is a PNG of search/trial/pictures.py."""

    def search_ended(self, state: State, candidates: Sequence[Candidate]) -> None:
        """`candidates` are all that the study holds, those of earlier runs included."""
