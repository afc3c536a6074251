"""Winners: who of a search is exported, and the audit of each before it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console

from attacks.threat import ThreatModel
from search import courier, ranking
from search.export import AlarmError, export
from search.live import percent
from search.record import Record
from search.score import Candidate
from search.study import Study
from search.trial import store_of
from spaces.space import InputError

TRIES = 2
"""How many candidates more than asked for an export audits when the audit refuses some."""


def pick(study: Study, *, pareto: bool, top: int | None, candidate: str | None) -> tuple[list[Candidate], int]:
    """Return the candidates that an export asks for, and how many of them it wants: of the best, so many that pass.

    Raises:
        InputError: there is no such candidate, or none within the constraints.
    """
    record = Record(study)
    known = {found.candidate: found for found in record.candidates()}
    if candidate is not None:
        begun = [name for name in known if name.startswith(candidate)]
        if len(begun) != 1:
            raise InputError(
                f"a candidate must be one of the {len(known)} in {study.folder / 'candidates.csv'}, or the beginning "
                f"of one alone, but {candidate!r} begins {len(begun)}"
            )
        return [known[begun[0]]], 1
    chosen = ranking.front(study, known.values()) if pareto else record.feasible()
    if not chosen:
        raise InputError(f"an export needs a candidate within the constraints, but {study.name} has none")
    return chosen, len(chosen) if top is None else min(top, len(chosen))


def export_all(
    study: Study, candidates: Sequence[Candidate], wanted: int, out: Path, console: Console, *, despite_alarms: bool
) -> int:
    """Audit and export candidates in order until `wanted` are written; return 0, or 1 where too few passed."""
    written = refused = 0
    for candidate in candidates[: wanted + TRIES]:
        if written == wanted:
            break
        folder = out / candidate.candidate
        if (other := _exported(folder)) not in (None, study.name):
            raise InputError(
                f"a folder of exports must be of one search, but {folder} is of {other}: choose another --out"
            )
        try:
            if not folder.exists():
                console.print(
                    f"auditing {candidate.candidate} by heavier attacks than it was chosen by", highlight=False
                )
                store = store_of(study)
                export(study, candidate, store, out, refused=refused, despite_alarms=despite_alarms)
            courier.deliver(study, *folder.iterdir())
            console.print(f"{_audited(folder)}\nexported {folder}", highlight=False, soft_wrap=True)
            written += 1
        except AlarmError as error:
            refused += 1
            line = f"refused: {error} (--despite-alarms writes it all the same)"
            console.print(line, highlight=False, soft_wrap=True)
    return 0 if written == wanted else 1


def _exported(folder: Path) -> str | None:
    """Return the search whose export lies in a folder; None where there is none."""
    config = folder / "config.yaml"
    return str(yaml.safe_load(config.read_text())["study"]["name"]) if config.exists() else None


def _audited(folder: Path) -> str:
    """Return what the audit left of a candidate, beside what the search had found."""
    found = json.loads((folder / "evidence.json").read_text())
    audited, searched = percent(found["attacked_accuracy"]), percent(found["attacked_accuracy_of_the_search"])
    passed = sum(gate["passed"] for gate in found["gates"])
    return (
        f"audited: {audited} % attacked accuracy ({ThreatModel(**found['threat'])}; the search's lighter attacks left "
        f"{searched} %), error {percent(found['attacked_error'])} %, "
        f"rejected {percent(found['attacked_rejection'])} %, white-box {percent(found['white_box_accuracy'])} %, "
        f"{passed} of {len(found['gates'])} gates passed"
    )
