"""The control flow of a search, independent of what runs its trials: Ray Tune or a loop in this process."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from defenses.base import Metrics
from search.exceptions import StorageError
from search.optimizer.early_stopping import rule_of
from search.optimizer.proposer import Proposer
from search.storage.outage import trouble
from search.study import sync
from search.study.callbacks import Callback, State
from search.study.candidate import Candidate, Latency, Proposal
from search.study.ranking import front
from search.study.study import Study

RESTARTS = 2
"""How often a trial is restarted when its worker dies."""


@dataclass
class _RunningTrial:
    """The state of a trial that was proposed and has not ended.

    Args:
        curve: the quick score by epoch.
        began: when it was first started, in seconds since 1970.
        stopped: the fingerprint of the fit that early stopping ended.
    """

    proposal: Proposal
    curve: dict[int, float] = field(default_factory=dict)
    began: float | None = None
    restarts: int = 0
    deaths: int = 0
    stopped: str | None = None

    def about(self) -> dict[str, object]:
        """Return the attributes that the study records."""
        seconds = time.time() - (self.began or time.time())
        restarts = {"restarts": self.restarts} if self.restarts else {}
        return {"curve": sorted(self.curve.items()), "seconds": round(seconds, 3), **restarts}


class Controller:
    """Starts trials, stops them early at rungs, records their results in the study, and calls the callbacks.

    If the storage fails, no trial is the cause: no more trials start, running ones continue to their end, and one
    that could not be recorded counts as running, so that a resumed search repeats it with its work from the store.

    Args:
        proposer: the study; its existing results are kept.
        listeners: the callbacks, called in this order.

    Attributes:
        trouble: what is wrong with the storage, once it has failed.
    """

    def __init__(self, study: Study, proposer: Proposer, listeners: Sequence[Callback]) -> None:
        self.study = study
        self.proposer = proposer
        self.listeners = listeners
        self.rule = rule_of(study)
        self._running: dict[str, _RunningTrial] = {}
        self._again: list[str] = []
        self.trouble: OSError | None = None
        self._open = self._spent = self._exhausted = False
        for trial in proposer.trials():
            for epoch, score in trial.user_attrs.get("curve", []):
                self._saw(trial.user_attrs["trial"], epoch, score)

    @property
    def done(self) -> bool:
        """Whether nothing runs and nothing more will be proposed; a running trial may have to be restarted."""
        if self._running:
            return False
        return bool(self.trouble) or self._exhausted or not (self._trains or self.proposer.refinements_left())

    def next(self) -> Proposal | None:
        """Return the next trial to run; None if there is none now or, if `done`, no more at all.

        Trainings come first; when the last of them has ended, the best fits are refined.
        """
        found: list[Proposal | None] = []
        if self.trouble is None:
            self._kept(lambda: found.append(self._next()))
        while self.trouble and self._again:
            self.interrupted(self._again.pop(), str(self.trouble))
        return found[0] if found else None

    def _next(self) -> Proposal | None:
        if self._again:
            return self._running[self._again.pop(0)].proposal
        proposal = self.proposer.propose() if self._trains else None
        self._spent |= self._trains and proposal is None
        if proposal is None and all(running.proposal.refines for running in self._running.values()):
            proposal = self.proposer.refine()
            self._exhausted = proposal is None
        if proposal is not None:
            self._running[proposal.name] = _RunningTrial(proposal)
        return proposal

    @property
    def _trains(self) -> bool:
        if self._spent:
            return False
        left = self.study.trials - self.proposer.ended()
        return len(self._running) < left or sum(not one.proposal.refines for one in self._running.values()) < left

    def leaders(self) -> list[Candidate]:
        """Return the candidates of the front whose latency is to be re-measured, one for each distinct latency."""
        found, known = front(self.study, self.proposer.candidates()), self.proposer.remeasured()
        each = {candidate.score.latency_ms_p50: candidate for candidate in found}.values()
        return [candidate for candidate in each if candidate.candidate not in known]

    def remeasured(self, candidate: Candidate, again: Latency) -> None:
        """Record the latency of a candidate of the front, re-measured when no trial runs."""
        self._kept(lambda: self.proposer.keep_remeasured(candidate, again))

    def started(self, name: str) -> None:
        """Record that a trial starts, for the first time or after its worker died."""
        running = self._running[name]
        running.restarts += running.began is not None
        running.began = running.began or time.time()
        self._hear(lambda listener: listener.trial_started(running.proposal))

    def epoch(self, name: str, fit: str, epoch: int, metrics: Metrics) -> bool:
        """Record an epoch's metrics, and return whether the trial stops here; a stopped fit keeps no progress."""
        running = self._running[name]
        running.curve[epoch] = metrics["cheap"]
        self._hear(lambda listener: listener.epoch_ended(running.proposal, epoch, metrics))
        if running.proposal.refines:  # its fit was lost from the store, and is trained again unchanged
            return False
        whole = epoch == running.proposal.params.train.get("epochs")
        self._saw(name, epoch, metrics["cheap"])
        stops = not whole and self.rule.stops(name, epoch, metrics["cheap"])
        if stops:
            running.stopped = fit
        return stops

    def scored(self, name: str, done: int, settings: int, images: int) -> None:
        """Tell how far the scoring of a trial's inference settings is."""
        self._hear(lambda listener: listener.setting_scored(self._running[name].proposal, done, settings, images))

    def finished(
        self,
        name: str,
        candidates: Sequence[Candidate],
        picture: Path | None,
        curve: Sequence[float],
        **more: Sequence[Any],
    ) -> None:
        """Record the candidates of a trial.

        Args:
            curve: the quick score of every epoch, including earlier runs.
            more: recorded where there is any: `dropped`, the inference settings that lost the race, with the images
                that decided it; `remarks`, what the defense says of itself.
        """
        running = self._running[name]
        running.curve = dict(enumerate(curve, start=1))
        for epoch, score in running.curve.items() if not running.proposal.refines else ():
            self._saw(name, epoch, score)  # epochs of an earlier run or another search are new to it
        about = running.about() | {"picture": str(picture) if picture else ""}
        about |= {what: list(found) for what, found in more.items() if found}
        self._end(name, "finished", lambda: self.proposer.finish(name, candidates, about), candidates, picture)

    def silent(self, name: str) -> None:
        """Record a trial that ended without a last report: it was stopped early, or its defense ended the worker."""
        running = self._running[name]
        if running.stopped is None:
            self.failed(name, "it ended without a word")
        elif self._end(name, "pruned", lambda: self.proposer.stop(name, TrialState.PRUNED, running.about())):
            self.study.store.drop_progress(running.stopped)

    def failed(self, name: str, reason: str) -> None:
        about = self._running[name].about() | {"reason": reason}
        self._end(name, "failed", lambda: self.proposer.stop(name, TrialState.FAIL, about), reason=reason)

    def interrupted(self, name: str, reason: str) -> None:
        """Record a trial that a storage failure interrupted: it stays running in the study."""
        self.trouble = self.trouble or StorageError(reason)
        self._tell(self._running.pop(name).proposal, "interrupted", (), None, reason)

    def died(self, name: str, why: str = "") -> None:
        """Record the death of a trial's worker: the trial is restarted, at most `RESTARTS` times."""
        running = self._running[name]
        running.deaths += 1
        if running.deaths > RESTARTS:
            self.failed(name, f"its worker died, {running.deaths} times over{why and ': '}{why}")
        elif self.trouble is not None:
            self.interrupted(name, str(self.trouble))
        else:
            self._again.append(name)

    def classifier_trained(self, cheap: float) -> None:
        self._hear(lambda listener: listener.classifier_trained(self.study, cheap))

    def begin(self, undefended: Candidate) -> None:
        self.proposer.keep_undefended(undefended)
        self._open = True
        self._hear(lambda listener: listener.search_started(self.study, undefended))

    def end(self, state: State) -> None:
        if not self._open:
            return  # interrupted before the search began
        if state == "finished":
            self._kept(self.proposer.keep_finished)
        found: list[Candidate] = []
        self._kept(lambda: found.extend(self.proposer.candidates()))
        self._hear(lambda listener: listener.search_ended(state, found))

    def _saw(self, name: str, epoch: int, score: float) -> None:
        self.rule.saw(name, epoch, score)
        self.proposer.forecast.saw(name, epoch, score)

    def _end(
        self,
        name: str,
        state: State,
        keep: Callable[[], None],
        candidates: Sequence[Candidate] = (),
        picture: Path | None = None,
        reason: str = "",
    ) -> bool:
        """Record in the study how a trial ended, call the callbacks, and return whether the study recorded it."""
        kept = self._kept(keep)
        proposal = self._running.pop(name).proposal
        if kept:
            self._tell(proposal, state, candidates, picture, reason)
        else:
            self._tell(proposal, "interrupted", (), None, str(self.trouble))
        return kept

    def _tell(
        self, trial: Proposal, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        self._hear(lambda listener: listener.trial_ended(trial, state, candidates, picture, reason))

    def _hear(self, tell: Callable[[Callback], None]) -> None:
        """Call the callbacks; one that cannot write, to a full disk or a closed output, does not end the search."""
        for listener in self.listeners:
            with suppress(OSError):
                tell(listener)

    def _kept(self, keep: Callable[[], None]) -> bool:
        """Run `keep`, and return whether the study could record it; False if the storage failed."""
        try:
            keep()
        except OSError as error:
            if trouble(error) is None:
                raise
            self.trouble = self.trouble or error
            return False
        return True


def settle(controller: Controller, name: str, last: dict[str, Any] | None) -> None:
    """Record a trial's last report in the study."""
    if last is not None and "candidates" in last:
        candidates = [Candidate.from_json(data) for data in last["candidates"]]
        shown = sync.picture(controller.study, last["picture"])
        more = {what: last.get(what, ()) for what in ("dropped", "remarks")}
        controller.finished(name, candidates, shown, last["curve"], **more)
    elif last is not None and "failed" in last:
        controller.failed(name, last["failed"])
    elif last is not None and "interrupted" in last:
        controller.interrupted(name, last["interrupted"])
    else:
        controller.silent(name)


def remeasure_front(controller: Controller, measure: Callable[[Candidate], Latency]) -> None:
    """Re-measure the latencies of the front; if that fails, the first measurement stays."""
    for candidate in () if controller.trouble else controller.leaders():
        try:
            controller.remeasured(candidate, measure(candidate))
        except Exception as error:
            warnings.warn(f"{candidate.candidate} could not be timed again: {error}", stacklevel=2)
