"""The Python API for notebooks and scripts: the objects of the command line, with tables as DataFrames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from rich.console import Console

from attacks.ambient import torch_defaults
from search import session
from search.optimizer import given_weights
from search.optimizer.history import SearchHistory
from search.study import ranking
from search.study.candidate import Candidate
from search.study.catalog import open_search, search_names
from search.study.loading import check_study
from search.study.study import Study

TEXT = ("candidate", "fit", "defense", "task", "threat", "alarms", "state", "device", "norm", "latency_images")


@torch_defaults()
def search(study: Study, *, debug: bool = False, console: Console | None = None) -> pd.DataFrame:
    """Run a search and return its candidates; a search that exists is resumed, so a notebook cell can run again.

    Args:
        debug: run the trials in this process, without Ray.
        console: where progress is shown; default: standard output. `Console(quiet=True)` shows nothing.

    Raises:
        InputError: the study is invalid, or a different study has its name.
        RuntimeError: no training produced a candidate.
        KeyboardInterrupt: the search was interrupted; trials that had ended are kept.
    """
    console = console or _console()
    study = given_weights.kept(check_study(study))
    if study.name not in search_names(study.storage):
        code = session.begin(study, console, debug=debug)
    else:
        begun = open_search(study.name, study.storage)
        if study.precision == "auto":  # it has been decided
            study = study.model_copy(update={"precision": begun.precision})
        code = session.proceed(study, console, debug=debug)
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        raise RuntimeError(f"no training of {study.name} left a candidate: launch.py status {study.name} says why")
    return candidates(study)


def _console() -> Console:
    """Return a console on standard output; piped lines are not truncated."""
    console = Console(markup=False, emoji=False)
    return console if console.is_terminal or console.is_jupyter else Console(markup=False, emoji=False, width=1000)


def candidates(study: Study | str, storage: str = "runs") -> pd.DataFrame:
    """Return every candidate of a search, finished or running: the rows and columns of candidates.csv.

    Args:
        study: a study, or the name of a search.
        storage: the storage of a search that is given by name.

    Raises:
        InputError: there is no such search, or it has not begun.
    """
    history = SearchHistory(_opened(study, storage))
    return _table(history, history.candidates())


def front(study: Study | str, storage: str = "runs") -> pd.DataFrame:
    """Return the Pareto front of a search: the non-dominated candidates within the constraints, most robust first.

    Args:
        study: a study, or the name of a search.
        storage: the storage of a search that is given by name.

    Raises:
        InputError: there is no such search, or it has not begun.
    """
    history = SearchHistory(_opened(study, storage))
    return _table(history, ranking.front(history.study, history.candidates()))


def _opened(study: Study | str, storage: str) -> Study:
    return open_search(study, storage) if isinstance(study, str) else study


def _table(history: SearchHistory, found: Sequence[Candidate]) -> pd.DataFrame:
    """Return candidates as a table; the type of each column does not depend on the number of rows."""
    rows = [candidate.row() for candidate in found]
    if not rows and (undefended := history.undefended()):
        rows = [replace(undefended, params=history.space.setting(history.space.usual_of)).row()]
    table = pd.DataFrame(rows)
    domains = history.space.flat().items()
    knobs = {f"knob_{name}" if f"knob_{name}" in table else name: domain for name, domain in domains}
    kinds = {name: _kind(knobs.get(name), name) for name in table.columns}
    return table.astype(kinds).head(len(found))


def _kind(domain: BaseDistribution | None, column: str) -> str:
    """Return the type of a column; `domain` is that of its knob, or None for other columns."""
    if domain is None:
        return "str" if column in TEXT else "int64" if column == "queries" else "float64"
    if isinstance(domain, CategoricalDistribution):
        kinds = {type(choice) for choice in domain.choices}
        names = {bool: "bool", int: "int64", float: "float64", str: "str"}
        return names[kinds.pop()] if len(kinds) == 1 else "object"
    return "int64" if isinstance(domain, IntDistribution) else "float64"
