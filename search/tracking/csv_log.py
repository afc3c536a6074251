"""Writes candidates.csv: one row per candidate, appended when its trial ends."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from search.storage.atomic import write_atomic
from search.study.callbacks import Callback, State
from search.study.candidate import Candidate, Proposal
from search.study.study import Study


class CsvLog(Callback):
    """Keeps candidates.csv up to date with the study. The file holds the rows: a long search has too many for memory.

    Args:
        known: the candidates that the study already has.
    """

    def __init__(self, path: Path, known: Sequence[Candidate]) -> None:
        self.path = path
        self._missing = {candidate.candidate: candidate.row() for candidate in known}
        self._columns = dict.fromkeys(column for row in self._missing.values() for column in row)
        self._written: set[str] = set()
        self._behind = True

    def search_started(self, study: Study, undefended: Candidate) -> None:
        self._rewrite({})

    def trial_ended(
        self, trial: Proposal, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        before = len(self._columns)
        for candidate in candidates:
            row = candidate.row()
            self._columns.update(dict.fromkeys(row))
            if candidate.candidate not in self._written:
                self._missing[candidate.candidate] = row
        headed = self.path.exists() and self.path.stat().st_size > 0  # not if it was deleted or emptied meanwhile
        # New columns are, for example, of attacks that only some variants need.
        if self._behind or not headed or len(self._columns) > before:
            self._rewrite(self._rows())
            return
        self._behind = True  # on a full disk, only a part of a row may be written
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(self._text(self._missing.values(), header=False))
        self._keep(self._missing)

    def search_ended(self, state: State, candidates: Sequence[Candidate]) -> None:
        rows = self._rows()
        latest = {c.candidate: c.row() for c in candidates}  # with latencies that were re-measured at the end
        if self._behind or any(rows.get(name) != _told(row, self._columns) for name, row in latest.items()):
            self._missing |= latest
            self._rewrite(rows)

    def _rows(self) -> dict[str, dict[str, str]]:
        """Return the rows of the file; none if it was deleted or overwritten: the search's end then writes all."""
        if not self.path.exists():
            return {}
        with self.path.open(newline="", encoding="utf-8") as file:
            return {row["candidate"]: row for row in csv.DictReader(file) if row.get("candidate") in self._written}

    def _rewrite(self, rows: Mapping[str, Mapping[str, object]]) -> None:
        every = {**rows, **self._missing}
        write_atomic(self.path, self._text(every.values(), header=True).encode())
        self._keep(every)

    def _keep(self, written: Iterable[str]) -> None:
        self._written.update(written)
        self._missing, self._behind = {}, False

    def _text(self, rows: Iterable[Mapping[str, object]], *, header: bool) -> str:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(self._columns))
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()


def _told(row: Mapping[str, object], columns: Iterable[str]) -> dict[str, str]:
    """Return a row as the file has it."""
    return {column: "" if row.get(column) is None else str(row[column]) for column in columns}
