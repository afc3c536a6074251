"""What happens in a search, whoever runs its trials: Ray Tune or a loop in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from optuna.trial import TrialState

from defenses.base import Metrics
from search.events import Listener, State
from search.halving import Halving
from search.latency import Latency
from search.ranking import front
from search.score import Candidate
from search.searcher import Proposer
from search.study import Study
from search.trial import store_of
from search.work import Proposal


class Conductor:
    """Hands out trials, stops them at rungs, tells the study what became of them, and the listeners everything.

    Args:
        proposer: the study; what it holds already is kept.
        listeners: told in this order.
    """

    def __init__(self, study: Study, proposer: Proposer, listeners: Sequence[Listener]) -> None:
        self.study = study
        self.proposer = proposer
        self.listeners = listeners
        self.halving = Halving(
            epochs=study.plan().epochs, grace=study.grace, factor=study.halving, patience=study.patience
        )
        self._running: dict[str, Proposal] = {}
        self._curves: dict[str, dict[int, float]] = {}
        self._began: dict[str, float] = {}
        self._open = self._spent = self._exhausted = False
        for trial in proposer.trials():
            for epoch, score in trial.user_attrs.get("curve", []):
                self.halving.stops(trial.user_attrs["trial"], epoch, score)

    @property
    def done(self) -> bool:
        """Whether nothing more will be proposed."""
        return self._exhausted or (not self._trains and not self._running and not self.proposer.refinements_left())

    def next(self) -> Proposal | None:
        """Return what is to be run next; None where nothing is, for now or, if `done`, for good.

        The trainings come first; when the last of them has ended, the best fits are refined.
        """
        proposal = self.proposer.propose() if self._trains else None
        self._spent |= self._trains and proposal is None
        if proposal is None and all(running.refines for running in self._running.values()):
            proposal = self.proposer.refine()
            self._exhausted = proposal is None
        if proposal is not None:
            self._running[proposal.name] = proposal
        return proposal

    @property
    def _trains(self) -> bool:
        running = sum(not proposal.refines for proposal in self._running.values())
        return not self._spent and self.proposer.ended() + running < self.study.trials

    def leaders(self) -> list[Candidate]:
        """Return the candidates of the front whose latency is to be measured again: one of each latency."""
        found = front(self.study, self.proposer.candidates())
        return list({candidate.score.latency_ms_p50: candidate for candidate in found}.values())

    def clocked(self, candidate: Candidate, again: Latency) -> None:
        """Keep the latency that a candidate of the front had when all was quiet."""
        self.proposer.note(f"clocked {candidate.candidate}", again.to_json())

    def started(self, name: str) -> None:
        """Take note that a trial runs now, for the first time or after its worker died."""
        self._began.setdefault(name, time.time())
        for listener in self.listeners:
            listener.trial_started(name, self._running[name].params)

    def epoch(self, name: str, fit: str, epoch: int, metrics: Metrics) -> bool:
        """Take an epoch's metrics, and return whether the trial stops here; a fit that stops leaves no progress."""
        self._curves.setdefault(name, {})[epoch] = metrics["cheap"]
        for listener in self.listeners:
            listener.epoch_ended(name, epoch, metrics)
        stops = self.halving.stops(name, epoch, metrics["cheap"])
        if stops:
            store_of(self.study).drop_progress(fit)
        return stops

    def finished(
        self, name: str, candidates: Sequence[Candidate], picture: Path | None, curve: Sequence[float]
    ) -> None:
        """Take the candidates of a trial; `curve` is the rung score of every epoch, of earlier runs too."""
        self._curves[name] = dict(enumerate(curve, start=1))
        about = self._about(name) | {"picture": str(picture) if picture else ""}
        self.proposer.finish(name, candidates, about)
        self._tell(name, "finished", candidates, picture, "")

    def pruned(self, name: str) -> None:
        self.proposer.stop(name, TrialState.PRUNED, self._about(name))
        self._tell(name, "pruned", (), None, "")

    def failed(self, name: str, reason: str) -> None:
        self.proposer.stop(name, TrialState.FAIL, self._about(name) | {"reason": reason})
        self._tell(name, "failed", (), None, reason)

    def begin(self, undefended: Candidate) -> None:
        self.proposer.note("undefended", undefended.to_json())
        self._open = True
        for listener in self.listeners:
            listener.search_started(self.study, undefended)

    def end(self, state: State) -> None:
        if not self._open:
            return  # interrupted before it began
        candidates = self.proposer.candidates()
        for listener in self.listeners:
            listener.search_ended(state, candidates)

    def _about(self, name: str) -> dict[str, object]:
        self._running.pop(name, None)
        seconds = time.time() - self._began.pop(name, time.time())
        return {"curve": sorted(self._curves.pop(name, {}).items()), "seconds": round(seconds, 3)}

    def _tell(
        self, name: str, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        for listener in self.listeners:
            listener.trial_ended(name, state, candidates, picture, reason)
