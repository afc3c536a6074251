"""The results of a search, read from its Optuna journal, which is the source of truth about a search."""

from __future__ import annotations

import json
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from search.optimizer.journal import Journal, SearchStorage, candidate_text, logs
from search.study import ranking
from search.study.candidate import Candidate, Latency, quieter
from search.study.ranking import OBJECTIVES
from search.study.study import Study
from spaces.domain import Scalar
from spaces.exceptions import InputError, meant
from spaces.space import Params, SearchSpace

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=ExperimentalWarning)


WORDS = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}
ENDED = ("finished", "pruned", "failed")
UNDEFENDED, REMEASURED, FINISHED, USUAL, BEGUN = "undefended", "remeasured", "finished", "usual", "study"
"""Attributes of the whole search: the bare classifier's candidate; re-measured latencies, by candidate; how many
trainings and refinements were asked for when nothing was left to do; the usual inference setting and the epochs of the
longest training, so that `status` need not import the defense; the fields of the study that it began as."""
FREE = {"trials", "refine", "address", "concurrent", "gpus_per_trial", "cpus_per_trial", "trial_timeout", "data_dir"}
FREE |= {"wandb", "notes", "system_metrics", "name", "storage"}
FREE |= {"max_latency_ms", "min_clean_accuracy", "max_clean_rejection"}
"""Fields of a study that may change under a search's name: they shape no training and no score. Constraints among them
decide which candidates may win, whenever they are asked about."""
OLD_REMEASURED = "clocked "
"""Until 2026-11 each latency had its own attribute, named by this prefix and its candidate."""
INTERRUPTED = "interrupted"
"""Marks an Optuna trial that was running when its driver died."""


def lasting(study: Study) -> dict[str, Any]:
    """Return the fields of a study that may not change while its search goes on, but what is left to `auto`; JSON."""
    fields = study.model_dump(mode="json", exclude=FREE)
    return {name: value for name, value in fields.items() if value != "auto"}


class SearchHistory:
    """The trials and candidates of a search. Reading changes nothing, and is possible while the search runs.

    A trial of Crucible is one training, named t001, t002, ...; each of its candidates is a trial of the Optuna study.

    Raises:
        InputError: the search has no study yet, or one of an earlier version, or began as another study.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.optuna = self._open()
        if (names := self.optuna.metric_names) != list(OBJECTIVES):
            raise InputError(
                f"a search must have the objectives {', '.join(OBJECTIVES)}, but {study.name}, of an earlier version, "
                f"has {', '.join(names or ['none'])}; search again under another name"
            )
        begun, now = self.optuna.user_attrs.get(BEGUN, {}), lasting(study)
        if changed := [name for name in begun.keys() & now.keys() if begun[name] != now[name]]:
            raise InputError(
                f"a search must stay the study that it began as, but {study.name!r} in {study.storage} has another "
                f"{', '.join(sorted(changed))}: set it back, or choose another name"
            )

    @cached_property
    def space(self) -> SearchSpace:
        """The space that is searched; looking it up imports the defense, and torch."""
        return self.study.resolved.space

    @cached_property
    def searched(self) -> dict[str, BaseDistribution]:
        """The domains of the knobs that are searched."""
        return self.space.searched()

    @cached_property
    def usual(self) -> dict[str, Scalar]:
        """The usual inference setting, at which the quick scores are."""
        found: dict[str, Any] | None = self.optuna.user_attrs.get(USUAL)
        return found["inference"] if found else self.space.usual()

    @cached_property
    def epochs(self) -> int:
        """The number of epochs of the longest training."""
        found: dict[str, Any] | None = self.optuna.user_attrs.get(USUAL)
        return int(found["epochs"]) if found else self.study.resolved.epochs

    def _open(self) -> optuna.Study:
        if not has_begun(self.study):
            raise InputError(f"a search that has begun is needed, but {journal_path(self.study)} holds none yet")
        return optuna.load_study(study_name=self.study.name, storage=journal_storage(self.study))

    def finished(self) -> bool:
        """Return whether a run ended with nothing left to do, and the study asks for no more now."""
        asked = self.optuna.user_attrs.get(FINISHED, {"trials": 0, "refine": 0})
        return self.study.trials <= asked["trials"] and self.study.refine <= asked["refine"]

    def ended(self) -> int:
        """Return how many trials have ended, in any state."""
        return sum(state_of(trial) in ENDED for trial in self.trials())

    def trials(self) -> list[FrozenTrial]:
        """Return one Optuna trial for each trial of the search, the latest of its name, in order."""
        latest = {t.user_attrs["trial"]: t for t in self.all() if _proposal(t)}
        return [latest[name] for name in sorted(latest, key=lambda name: int(name[1:]))]

    def refinements(self) -> list[FrozenTrial]:
        """Return one Optuna trial for each refinement, the latest of its name, in order."""
        latest = {t.user_attrs["refines"]: t for t in self.all() if "refines" in t.user_attrs}
        return [latest[name] for name in sorted(latest, key=lambda name: int(name[1:]))]

    def setting(self, trial: FrozenTrial) -> Params:
        """Return the setting that a trial proposed; knobs that an interrupted trial lacks are completed."""
        return self.space.complete(trial.system_attrs.get("fixed_params", {}) | trial.params)

    def undefended(self) -> Candidate | None:
        """Return the bare classifier's figures, or None if they are not known yet."""
        found = self.optuna.user_attrs.get(UNDEFENDED)
        return Candidate.from_json(found) if found else None

    def remeasured(self) -> dict[str, Latency]:
        """Return the latencies that were re-measured at the end, by candidate."""
        notes = self.optuna.user_attrs
        found = {key.removeprefix(OLD_REMEASURED): notes[key] for key in notes if key.startswith(OLD_REMEASURED)}
        return {candidate: Latency(**again) for candidate, again in (found | notes.get(REMEASURED, {})).items()}

    def candidates(self) -> list[Candidate]:
        """Return every finished candidate, once, with the quieter of the measurements of its latency."""
        return quieter(self.as_measured(), self.remeasured())

    def as_measured(self) -> list[Candidate]:
        """Return every finished candidate, once, with the first measurement of its latency."""
        done = (t for t in self.all() if t.state == TrialState.COMPLETE and "candidate" in t.user_attrs)
        return list({candidate.candidate: candidate for candidate in map(self.candidate_of, done)}.values())

    def candidate_of(self, trial: FrozenTrial) -> Candidate:
        """Return the candidate of a finished Optuna trial, as it was measured first."""
        return Candidate.from_json(json.loads(candidate_text(journal_path(self.study), trial.user_attrs["candidate"])))

    def feasible(self) -> list[Candidate]:
        """Return the candidates that satisfy all constraints, the least attacked error first, then the fastest."""
        return ranking.feasible(self.study, self.candidates())

    def all(self) -> list[FrozenTrial]:
        """Return every trial of the Optuna study: trainings, further candidates, refinements, enqueued settings."""
        return self.optuna.get_trials(deepcopy=False)


