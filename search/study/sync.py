"""Carries searches between a storage's URI and this machine: what a driver writes goes there, what others need comes
from there."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from search.storage.atomic import write_atomic
from search.storage.mirror import Mirror
from search.study.callbacks import Callback, State
from search.study.candidate import Candidate, Proposal
from search.study.study import Study

JOURNAL = "study.journal"
DRIVER = "driver.json"
"""Says who runs the search: a lock of this machine is not seen on others."""
ASIDE = {"tune", "cache", "logs"}
"""What Ray and W&B need while they run, and nobody after."""
PAUSE_S = 2.0
"""Least seconds between two times that a search's folder is sent."""
TICK_S = 20.0
"""Most seconds between them; a driver that was not heard of for three ticks is taken for dead."""


def driver(study: Study) -> str | None:
    """Return the other machine on which the search runs now, where its storage is a URI; None where none does."""
    if study.mirror is None:
        return None
    try:
        said = json.loads(study.mirror.read(DRIVER))
        alive = time.time() - said["time"] < 3 * TICK_S
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return str(said["on"]) if alive and said["on"] != _here(study) else None


def deliver(study: Study, *paths: Path) -> None:
    """Send files of a search that were written after it; those that lie elsewhere stay there."""
    if (mirror := study.mirror) is None:
        return
    for path in map(Path.resolve, paths):
        if mirror.folder.resolve() in path.parents:
            with suppress(OSError):
                mirror.send(str(path.relative_to(mirror.folder.resolve())))


@contextmanager
def sending(study: Study, say: Callable[[str], None]) -> Iterator[list[Callback]]:
    """Yield who sends the search to its storage while it runs and when all is written; nobody, for a folder."""
    courier = StorageSync(study, study.mirror, say) if study.mirror else None
    try:
        yield [courier] if courier else []
    finally:
        if courier:
            courier.close()


def picture(study: Study, path: str) -> Path | None:
    """Return a trial's picture as it lies on this machine; the worker that drew it may have been on another."""
    if not path:
        return None
    given, here = Path(path), study.folder / "pictures" / Path(path).name
    if study.mirror is not None and not given.exists() and not here.exists():
        with suppress(OSError):
            study.mirror.fetch(f"pictures/{here.name}")
    return here if here.exists() else given


class StorageSync(Callback):
    """Sends what changed in a search's folder to its storage's URI: after each trial, and at the end.

    A storage that does not answer costs no trial: what could not be sent is sent the next time.

    Args:
        say: shows the user one line.
    """

    def __init__(self, study: Study, mirror: Mirror, say: Callable[[str], None]) -> None:
        self.study = study
        self.mirror = mirror
        self._say = say
        self._sent: dict[str, tuple[int, int]] | None = None
        self._wake = threading.Event()
        self._wake.set()  # other machines must soon know that this one drives
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="courier", daemon=True)
        self._thread.start()

    def search_started(self, study: Study, undefended: Candidate) -> None:
        self._wake.set()

    def trial_ended(
        self, trial: Proposal, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        self._wake.set()

    def close(self) -> None:
        """Send what is left, and say so where the storage does not take it."""
        self._closing.set()
        self._wake.set()
        self._thread.join()
        if not (self.study.folder / "study.yaml").exists():
            return  # it was refused
        (self.study.folder / DRIVER).unlink(missing_ok=True)
        for each in filter(None, (self.mirror, self.study.store.mirror)):
            each.retry()
        if not self._send():
            self._say(
                f"{self.study.storage} does not answer: what it lacks is kept in {self.study.root}, and sent when the "
                "search is resumed on this machine"
            )
        self.mirror.drop(DRIVER)

    def _work(self) -> None:
        while not self._closing.wait(PAUSE_S):
            self._wake.wait(TICK_S)
            self._wake.clear()
            if not self._closing.is_set() and (self.study.folder / "study.yaml").exists():
                said = {"on": _here(self.study), "time": time.time()}
                with suppress(OSError):
                    write_atomic(self.study.folder / DRIVER, json.dumps(said).encode())
                self._send()

    def _send(self) -> bool:
        """Send what changed, and return whether nothing is left to be sent."""
        try:
            if self._sent is None:
                self._sent = self._known()
            for path in _carried(self.study.folder):
                name, mark = str(path.relative_to(self.study.folder)), _mark(path)
                if self._sent.get(name) != mark:
                    with suppress(FileNotFoundError):  # it went meanwhile
                        self.mirror.send(name)
                    self._sent[name] = mark
        except OSError:
            return False
        store = self.study.store.mirror
        return store is None or store.catch_up()

    def _known(self) -> dict[str, tuple[int, int]]:
        """Return what an earlier run has sent already: what only grows, where it is as long there."""
        there = self.mirror.sizes()
        here = {str(path.relative_to(self.study.folder)): _mark(path) for path in _carried(self.study.folder)}
        return {name: mark for name, mark in here.items() if "/" in name and there.get(name) == mark[1]}


def _carried(folder: Path) -> Iterator[Path]:
    """Yield the files of a search that others need, what matters most first."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in sorted(found, key=lambda path: (len(path.parts), path)):
        if path.suffix != ".lock" and not any(part[0] == "." or part in ASIDE for part in path.parts):
            yield folder / path


def _mark(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_mtime_ns, about.st_size


def _here(study: Study) -> str:
    return f"{platform.node()}:{study.folder}"


def bring(mirror: Mirror, *, whole: bool) -> None:
    """Bring what the storage has of a search and this machine lacks.

    The journal only grows: whose is longer is ahead. So do the files in folders; those beside the journal do not. But
    where another machine went on from what this one had sent, all follow that one: it ran again what it did not know.

    Raises:
        OSError: the storage does not answer.
    """
    there, journal = mirror.sizes(), _length(mirror.folder / JOURNAL)
    if journal > there.get(JOURNAL, 0):
        if _continues(mirror):
            return  # what this machine could not send yet
        os.replace(mirror.folder / JOURNAL, mirror.folder / f".{JOURNAL}.left")
        journal = -1
    ahead = there.get(JOURNAL, 0) > journal
    # The journal last: where this is cut short, it is done again.
    for name in sorted(there.keys() - {DRIVER}, key=lambda name: name == JOURNAL):
        here = _length(mirror.folder / name)
        if here < there[name] if "/" in name else ahead or here < 0:
            if whole or "/" not in name:
                mirror.fetch(name)


def _continues(mirror: Mirror) -> bool:
    """Say whether the journal here begins as the one there does; half a line at its end counts for nothing."""
    try:
        sent = mirror.read(JOURNAL)
    except FileNotFoundError:
        return True
    return (mirror.folder / JOURNAL).read_bytes().startswith(sent[: sent.rfind(b"\n") + 1])


def _length(path: Path) -> int:
    return os.stat(path).st_size if path.exists() else -1
