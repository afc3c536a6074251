"""What happens in a search, whoever runs its trials: Ray Tune or a loop in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from optuna.trial import TrialState

from defenses.base import Metrics
from search.events import Listener, State
from search.halving import Halving
from search.score import Candidate
from search.searcher import Proposer
from search.study import Study
from search.trial import store_of
from spaces.space import Params


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
        self._params: dict[str, Params] = {}
        self._curves: dict[str, dict[int, float]] = {}
        self._began: dict[str, float] = {}
        self._open = False
        for trial in proposer.trials():
            for epoch, score in trial.user_attrs.get("curve", []):
                self.halving.stops(trial.user_attrs["trial"], epoch, score)

    @property
    def left(self) -> int:
        """How many trials are still to be run."""
        return max(0, self.study.trials - self.proposer.ended())

    def next(self) -> tuple[str, Params] | None:
        """Return the next trial, or None where the space is exhausted."""
        proposal = self.proposer.propose()
        if proposal is not None:
            self._params[proposal[0]] = proposal[1]
        return proposal

    def started(self, name: str) -> None:
        """Take note that a trial runs now, for the first time or after its worker died."""
        self._began.setdefault(name, time.time())
        for listener in self.listeners:
            listener.trial_started(name, self._params[name])

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
        seconds = time.time() - self._began.pop(name, time.time())
        return {"curve": sorted(self._curves.pop(name, {}).items()), "seconds": round(seconds, 3)}

    def _tell(
        self, name: str, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        for listener in self.listeners:
            listener.trial_ended(name, state, candidates, picture, reason)
