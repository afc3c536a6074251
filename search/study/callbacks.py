"""The callback interface of a search, used by the live table, W&B and the CSV log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from search.study.candidate import Candidate, Proposal
from search.study.study import Study

State = Literal["finished", "pruned", "failed", "interrupted"]


class Callback:
    """Receives the events of a search in order, on the driver; by default it does nothing.

    Its methods must not raise.
    """

    def classifier_trained(self, study: Study, cheap: float) -> None:
        """Called before `search_started`, unless that is known; `cheap` is the bare classifier's quick score."""

    def search_started(self, study: Study, undefended: Candidate) -> None:
        """Called before any trial; `undefended` is the bare classifier, scored by the same suite on the same images."""

    def trial_started(self, trial: Proposal) -> None:
        """Called when a trial starts; a restarted trial keeps its name."""

    def epoch_ended(self, trial: Proposal, epoch: int, metrics: dict[str, float]) -> None:
        """Called after each epoch, counted from 1; the metrics include `cheap`, the quick score in [0, 1]."""

    def setting_scored(self, trial: Proposal, done: int, settings: int, images: int) -> None:
        """Called now and then while a training is scored: `done` of `settings` were attacked, on `images` each.

        In a race all settings are attacked on the first images; then the contenders, on all of them.
        """

    def trial_ended(
        self, trial: Proposal, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        """Called when a trial ends; `candidates` is empty unless finished, `picture` is a PNG of trial/pictures.py."""

    def search_ended(self, state: State, candidates: Sequence[Candidate]) -> None:
        """Called last; `candidates` are all candidates of the study, including those of earlier runs."""
