"""The journal of a search: Optuna's log, on a disk that may fill up, become unavailable or lose power.

A line is written completely or removed. Damage at the end after a power cut (half a line, zeros, junk) is moved to
another file by the next driver; readers ignore it. The lost content is produced again: the trial counts as running,
and its candidates are in the store.
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
from search.storage.outage import confirm, trouble
from search.storage.store import Store
from spaces.exceptions import InputError

T = TypeVar("T")

PASSING = (
    JournalOperation.SET_TRIAL_PARAM,
    JournalOperation.SET_TRIAL_USER_ATTR,
    JournalOperation.SET_TRIAL_SYSTEM_ATTR,
)
"""Operations before the end of a trial: 18 of the 25 lines of a trial, whose waits for the disk would add up."""


class Journal(JournalFileBackend):
    """Optuna's journal file.

    Args:
        store: the store on the same storage, for the driver, which writes; None for a reader.
        lock: the file of the driver's lock, which is checked before each write.

    Raises:
        InputError: the journal is opened by the driver, and a line before its end is damaged.
    """

    def __init__(self, path: Path, store: Store | None, lock: Path | None = None) -> None:
        self._store = store
        self._lock_file = lock
        if store is not None:
            mend(path)
        super().__init__(str(path))

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        return iter(self._patiently(lambda: list(self._lines(log_number_from))))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write lines completely or remove them: half a line would corrupt the next one, and none may appear twice.

        Optuna's lock is a file beside the journal. It remains for half a minute after its driver was killed, and cannot
        be released while the storage is unavailable. It is not needed: the driver holds the search's own lock. A driver
        that has lost that one to another writes nothing more.
        """
        size = self._patiently(lambda: os.path.getsize(self._file_path))
        try:
            self._patiently(lambda: self._append(size, logs))
        except BaseException:
            with suppress(OSError):
                self._cut(size)
            raise

    def _append(self, size: int, logs: list[dict[str, Any]]) -> None:
        if self._lock_file is not None:
            confirm(self._lock_file)
        self._cut(size)  # the rest of an attempt during which the storage became unavailable
        with open(self._file_path, "ab") as file:
            file.write("".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode())
            file.flush()
            if not all(log["op_code"] in PASSING for log in logs):
                os.fsync(file.fileno())  # together with all lines before

    def _cut(self, size: int) -> None:
        if os.path.getsize(self._file_path) > size:
            os.truncate(self._file_path, size)

    def _lines(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield whole lines from `number` on; Optuna's own reader stops at some damaged ends and raises at others."""
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
    """Cut off the damaged end of a journal, and append it to another file.

    Raises:
        InputError: complete lines follow the damage, so it is unknown what is lost.
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
    """Return the operation that a line records; None if the line is damaged."""
    try:
        log = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return log if isinstance(log, dict) and "op_code" in log else None
