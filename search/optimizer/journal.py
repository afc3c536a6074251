"""The journal of a search: Optuna's log, on a disk that may fill up, become unavailable or lose power.

A line is written completely or removed. Damage at the end after a power cut (half a line, zeros, junk) is moved to
another file by the next driver; readers ignore it. The lost content is produced again: the trial counts as running,
and its candidates are in the store.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from pathlib import Path
from sys import intern
from threading import Lock
from typing import Any, NamedTuple, TypeVar

from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._storage import JournalOperation, JournalStorageReplayResult
from optuna.trial import FrozenTrial, TrialState

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


class Line(NamedTuple):
    """Where a line of the journal begins, and its length, in bytes: a driver's stand-in for a candidate's text."""

    begin: int
    length: int


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
        return iter(self._patiently(lambda: self._lines(log_number_from)))

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

    def _lines(self, number: int) -> list[dict[str, Any]]:
        """Return whole lines from `number` on; Optuna's own reader stops at some damaged ends and raises at others."""
        begin, found = self._log_number_offset[number], list[dict[str, Any]]()
        with open(self._file_path, "rb") as file:
            file.seek(begin)
            for line in file:
                if (log := _read(line)) is None:
                    break
                if self._store is not None:
                    _lighten(log, Line(begin, len(line)))
                found.append(log)
                begin += len(line)
        self._log_number_offset = {0: 0, number + len(found): begin}  # Optuna keeps every line's
        return found

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


class SearchStorage(JournalStorage):
    """Optuna's storage in a journal, where a step of a long search costs no more than one of a short one."""

    def __init__(self, journal: Journal) -> None:
        self._backend, self._thread_lock = journal, Lock()
        self._worker_id_prefix = f"{uuid.uuid4()}-"
        self._replay_result = _Replayed(self._worker_id_prefix)
        self._sync_with_backend()


class _Replayed(JournalStorageReplayResult):
    """What a journal says, with an index of the trials that wait, and equal domains held once."""

    def __init__(self, worker_id_prefix: str) -> None:
        super().__init__(worker_id_prefix)
        self._waiting: dict[int, None] = {}
        self._domains: dict[str, BaseDistribution] = {}

    def get_all_trials(self, study_id: int, states: Container[TrialState] | None) -> list[FrozenTrial]:
        if states != (TrialState.WAITING,):
            return super().get_all_trials(study_id, states)
        waiting = (i for i in sorted(self._waiting) if self._trial_id_to_study_id[i] == study_id)
        return [self._trials[i] for i in waiting]

    def _apply_create_trial(self, log: dict[str, Any]) -> None:
        number = len(self._trials)
        super()._apply_create_trial(log)
        if (trial := self._trials.get(number)) is None:
            return
        self._waits(number)
        trial._params = {intern(name): value for name, value in trial._params.items()}
        trial._user_attrs = {intern(name): value for name, value in trial._user_attrs.items()}
        texts = log.get("distributions", {})
        same = {name: self._domains.setdefault(texts[name], domain) for name, domain in trial._distributions.items()}
        trial._distributions = {intern(name): domain for name, domain in same.items()}

    def _apply_set_trial_param(self, log: dict[str, Any]) -> None:
        super()._apply_set_trial_param(log | {"param_name": intern(log["param_name"])})
        trial, name = self._trials[log["trial_id"]], log["param_name"]
        if name in trial._distributions:
            trial._distributions[name] = self._domains.setdefault(log["distribution"], trial._distributions[name])

    def _apply_set_trial_state_values(self, log: dict[str, Any]) -> None:
        super()._apply_set_trial_state_values(log)
        self._waits(log["trial_id"])

    def _waits(self, number: int) -> None:
        if self._trials[number].state == TrialState.WAITING:
            self._waiting[number] = None
        else:
            self._waiting.pop(number, None)


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


def _lighten(log: dict[str, Any], line: Line) -> None:
    """Put the place of its line in place of a candidate's text."""
    for told in (log.get("user_attrs"), log.get("user_attr")):
        if told and "candidate" in told:
            told["candidate"] = line


def candidate_text(path: Path, told: str | Line) -> str:
    """Return the text of a candidate, of which a driver has only the place in its journal."""
    if isinstance(told, str):
        return told
    with open(path, "rb") as file:
        file.seek(told.begin)
        log = json.loads(file.read(told.length))
    return str((log.get("user_attrs") or log["user_attr"])["candidate"])


def logs(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the operations of a journal up to its end, or to what is damaged."""
    with open(path, "rb") as file:
        for line in file:
            if (log := _read(line)) is None:
                return
            yield log


def _read(line: bytes) -> dict[str, Any] | None:
    """Return the operation that a line records; None if the line is damaged."""
    try:
        log = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return log if isinstance(log, dict) and "op_code" in log else None
