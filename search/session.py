"""One search from its first check to its leaderboard: the functions behind the commands."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from search.console import working
from search.data import splits
from search.data.folders import try_lock
from search.engine import run
from search.engine.dry_run import Forecast, forecast, slots_here
from search.exceptions import StorageError
from search.export import provenance
from search.formatting import counted, points, spoken_threat
from search.optimizer import given_weights
from search.optimizer.history import ENDED, SearchHistory, has_begun, state_of
from search.optimizer.warm_start import warm_start_of
from search.report import page
from search.report.leaderboard import WORDS, leaderboard, refusals
from search.report.status import status_of
from search.report.summary import Summary, summarise
from search.storage.outage import HeldError, trouble
from search.study import sync
from search.study.callbacks import State
from search.study.candidate import Candidate
from search.study.catalog import search_names
from search.study.ranking import feasible
from search.study.resolved import caveat
from search.study.study import Study
from search.tracking import wandb_run
from search.tracking.csv_log import CsvLog
from search.tracking.live_table import LiveTable
from search.tracking.wandb_tracker import WandbTracker
from spaces.exceptions import InputError

IFGSM = "oblivious/ifgsm-targeted"


def begin(study: Study, console: Console, *, debug: bool) -> int:
    """Run a new search and return the exit code.

    Raises:
        InputError: the name is taken, the storage is not writable, the data are not available, or a warm start finds
            no trials.
        StorageError: the storage failed during the search.
    """
    _writable(study)
    _new(study)
    study = given_weights.kept(study)
    if study.warm_start is not None:
        console.print(warm_start_of(study, study.warm_start).said, highlight=False, soft_wrap=True)
    return _run(study, console, debug=debug, new=True)


def rehearse(study: Study, console: Console) -> Forecast:
    """Return a forecast of the trials and time of a new search; nothing is stored.

    Raises:
        InputError: the name is taken, a warm start finds no trials, or no machine has the resources for a trial.
    """
    _new(study)
    given_weights.fitting(study)
    if study.warm_start is not None:
        console.print(warm_start_of(study, study.warm_start).said, highlight=False, soft_wrap=True)
    if study.address is None:
        slots = slots_here(study)
    else:
        from search.engine.cluster import capacity  # Ray takes a second to import

        slots = capacity(study)
    with working(console, f"timing a step of {study.defense} on {study.label}"):
        return forecast(study, slots)


def proceed(study: Study, console: Console, *, debug: bool, trials: int | None = None) -> int:
    """Resume a search and return the exit code; one that is finished says so at once.

    Args:
        trials: trainings in all, in place of the study's.

    Raises:
        InputError: fewer trainings are asked for than have ended, or the study is not the one that it began as.
    """
    study = study if trials is None else study.model_copy(update={"trials": trials})
    history = SearchHistory(study) if has_begun(study) else None
    if history is None:
        return _run(study, console, debug=debug, new=False)
    if trials is not None and trials < history.ended():
        raise InputError(
            f"trials must be at least the {history.ended()} that have ended, which count too, but is {trials}"
        )
    if history.finished():
        return _nothing_left(study, history, console)
    threat = study.resolved.threat
    for candidate in history.candidates():
        if candidate.score.threat != threat:
            raise InputError(
                f"a search must go on under its own threat model, {spoken_threat(candidate.score.threat)}, but its "
                f"study says {spoken_threat(threat)} by now: name the former's eps in {study.folder / 'study.yaml'}"
            )
    return _run(study, console, debug=debug, new=False)


def _nothing_left(study: Study, history: SearchHistory, console: Console) -> int:
    """Say that a search is finished, and how it could go on."""
    ended, candidates = history.ended(), len(history.candidates())
    whole = ended < study.trials
    of = (
        f"all {counted(ended, 'training')} of its space" if whole else f"{ended} of {counted(study.trials, 'training')}"
    )
    line = f"{study.name} is finished: {of} ended, {counted(candidates, 'candidate')}"
    more = "" if whole else f"; more trainings: {_resume(study)} --trials {2 * study.trials}"
    with sync.syncing(study, partial(console.print, highlight=False, soft_wrap=True)):  # sends what a URI lacks
        console.print(f"{line}{more}", highlight=False, soft_wrap=True)
    return 0 if candidates else 1


def status(study: Study) -> dict[str, Any]:
    """Return the progress of a search and its best candidate so far."""
    return status_of(study, runs=sync.runs(study))


def write_report(study: Study) -> Path:
    """Write report.html, copy it to a remote storage if there is one, and return its local path."""
    return _written(summarise(study))


def _written(summary: Summary) -> Path:
    path = page.write(summary, summary.study.folder / "report.html")
    sync.deliver(summary.study, path)
    return path


def _run(study: Study, console: Console, *, debug: bool, new: bool) -> int:
    """Run the remaining trials of a search, and say how it goes on where it is interrupted."""
    try:
        state = _driven(study, console, debug=debug, new=new)
    except KeyboardInterrupt:  # before its first trial or after its last
        state = "interrupted"
    scored = len(SearchHistory(study).candidates()) if has_begun(study) else 0
    if state != "interrupted":
        return 0 if scored else 1
    begun = (study.folder / "study.yaml").exists()
    kept = f"go on with: {_resume(study)}" if begun else "nothing is kept, so the same command begins anew"
    console.print(
        f"interrupted{'' if scored else ' before the first candidate'}; {kept}", highlight=False, soft_wrap=True
    )
    return 130


def _driven(study: Study, console: Console, *, debug: bool, new: bool) -> State:
    """Run the remaining trials of a search under a lock, because two drivers would corrupt one study."""
    _writable(study)
    sync.check_alone(study)
    splits.fetch(study.resolved.task.dataset, study.data_dir)  # also checks them, before any training
    study = study.model_copy()  # resolve again: fetched data may differ in size from the official data
    resolved = study.resolved
    if small := caveat(study, resolved.eval_images):
        console.print(small, highlight=False)
    console.print(
        f"the classifiers that {study.defense} on {study.label} needs come first; trained once, they are kept",
        highlight=False,
    )

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    try:
        with sync.driving(study), sync.syncing(study, say) as syncs:
            if new:
                _new(study)  # another driver may have run this search in the meantime
            known, ended = _held(study)
            if outdated := study.store.outdated_fits():
                say(
                    f"{outdated} trainings in {study.store.root} are of an earlier version, which named them "
                    "otherwise: they are kept, but not found, and trained anew where a search needs them"
                )
            if not new:
                say(
                    f"{sum(ended.values())} of {study.trials} trainings have ended, "
                    f"{counted(len(known), 'candidate')} {'is' if len(known) == 1 else 'are'} kept"
                )
            csv_log = CsvLog(study.folder / "candidates.csv", known)
            tracker = WandbTracker(study.wandb, study.folder, say, known, ended)
            display = LiveTable(console, study, list(resolved.space.searched()), resolved.epochs, ended.total())
            with closing(tracker):  # closed last, so that results do not wait for a server
                with closing(display):
                    state = run.run(study, [csv_log, tracker, *syncs, display], debug=debug)
                _conclude(study, console, tracker)
                return state
    except HeldError:
        raise InputError(f"a search must run once at a time, but {study.name!r} runs already") from None
    except Exception as error:
        if (reason := trouble(error)) is None:
            raise
        raise StorageError(
            f"the storage failed: {reason}. What had ended is kept; when it is mended, go on with: {_resume(study)}"
        ) from error


def _held(study: Study) -> tuple[list[Candidate], Counter[str]]:
    """Return the candidates of a search, and the number of its ended trials by state."""
    if not has_begun(study):
        return [], Counter()
    history = SearchHistory(study)
    states = map(state_of, history.trials())
    return history.candidates(), Counter(state for state in states if state in ENDED)


def _conclude(study: Study, console: Console, tracker: WandbTracker) -> None:
    """Show the leaderboard and the verdict on the best, and write the report."""
    summary = summarise(study)
    ranked, undefended = feasible(study, summary.candidates), summary.undefended
    if undefended is not None:
        console.print(leaderboard(study, list(summary.searched), undefended, ranked))
        for line in _remarks(summary):
            console.print(line, highlight=False, soft_wrap=True)
        if (best := summary.best) and IFGSM in best.score.attacks:
            threat = replace(best.score.threat, knowledge="oblivious")
            console.print(
                f"targeted iFGSM ({spoken_threat(threat)}): {best.candidate} keeps "
                f"{points(best.score.attacks[IFGSM])} %, undefended {points(undefended.score.attacks[IFGSM])} %",
                highlight=False,
            )
        said = {"candidates": str(study.folder / "candidates.csv"), "report    ": str(_written(summary))}
        if tracker.mode != "disabled":
            said["W&B       "] = wandb_run.leet(study.folder)
        if tracker.upload:
            said["upload    "] = tracker.upload
        if summary.best:
            said["export    "] = provenance.export(study, summary.best.candidate)
        for what, path in said.items():
            console.print(f"{what} {path}", highlight=False, soft_wrap=True)


def _remarks(summary: Summary) -> Iterator[str]:
    """Yield what is said below the leaderboard, one line each: the verdict on the best first."""
    if not summary.candidates:
        return
    yield WORDS
    if summary.best:
        yield f"verdict on {summary.best.candidate}: {summary.verdict}"
    yield refusals(summary.study, summary.candidates)
    if agreed := summary.rank_correlation:
        yield agreed.line
        if agreed.warning:
            yield f"warning: {agreed.warning}"


def _resume(study: Study) -> str:
    """Return the command that resumes a search."""
    elsewhere = "" if study.storage == Study().storage else f" --storage {shlex.quote(study.storage)}"
    return f"python launch.py resume {study.name}{elsewhere}"


def _new(study: Study) -> None:
    if study.name in search_names(study.storage):
        raise InputError(
            f"a search's name must be new, but {study.name!r} exists in {study.storage}: "
            f"go on with `{_resume(study)}`, or choose another name"
        )


def _writable(study: Study) -> None:
    place = study.root
    try:
        study.root.mkdir(parents=True, exist_ok=True)
        place = study.folder if study.folder.exists() else study.root
        try_lock(place)
    except OSError as error:
        law = "a storage must be a folder that can be written, whose files can be locked"
        raise InputError(f"{law}, but {place}: {os.strerror(error.errno or 0)}") from None
    try:
        try_lock(Path(tempfile.gettempdir()))
    except OSError as error:
        law = "temporary files must be in a folder where they can be locked"
        raise InputError(f"{law}, but {error.filename}: {error.strerror}; set TMPDIR to another") from None
    try:
        if study.mirror:
            study.mirror.reach()
    except OSError as error:
        raise InputError(f"a storage must be a URI that can be written, but {error}") from None
