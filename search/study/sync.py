"""Synchronise searches with a storage at a URI: upload what a driver writes, download what other machines need."""

from __future__ import annotations

import fcntl
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
"""Names the machine that runs the search, since a lock on this machine is not visible on others."""
ASIDE = {"tune", "cache", "logs"}
"""Folders that Ray and W&B need only while they run; they are not uploaded."""
PAUSE_S = 2.0
"""Minimum seconds between two uploads of a search's folder."""
TICK_S = 20.0
"""Maximum seconds between them; a driver without an upload for three ticks counts as dead."""


def driver(study: Study) -> str | None:
    """Return the other machine on which the search runs now; None if there is none or the storage is a folder."""
    if study.mirror is None:
        return None
    try:
        said = json.loads(study.mirror.read(DRIVER))
        alive = time.time() - said["time"] < 3 * TICK_S
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return str(said["on"]) if alive and said["on"] != _here(study) else None


def runs(study: Study) -> bool:
    """Return whether a driver runs this search now; this also works on a read-only storage."""
    try:
        with open(study.store.lock("searches", study.name).path, "rb") as held:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no file, or no locks
        pass
    return driver(study) is not None


def deliver(study: Study, *paths: Path) -> None:
    """Upload files of a search that were written after it ended; files outside its folder are ignored."""
    if (mirror := study.mirror) is None:
        return
    for path in map(Path.resolve, paths):
        if mirror.folder.resolve() in path.parents:
            with suppress(OSError):
                mirror.send(str(path.relative_to(mirror.folder.resolve())))


@contextmanager
def syncing(study: Study, say: Callable[[str], None]) -> Iterator[list[Callback]]:
    """Yield the callback that uploads the search while it runs and at the end; an empty list if storage is a folder."""
    storage_sync = StorageSync(study, study.mirror, say) if study.mirror else None
    try:
        yield [storage_sync] if storage_sync else []
    finally:
        if storage_sync:
            storage_sync.close()


def picture(study: Study, path: str) -> Path | None:
    """Return the local path of a trial's picture; it is downloaded if a worker on another machine drew it."""
    if not path:
        return None
    given, here = Path(path), study.folder / "pictures" / Path(path).name
    if study.mirror is not None and not given.exists() and not here.exists():
        with suppress(OSError):
            study.mirror.fetch(f"pictures/{here.name}")
    return here if here.exists() else given


class StorageSync(Callback):
    """Uploads changed files of a search's folder to its storage's URI, after each trial and at the end.

    An unreachable storage fails no trial: files that could not be uploaded are uploaded the next time.

    Args:
        say: shows the user one line.
    """

    def __init__(self, study: Study, mirror: Mirror, say: Callable[[str], None]) -> None:
        self.study = study
        self.mirror = mirror
        self._say = say
        self._sent: dict[str, tuple[int, int]] | None = None
        self._wake = threading.Event()
        self._wake.set()  # other machines must soon see that this one is the driver
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="storage sync", daemon=True)
        self._thread.start()

    def search_started(self, study: Study, undefended: Candidate) -> None:
        self._wake.set()

    def trial_ended(
        self, trial: Proposal, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        self._wake.set()

    def close(self) -> None:
        """Upload the remaining files, and tell the user if the storage does not accept them."""
        self._closing.set()
        self._wake.set()
        self._thread.join()
        if not (self.study.folder / "study.yaml").exists():
            return  # the search did not begin
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
        """Upload changed files, and return whether none is left."""
        try:
            if self._sent is None:
                self._sent = self._known()
            for path in _carried(self.study.folder):
                name, mark = str(path.relative_to(self.study.folder)), _mark(path)
                if self._sent.get(name) != mark:
                    with suppress(FileNotFoundError):  # removed meanwhile
                        self.mirror.send(name)
                    self._sent[name] = mark
        except OSError:
            return False
        store = self.study.store.mirror
        return store is None or store.catch_up()

    def _known(self) -> dict[str, tuple[int, int]]:
        """Return the files that an earlier run has uploaded: those in subfolders, which only grow, with equal sizes."""
        there = self.mirror.sizes()
        here = {str(path.relative_to(self.study.folder)): _mark(path) for path in _carried(self.study.folder)}
        return {name: mark for name, mark in here.items() if "/" in name and there.get(name) == mark[1]}


def _carried(folder: Path) -> Iterator[Path]:
    """Yield the files of a search that other machines need, the most important first."""
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
    """Download the files of a search that this machine lacks.

    The journal only grows, so the longer one is newer; so do files in subfolders, but not those beside the journal. If
    another machine resumed from an earlier upload, all its files are taken: it repeated the work that it did not have.

    Raises:
        OSError: the storage does not respond.
    """
    there, journal = mirror.sizes(), _length(mirror.folder / JOURNAL)
    if journal > there.get(JOURNAL, 0):
        if _continues(mirror):
            return  # the local journal is ahead: its end is not uploaded yet
        os.replace(mirror.folder / JOURNAL, mirror.folder / f".{JOURNAL}.left")
        journal = -1
    ahead = there.get(JOURNAL, 0) > journal
    # The journal comes last, so that an interrupted download is repeated.
    for name in sorted(there.keys() - {DRIVER}, key=lambda name: name == JOURNAL):
        here = _length(mirror.folder / name)
        if here < there[name] if "/" in name else ahead or here < 0:
            if whole or "/" not in name:
                mirror.fetch(name)


def _continues(mirror: Mirror) -> bool:
    """Return whether the local journal begins with the remote one, ignoring an incomplete line at its end."""
    try:
        sent = mirror.read(JOURNAL)
    except FileNotFoundError:
        return True
    return (mirror.folder / JOURNAL).read_bytes().startswith(sent[: sent.rfind(b"\n") + 1])


def _length(path: Path) -> int:
    return os.stat(path).st_size if path.exists() else -1
