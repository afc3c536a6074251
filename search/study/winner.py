"""The winner of a search: the best candidate that no audit refused, with its audit and what it is worth."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import takewhile
from typing import Any

from search.formatting import counted, percent
from search.storage.atomic import write_atomic
from search.storage.seal import opened
from search.study import sync
from search.study.candidate import Candidate
from search.study.study import Study
from search.study.verdict import verdict_of_audit, verdict_of_search
from spaces.exceptions import InputError

NOT_AUDITED = "not yet audited by heavier attacks"


def audits(study: Study, candidates: Iterable[Candidate]) -> dict[str, Mapping[str, Any]]:
    """Return the evidence of each audit by candidate, without those of another search or of an export that was changed.

    Returns:
        The fields of evidence.json and `refused`: whether checks failed, though it may be exported all the same.
    """
    found = dict[str, Mapping[str, Any]]()
    kept = {path.stem for path in (study.folder / "audits").glob("*.json")}
    kept |= {path.parent.name for path in (study.folder / "export").glob("*/evidence.json")}
    for c in candidates if kept else ():
        ours = {"search": study.name, "candidate": c.candidate, "fit": c.fit, "threat": asdict(c.score.threat)}
        for known in _kept(study, c.candidate) if c.candidate in kept else ():
            if ours.items() <= known.items():
                found.setdefault(c.candidate, {**known, "refused": bool(known["alarms"])})
    return found


def keep(study: Study, known: Mapping[str, Any]) -> None:
    """Keep the evidence of an audit beside the search, for the report: it may be refused, or exported elsewhere."""
    path = study.folder / "audits" / f"{known['candidate']}.json"
    path.parent.mkdir(exist_ok=True)
    sync.deliver(study, write_atomic(path, json.dumps(known, indent=1).encode()))


def _kept(study: Study, candidate: str) -> Iterable[dict[str, Any]]:
    """Yield the evidence in a candidate's export, then that of its last audit."""
    with suppress(InputError):
        yield json.loads(opened(study.folder / "export" / candidate)["evidence.json"])
    with suppress(OSError, ValueError):
        yield json.loads((study.folder / "audits" / f"{candidate}.json").read_bytes())


def winner(feasible: Sequence[Candidate], audited: Mapping[str, Mapping[str, Any]]) -> Candidate | None:
    """Return the best of the ranked candidates that no audit refused."""
    return next((c for c in feasible if not audited.get(c.candidate, {}).get("refused")), None)


def verdict_on(
    best: Candidate, undefended: Candidate, feasible: Sequence[Candidate], audited: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return what a winner is worth, and whose figures say so: the audit's if there was one, else the search's.

    Args:
        feasible: the ranked candidates that meet all constraints.
    """
    audit, better = audited.get(best.candidate), takewhile(lambda c: c.candidate != best.candidate, feasible)
    above = sum(bool(audited.get(c.candidate, {}).get("refused")) for c in better)
    passed_over = f"; the audit refused {counted(above, 'candidate')} ranked above it" if above else ""
    if audit is None:
        return f"{verdict_of_search(best, undefended)}; {NOT_AUDITED}{passed_over}"
    before = percent(best.score.attacked_accuracy, " %")
    return f"{verdict_of_audit(audit)}; audited (the search's lighter attacks had left {before}){passed_over}"
