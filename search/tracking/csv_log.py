"""Writes candidates.csv: one row per candidate, appended when its trial ends."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from search.storage.atomic import write_atomic
from search.study.callbacks import Callback, State
from search.study.candidate import Candidate, Proposal
from search.study.study import Study


class CsvLog(Callback):
    """Keeps candidates.csv up to date with the study.

    Args:
        known: the candidates that the study already has.
    """

    def __init__(self, path: Path, known: Sequence[Candidate]) -> None:
        self.path = path
        self._rows = {candidate.candidate: candidate.row() for candidate in known}
        self._columns = dict.fromkeys(column for row in self._rows.values() for column in row)
        self._behind = True

    def search_started(self, study: Study, undefended: Candidate) -> None:
        self._rewrite()

    def trial_ended(
        self, trial: Proposal, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        new = [c.candidate for c in candidates if c.candidate not in self._rows]
        before = len(self._columns)
        for candidate in candidates:
            row = self._rows[candidate.candidate] = candidate.row()
            self._columns.update(dict.fromkeys(row))
        if self._behind or len(self._columns) > before:  # for example, attacks that only some variants need
            self._rewrite()
            return
        self._behind = True  # on a full disk, only a part of a row may be written
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(self._text(new, header=False))
        self._behind = False

    def search_ended(self, state: State, candidates: Sequence[Candidate]) -> None:
        latest = {c.candidate: c.row() for c in candidates}  # with latencies that were re-measured at the end
        if self._behind or any(self._rows.get(name) != row for name, row in latest.items()):
            self._rows |= latest
            self._rewrite()

    def _rewrite(self) -> None:
        write_atomic(self.path, self._text(list(self._rows), header=True).encode())
        self._behind = False

    def _text(self, names: Sequence[str], *, header: bool) -> str:
        if not names:
            return ""
        rows = [self._rows[name] for name in names]
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(self._columns))
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()
