"""A search from its first check to its leaderboard: what the command line's words do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from search import ranking, report, run, tasks
from search.datasets import DATASETS
from search.events import State
from search.export import AlarmError, export
from search.ledger import Ledger
from search.live import Display, leaderboard, percent
from search.record import Record, journal
from search.score import Candidate
from search.study import Study
from search.tracking import Tracker
from spaces.space import InputError, choose

CODES: dict[State, int] = {"finished": 0, "interrupted": 130}
IFGSM = "oblivious/ifgsm-targeted"


def begin(study: Study, console: Console, *, debug: bool) -> int:
    """Run a new search and return the exit code.

    Raises:
        InputError: the name is taken, the storage cannot be written, or the data cannot be had.
    """
    if study.folder.exists():
        raise InputError(
            f"a search's name must be new, but {study.name!r} exists in {study.storage}: "
            f"go on with `resume {study.name}`, or choose another name"
        )
    return _run(study, [], console, debug=debug)


def proceed(study: Study, console: Console, *, debug: bool) -> int:
    """Go on with a search and return the exit code."""
    return _run(study, Record(study).candidates() if journal(study).exists() else [], console, debug=debug)


def names(storage: Path) -> list[str]:
    """Return the searches of a storage."""
    return sorted(path.parent.name for path in storage.glob("*/study.yaml"))


def status(study: Study) -> dict[str, Any]:
    """Return how far a search is, and the best so far."""
    record = Record(study)
    states = [_state(trial) for trial in record.trials()]
    best = next(iter(record.feasible()), None)
    return {
        "name": study.name,
        "task": study.task,
        "defense": study.defense,
        "trials": study.trials,
        **{state: states.count(state) for state in ("finished", "running", "pruned", "failed")},
        "candidates": len(record.candidates()),
        "best": best.row() if best else None,
    }


def write_report(study: Study) -> Path:
    """Write report.html and return its path."""
    return report.write(findings(study), study.folder / "report.html")


def findings(study: Study) -> report.Findings:
    """Return what a search has found, for the report."""
    record = Record(study)
    candidates, feasible = record.candidates(), record.feasible()
    return report.Findings(
        study=study,
        undefended=record.undefended(),
        candidates=candidates,
        best=next(iter(feasible), None),
        front=ranking.front(study, candidates),
        searched=list(record.searched),
        importances=record.importances(),
        trials=[
            report.TrialRecord(
                trial=trial.user_attrs["trial"],
                state=_state(trial),
                params=record.space.complete(trial.params),
                curve=trial.user_attrs.get("curve", []),
                reason=trial.user_attrs.get("reason", ""),
                picture=Path(trial.user_attrs["picture"]) if trial.user_attrs.get("picture") else None,
                seconds=trial.user_attrs.get("seconds"),
            )
            for trial in record.trials()
        ],
    )


def pick(study: Study, *, pareto: bool, top: int | None, candidate: str | None) -> list[Candidate]:
    """Return the candidates that an export asks for.

    Raises:
        InputError: there is no such candidate, or none within the constraints.
    """
    record = Record(study)
    known = {found.candidate: found for found in record.candidates()}
    if candidate is not None:
        return [known[choose("the candidate", candidate, list(known))]]
    chosen = ranking.front(study, known.values()) if pareto else record.feasible()[:top]
    if not chosen:
        raise InputError(f"an export needs a candidate within the constraints, but {study.name} has none")
    return chosen


def export_all(
    study: Study, candidates: Sequence[Candidate], out: Path, console: Console, *, despite_alarms: bool
) -> int:
    """Audit and export candidates; return 0 where all are written, 1 where the audit refused one."""
    refused = 0
    for candidate in candidates:
        console.print(f"auditing {candidate.candidate} by heavier attacks than it was chosen by ...", highlight=False)
        try:
            folder = export(study, candidate, run.store_of(study), out, despite_alarms=despite_alarms)
            console.print(f"exported {folder}", highlight=False, soft_wrap=True)
        except AlarmError as error:
            refused += 1
            console.print(
                f"refused: {error} (--despite-alarms writes it all the same)", highlight=False, soft_wrap=True
            )
    return 1 if refused else 0


def fetch(datasets: Sequence[str], data_dir: str | None, console: Console) -> None:
    """Fetch data sets with a progress bar."""
    for dataset in datasets:
        choose("a data set", dataset, list(DATASETS))
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console) as progress:
        for dataset in datasets:
            bar = progress.add_task(dataset, total=None)

            def show(what: str, done: int, total: int, bar: TaskID = bar) -> None:
                progress.update(bar, description=what, completed=done, total=total or None)

            tasks.fetch(dataset, data_dir, show)
            progress.remove_task(bar)
            console.print(f"{dataset}: {tasks.check(dataset, data_dir).detail}", highlight=False, soft_wrap=True)


def check(datasets: Sequence[str], data_dir: str | None) -> list[dict[str, Any]]:
    """Return the state of data sets; of all where none is named."""
    return [vars(tasks.check(dataset, data_dir)) for dataset in datasets or DATASETS]


def _run(study: Study, known: Sequence[Candidate], console: Console, *, debug: bool) -> int:
    plan = study.plan()
    _writable(Path(study.storage))
    tasks.checksum(plan.task.dataset, study.data_dir)  # fetches what is missing, before anything is trained
    if study.train_images is not None:
        console.print(
            f"a run of {study.train_images} training images and {study.eval_images} attacked validation images "
            "shows the way and proves nothing",
            highlight=False,
        )
    searched = list(plan.space.searched())
    ended = Record(study).ended() if journal(study).exists() else 0
    epochs = int(plan.space.complete({name: 1 for name in searched}).train.get("epochs", 1))
    display = Display(console, study, searched, epochs, ended)
    tracker = Tracker(study.wandb, study.folder, lambda line: console.print(line, highlight=False))
    try:
        ledger = Ledger(study.folder / "candidates.csv", known)
        state = run.run(study, [ledger, tracker, display], debug=debug)
    finally:
        display.close()
        tracker.close()
    return _conclude(study, state, console)


def _conclude(study: Study, state: State, console: Console) -> int:
    """Show the leaderboard, write the report, and return the exit code."""
    record = Record(study)
    ranked, undefended = record.feasible(), record.undefended()
    console.print(leaderboard(study, list(record.searched), undefended, ranked))
    if not ranked:
        console.print("no candidate is within the constraints", highlight=False)
    elif undefended is not None and IFGSM in ranked[0].score.attacks:
        console.print(
            f"oblivious targeted iFGSM, Linf eps {ranked[0].score.threat.eps:g}: {ranked[0].candidate} keeps "
            f"{percent(ranked[0].score.attacks[IFGSM])} %, undefended {percent(undefended.score.attacks[IFGSM])} %",
            highlight=False,
        )
    console.print(f"candidates {study.folder / 'candidates.csv'}", highlight=False, soft_wrap=True)
    console.print(f"report     {write_report(study)}", highlight=False, soft_wrap=True)
    console.print(f"W&B        wandb leet {study.folder / 'wandb'}", highlight=False, soft_wrap=True)
    if state == "interrupted":
        console.print(f"interrupted; go on with: python launch.py resume {study.name}", highlight=False)
    return CODES[state] if record.candidates() or state == "interrupted" else 1


def _state(trial: Any) -> str:
    running = "running" if trial.state == TrialState.RUNNING else "interrupted"
    return str(trial.user_attrs.get("state", running))


def _writable(storage: Path) -> None:
    try:
        storage.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=storage):
            pass
    except OSError as error:
        raise InputError(
            f"a storage must be a folder that can be written, but {storage}: {os.strerror(error.errno or 0)}"
        ) from None