def pick(study: Study, *, pareto: bool, top: int | None, candidate: str | None) -> tuple[list[Candidate], int]:
    """Return the candidates to try, in order, and the number of exports wanted.

    Raises:
        InputError: there is no such candidate, or no candidate meets all constraints.
    """
    history = SearchHistory(study)
    known = {found.candidate: found for found in history.candidates()}
    if candidate is not None:
        begun = [candidate] if candidate in known else [name for name in known if name.startswith(candidate)]
        if len(begun) != 1:
            raise InputError(
                f"a candidate must be one of the {len(known)} in {study.folder / 'candidates.csv'}, or the beginning "
                f"of one alone, but {candidate!r} begins {len(begun) or 'none'}{meant(candidate, known)}"
            )
        return [known[begun[0]]], 1
    chosen = ranking.front(study, known.values()) if pareto else history.feasible()
    if not chosen:
        why = ranking.refusals_in_words(study, known.values()) or "no training has left a candidate"
        raise InputError(f"an export needs a candidate that meets all constraints, but {study.name} has none: {why}")
    return chosen, len(chosen) if top is None else min(top, len(chosen))


def state_of(trial: FrozenTrial) -> str:
    """Return a trial's state as text; a trial of a dead driver is interrupted until it runs again."""
    if trial.state == TrialState.FAIL and trial.user_attrs.get(INTERRUPTED):
        return "interrupted"
    return WORDS[trial.state]


def _proposal(trial: FrozenTrial) -> bool:
    return "trial" in trial.user_attrs and trial.state != TrialState.WAITING


def journal_path(study: Study) -> Path:
    return study.folder / "study.journal"


def journal_storage(study: Study, *, drives: bool = False) -> SearchStorage:
    """Return the journal of a search.

    Args:
        drives: for the driver, which alone may repair the journal and waits for an unavailable storage.
    """
    if not drives:
        return SearchStorage(Journal(journal_path(study), None))
    return SearchStorage(Journal(journal_path(study), study.store, study.store.lock("searches", study.name).path))


def has_begun(study: Study) -> bool:
    """Return whether a search has a study to resume; its driver may have died before creating one."""
    path = journal_path(study)
    return path.exists() and any("study:metric_names" in log.get("system_attr", {}) for log in logs(path))
