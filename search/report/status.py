"""The progress of searches, as shown by `status`, which imports nothing that takes long to import."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial
from rich.table import Table

from search.formatting import duration, percent, spoken_eps
from search.optimizer.history import ENDED, SearchHistory, state_of
from search.report.leaderboard import refusals
from search.report.rank_correlation import rank_correlation
from search.study import ranking, sync
from search.study.catalog import absent, open_search, search_names
from search.study.study import Study
from search.study.winner import audits, verdict_on, winner
from spaces.exceptions import InputError

COUNTED = ("finished", "running", "interrupted", "pruned", "failed")


def states_of(name: str | None, storage: str, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return the progress of one search, or of all in a storage, with a warning for each that cannot be read."""

    def state(each: str) -> dict[str, Any]:
        study = open_search(each, storage, whole=False)
        return status_of(study, runs=sync.runs(study))

    if name is not None:
        return [state(name)]
    found, names = [], search_names(storage)
    if not names:
        warn(absent(storage))
    for each in names:
        try:
            found.append(state(each))
        except InputError as error:
            warn(f"{each}: {error}")
    return found


def status_of(study: Study, *, runs: bool) -> dict[str, Any]:
    """Return the progress of a search and its best candidate; accuracies are fractions, times are in seconds.

    Args:
        runs: whether a driver runs the search now.

    Raises:
        InputError: the search has not begun.
    """
    history = SearchHistory(study)
    trials, candidates = history.trials(), history.candidates()
    states = Counter("interrupted" if state == "running" and not runs else state for state in map(state_of, trials))
    feasible, agreed = ranking.feasible(study, candidates), rank_correlation(history, candidates)
    audited, undefended = audits(study, candidates), history.undefended()
    best = winner(feasible, audited)
    audit = audited.get(best.candidate) if best else None
    refinements = history.refinements()
    failed = {
        t.user_attrs.get("refines", t.user_attrs.get("trial")): t.user_attrs["reason"]
        for t in (*trials, *refinements)
        if t.user_attrs.get("reason")
    }
    return {
        "name": study.name,
        "task": study.label,
        "defense": study.defense,
        "runs": runs,
        "trials": study.trials,
        **{state: states[state] for state in COUNTED},
        "candidates": len(candidates),
        "dropped": sum(len(trial.user_attrs.get("dropped", ())) for trial in trials),
        "best": best.row() if best else None,
        "audited_accuracy": audit["attacked_accuracy"] if audit else None,
        "verdict": verdict_on(best, undefended, feasible, audited) if best and undefended else None,
        "stopping": study.stopping,
        "refinements": len(refinements),
        **_pace(study, trials, runs=runs),
        "feasible": len(feasible),
        "constraints": [{**vars(one), "words": one.words} for one in ranking.refusals(study, candidates)],
        "refusals": refusals(study, candidates) if candidates else "",
        "rank_correlation": agreed.to_json(),
        "restarts": sum(trial.user_attrs.get("restarts", 0) for trial in trials),
        "failures": failed,
    }


def _pace(study: Study, trials: Sequence[FrozenTrial], *, runs: bool) -> dict[str, float | None]:
    """Return the time in which at least one training ran, and estimates of the pace and the remaining time."""
    ended = sum(state_of(trial) in ENDED for trial in trials)
    seconds = busy((t for t in trials if state_of(t) in ENDED or (runs and state_of(t) == "running")), datetime.now())
    left = seconds / ended * (study.trials - ended) if runs and ended else None
    return {
        "seconds": round(seconds, 1),
        "trainings_per_minute": round(60 * ended / seconds, 3) if ended and seconds else None,
        "seconds_left": left if left is None else round(left, 1),
    }


def busy(trials: Iterable[FrozenTrial], now: datetime) -> float:
    """Return the seconds in which at least one of the trials ran; gaps of an interrupted search do not count."""
    seconds, until = 0.0, datetime.min
    for begin, end in sorted((t.datetime_start or now, t.datetime_complete or now) for t in trials):
        seconds += max(0.0, (end - max(begin, until)).total_seconds())
        until = max(until, end)
    return seconds


def board(states: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of searches that is readable at 80 columns."""
    table = Table("search", "task", "trainings", "candidates", "time", "left", "best", box=None)
    for column in table.columns:
        column.overflow = "fold"
    for state in states:
        others = [f"{state[key]} {key}" for key in COUNTED[1:] if state[key]]
        table.add_row(
            state["name"],
            state["task"],
            ", ".join([f"{state['finished']} of {state['trials']} finished", *others]),
            str(state["candidates"]),
            duration(state["seconds"]),
            duration(state["seconds_left"]),
            _best(state) if state["best"] else "–",
        )
    return table


def _best(state: Mapping[str, Any]) -> str:
    """Return the best candidate, with whose attacks left how much of it: the search's, and an audit's heavier ones."""
    best, audited = state["best"], state["audited_accuracy"]
    left = f"{percent(best['attacked_accuracy'])} by the search"
    left += f", {percent(audited)} audited" if audited is not None else ""
    return f"{left} ({best['threat']}, {best['norm']} eps\u00a0{spoken_eps(best['eps'])}), {best['candidate']}"


def details(state: Mapping[str, Any]) -> list[str]:
    """Return further details of one search, one per line."""
    pace = state["trainings_per_minute"]
    return [
        *([f"verdict on {state['best']['candidate']}: {state['verdict']}"] if state["verdict"] else []),
        *([f"pace: {pace:.1f} trainings a minute"] if pace else []),
        f"stopping: {state['stopping']}; {state['rank_correlation']['line']}",
        *([state["refusals"]] if state["refusals"] else []),
        *([f"warning: {state['rank_correlation']['warning']}"] if state["rank_correlation"]["warning"] else []),
        *([f"inference settings dropped in a race: {state['dropped']}"] if state["dropped"] else []),
        *([f"refinements: {state['refinements']}"] if state["refinements"] else []),
        *([f"restarts after a worker died: {state['restarts']}"] if state["restarts"] else []),
        *(f"{trial} failed: {reason}" for trial, reason in state["failures"].items()),
    ]
