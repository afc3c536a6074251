"""Collects the data of the report on a finished or running search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from attacks.threat import Knowledge
from search.formatting import milliseconds, percent, spoken_device, spoken_eps
from search.optimizer.history import ENDED, SearchHistory, state_of
from search.report import status
from search.report.importance import Importances, importances
from search.report.rank_correlation import RankCorrelation, rank_correlation
from search.study import ranking, sync
from search.study.candidate import QUIET, Candidate, Latency, quieter
from search.study.ranking import Refusal
from search.study.study import Study
from search.study.winner import audits, verdict_on, winner
from spaces.domain import Scalar
from spaces.space import Params


@dataclass(frozen=True)
class Fault:
    """One problem.

    Args:
        state: failed, interrupted, restarted or failed check.
        words: the reason; empty if unknown.
        where: names of the trials or candidates.
    """

    state: str
    words: str
    where: Sequence[str]


@dataclass(frozen=True)
class TrialRecord:
    """One trial, a training or a refinement, read from the journal of the study.

    Args:
        trial: its name.
        state: finished, pruned, failed, interrupted or running.
        params: the proposed setting.
        curve: the cheap score after each epoch, in [0, 1].
        reason: why it did not finish, or what its defense says of itself; mostly empty.
        picture: a PNG of clean, attacked and purified images.
        seconds: its duration.
        restarts: how often it was restarted because its worker had died.
        dropped: how many inference settings lost its race.
    """

    trial: str
    state: str
    params: Params
    curve: Sequence[float]
    reason: str
    picture: Path | None
    seconds: float | None
    restarts: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Summary:
    """The data of the report.

    Args:
        undefended: the bare classifier, scored by the same suite on the same images.
        candidates: all candidates.
        best: the best candidate that meets all constraints and that no audit refused.
        front: the Pareto front of the feasible candidates.
        searched: names of the knobs that were searched.
        importances: of the knobs; empty with too few trials.
        device: where the latency of the best candidate was measured.
        rank_correlation: of cheap and final scores.
        again: the latencies of the front's candidates, re-measured at the end.
        first_ms: the first measurement of each candidate's latency, p50; `candidates` have the quieter.
        refinements: further inference settings that were scored for the best fits at the end.
        busy: seconds in which at least one trial ran.
        audits: the evidence of each audit, by its candidate (`search/study/winner.py`).
    """

    study: Study
    undefended: Candidate | None
    candidates: Sequence[Candidate]
    best: Candidate | None
    front: Sequence[Candidate]
    searched: Sequence[str]
    importances: Importances
    trials: Sequence[TrialRecord]
    device: str = ""
    rank_correlation: RankCorrelation | None = None
    again: Mapping[str, Latency] = field(default_factory=dict)
    first_ms: Mapping[str, float] = field(default_factory=dict)
    refinements: Sequence[TrialRecord] = ()
    busy: float = 0.0
    audits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @cached_property
    def ranked(self) -> list[Candidate]:
        """The candidates, feasible ones first, then sorted by attacked error and latency."""
        return sorted(ranking.ranked(self.candidates), key=lambda c: bool(self.broken(c)))

    @property
    def audit(self) -> Mapping[str, Any] | None:
        """The evidence of the audit of the best candidate; None if it was not audited."""
        return self.audits.get(self.best.candidate) if self.best else None

    @property
    def verdict(self) -> str:
        """What the best candidate is worth, one sentence; empty if there is none yet."""
        if not (self.best and self.undefended):
            return ""
        return verdict_on(self.best, self.undefended, ranking.feasible(self.study, self.candidates), self.audits)

    @property
    def refused_by_audit(self) -> list[str]:
        """The candidates that an audit refused."""
        return [name for name, audit in self.audits.items() if audit["refused"]]

    @cached_property
    def refusals(self) -> list[Refusal]:
        """The number of candidates that each constraint, and each gate, refuses."""
        return ranking.refusals(self.study, self.candidates)

    @cached_property
    def refused(self) -> str:
        """The same in words; empty if all candidates are within the constraints."""
        return ranking.refusals_in_words(self.study, self.candidates)

    @cached_property
    def within(self) -> int:
        """The number of candidates within all constraints."""
        return len(ranking.feasible(self.study, self.candidates))

    @cached_property
    def rejects(self) -> bool:
        """Whether any candidate rejected an image."""
        return any(c.score.clean_rejection or c.score.attacked_rejection for c in self.candidates)

    @cached_property
    def devices(self) -> list[str]:
        """The devices on which latencies were measured."""
        return ranking.devices(self.candidates)

    @property
    def images(self) -> int:
        """The number of validation images attacked."""
        scored = (*self.candidates, *filter(None, [self.undefended]))
        return max((c.score.images for c in scored), default=self.study.resolved.eval_images)

    @property
    def eps(self) -> float | None:
        """The eps of the attacks, in pixel units of [0, 1]; None if only the task has it and nothing is scored yet."""
        scored = self.undefended or next(iter(self.candidates), None)
        return scored.score.threat.eps if scored else self.study.eps

    @property
    def ended(self) -> int:
        """The number of ended trainings, counted as in `status`."""
        return sum(map(self.count, ENDED))

    def count(self, state: str) -> int:
        return sum(trial.state == state for trial in self.trials)

    @cached_property
    def faults(self) -> list[Fault]:
        """Trials and refinements that failed, were interrupted or were restarted, grouped by reason."""
        every = (*self.trials, *self.refinements)
        ended = [(t.state, t.reason, t.trial) for t in every if t.state in ("failed", "interrupted")]
        again = [("restarted", "its worker had died", t.trial) for t in every if t.restarts]
        return gathered(ended + again)

    @cached_property
    def alarms(self) -> list[Fault]:
        """Candidates with an alarm, grouped by alarm."""
        return gathered(("failed check", alarm, c.candidate) for c in self.ranked for alarm in c.score.alarms)

    def broken(self, candidate: Candidate) -> list[str]:
        """Return descriptions of the constraints that a candidate violates."""
        words = {
            "alarms": f"failed audit check: {'; '.join(candidate.score.alarms)}",
            "max_clean_rejection": f"more than {percent(self.study.max_clean_rejection)} of the clean images rejected",
            "min_clean_accuracy": f"clean accuracy below {percent(self.study.min_clean_accuracy)}",
            "max_latency_ms": f"slower than {milliseconds(self.study.max_latency_ms)}",
        }
        return [words[name] for name, excess in ranking.constraints(self.study, candidate).items() if excess > 0]

    def standing(self, candidate: Candidate) -> tuple[str, bool]:
        """Return what stands beside the name of a candidate, and whether it speaks against it."""
        audit = self.audits.get(candidate.candidate)
        if broken := self.broken(candidate):
            return "; ".join(broken), True
        if audit:
            refused = bool(audit["refused"])
            return "refused by the audit" if refused else f"audited: {percent(audit['attacked_accuracy'])}", refused
        return "Pareto front" if candidate.candidate in self._on_front else "", False

    def named(self, knowledge: Knowledge | None = None) -> str:
        """Return a short form of the threat model: that of the study, or with other knowledge."""
        return f"{knowledge or self.study.threat}, {self.study.norm}\u00a0eps\u00a0{spoken_eps(self.eps)}"

    def remark(self, candidate: Candidate) -> str:
        """Return a remark if the second latency measurement differs from the first; otherwise empty."""
        again, counts = self.again.get(candidate.candidate), candidate.score.latency_ms_p50
        first = self.first_ms.get(candidate.candidate, counts)
        if first > counts:
            return f"{milliseconds(first)} the first time, which was not quiet"
        if again is None or first <= 0:
            return ""
        if again.device != candidate.score.device:
            return f"on another device: {spoken_device(again.device)}"
        slower = again.ms_p50 / first - 1
        return f"{100 * slower:.0f} % slower when re-measured, which was not quiet" if slower > QUIET else ""

    def fit(self, candidate: Candidate) -> TrialRecord | None:
        """Return the trial that trained the fit of a candidate."""
        return self._by_setting.get(frozenset(candidate.params.train.items()))

    @cached_property
    def _by_setting(self) -> dict[frozenset[tuple[str, Scalar]], TrialRecord]:
        return {frozenset(trial.params.train.items()): trial for trial in reversed(self.trials)}

    @cached_property
    def _on_front(self) -> set[str]:
        return {candidate.candidate for candidate in self.front}


def gathered(found: Iterable[tuple[str, str, str]]) -> list[Fault]:
    """Group (state, words, where) into faults, the most frequent first."""
    places: dict[tuple[str, str], list[str]] = {}
    for state, words, where in found:
        places.setdefault((state, words), []).append(where)
    faults = [Fault(state, words, where) for (state, words), where in places.items()]
    return sorted(faults, key=lambda fault: -len(fault.where))


def summarise(study: Study) -> Summary:
    """Return the summary of a search.

    Raises:
        InputError: the search has not begun.
    """
    history = SearchHistory(study)
    measured, again = history.as_measured(), history.remeasured()
    candidates = quieter(measured, again)
    audited = audits(study, candidates)
    best = winner(ranking.feasible(study, candidates), audited)
    return Summary(
        study=study,
        undefended=history.undefended(),
        candidates=candidates,
        best=best,
        front=ranking.front(study, candidates),
        searched=list(history.searched),
        importances=importances(history),
        device=best.score.device if best else "",
        rank_correlation=rank_correlation(history, candidates),
        again=again,
        first_ms={c.candidate: c.score.latency_ms_p50 for c in measured},
        trials=[_told(history, trial, "trial") for trial in history.trials()],
        refinements=[_told(history, trial, "refines") for trial in history.refinements()],
        busy=status.busy((t for t in history.trials() if state_of(t) in ENDED), datetime.now()),
        audits=audited,
    )


def _told(history: SearchHistory, trial: FrozenTrial, kind: str) -> TrialRecord:
    about = trial.user_attrs
    return TrialRecord(
        trial=about[kind],
        state=state_of(trial),
        params=history.setting(trial) if kind == "trial" else Params({}, {}),
        curve=[score for _, score in about.get("curve", [])],
        reason=about.get("reason", "") or "; ".join(about.get("remarks", ())),
        picture=sync.picture(history.study, about.get("picture", "")),
        seconds=about.get("seconds"),
        restarts=about.get("restarts", 0),
        dropped=len(about.get("dropped", ())),
    )
