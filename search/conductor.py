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
        epochs = proposer.space.complete({n: 1 for n in proposer.searched}).train.get("epochs", 1)
        self.halving = Halving(epochs=int(epochs), grace=study.grace, factor=study.halving, patience=study.patience)
        self._params: dict[str, Params] = {}
        self._curves: dict[str, list[float]] = {}
        self._began: dict[str, float] = {}
        for trial in proposer.trials():
            for epoch, score in enumerate(trial.user_attrs.get("curve", []), start=1):
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

    def epoch(self, name: str, epoch: int, metrics: Metrics) -> bool:
        """Take an epoch's metrics, and return whether the trial stops here."""
        curve = self._curves.setdefault(name, [])
        del curve[epoch - 1 :]
        curve.append(metrics["cheap"])
        for listener in self.listeners:
            listener.epoch_ended(name, epoch, metrics)
        return self.halving.stops(name, epoch, metrics["cheap"])

    def finished(self, name: str, candidates: Sequence[Candidate], picture: Path | None) -> None:
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
        for listener in self.listeners:
            listener.search_started(self.study, undefended)

    def end(self, state: State) -> None:
        candidates = self.proposer.candidates()
        for listener in self.listeners:
            listener.search_ended(state, candidates)

    def _about(self, name: str) -> dict[str, object]:
        seconds = time.time() - self._began.pop(name, time.time())
        return {"curve": self._curves.pop(name, []), "seconds": round(seconds, 3)}

    def _tell(
        self, name: str, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        for listener in self.listeners:
            listener.trial_ended(name, state, candidates, picture, reason)
