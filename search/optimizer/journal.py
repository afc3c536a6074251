"""The journal of a search: Optuna's log of what happened, on a disk that may fill up, go away or lose power.

A line is written in full or taken back. What a power cut left at the end (half a line, zeros, junk) is cut off by the
next driver and kept beside; readers overlook it. What it said comes again: the trial counts as running, and its
candidates are in the store.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._storage import JournalOperation

from search.exceptions import StorageError
from search.storage.outage import trouble
from search.storage.store import Store
from spaces.exceptions import InputError

T = TypeVar("T")

PASSING = (
    JournalOperation.SET_TRIAL_PARAM,
    JournalOperation.SET_TRIAL_USER_ATTR,
    JournalOperation.SET_TRIAL_SYSTEM_ATTR,
)
"""What is said of a trial before its end is told: of 25 lines a trial 18, whose waits for the disk would add up."""


class Journal(JournalFileBackend):
    """Optuna's journal file.

    Args:
        store: of its driver, which writes: the store that lies on the same storage. None of a reader.

    Raises:
        InputError: as a driver, a line in its midst is damaged.
    """

    def __init__(self, path: Path, store: Store | None) -> None:
        self._store = store
        if store is not None:
            mend(path)
        super().__init__(str(path))

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        return iter(self._patiently(lambda: list(self._lines(log_number_from))))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write in full or take back: half a line would swallow the next one, and none may stand twice.

        Optuna's lock is a file beside the journal, which a killed driver leaves for half a minute, and which nobody can
        give back while the storage is away. A driver needs none: it holds the search's own.
        """
        size = self._patiently(lambda: os.path.getsize(self._file_path))
        try:
            self._patiently(lambda: self._append(size, logs))
        except BaseException:
            with suppress(OSError):
                self._cut(size)
            raise

    def _append(self, size: int, logs: list[dict[str, Any]]) -> None:
        self._cut(size)  # what an attempt left when the storage went away
        with open(self._file_path, "ab") as file:
            file.write("".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode())
            file.flush()
            if not all(log["op_code"] in PASSING for log in logs):
                os.fsync(file.fileno())  # with all that came before

    def _cut(self, size: int) -> None:
        if os.path.getsize(self._file_path) > size:
            os.truncate(self._file_path, size)

    def _lines(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield the whole lines from one on; Optuna's own reader stops at some ends and raises at others."""
        with open(self._file_path, "rb") as file:
            file.seek(self._log_number_offset[number])
            for line in file:
                if (log := _read(line)) is None:
                    return
                number += 1
                self._log_number_offset[number] = self._log_number_offset[number - 1] + len(line)
                yield log

    def _patiently(self, do: Callable[[], T]) -> T:
        while True:
            if self._store is not None:
                self._store.wait()
            try:
                return do()
            except OSError as error:
                if self._store is None or not self._store.away:
                    reason = trouble(error) or f"{self._file_path}: {error.strerror}"
                    raise StorageError(reason) from error


def mend(path: Path) -> None:
    """Cut off what is damaged at the end of a journal, and keep it beside.

    Raises:
        InputError: whole lines follow what is damaged: nothing that is left can be told from what is lost.
    """
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines(keepends=True)
    sound = next((number for number, line in enumerate(lines) if _read(line) is None), len(lines))
    if sound == len(lines):
        return
    if any(_read(line) is not None for line in lines[sound:]):
        raise InputError(
            f"a search's journal must be whole but for its end, but line {sound + 1} of {path} is damaged: search "
            "again under another name, which trains nothing that the store holds"
        )
    end = sum(map(len, lines[:sound]))
    with path.with_name(f"{path.name}.damaged").open("ab") as kept:
        kept.write(content[end:])
        kept.flush()
        os.fsync(kept.fileno())
    os.truncate(path, end)


def _read(line: bytes) -> dict[str, Any] | None:
    """Return what a line says; None where it is not whole."""
    try:
        log = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return log if isinstance(log, dict) and "op_code" in log else None
