"""Upload what the driver of a search writes to a storage at a URI, and keep it the only driver."""

from __future__ import annotations

import fcntl
import json
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from search.storage.atomic import write_atomic
from search.storage.mirror import Mirror
from search.storage.outage import give_up
from search.study.callbacks import Callback, State
from search.study.candidate import Candidate, Proposal
from search.study.study import Study
from spaces.exceptions import InputError

JOURNAL = "study.journal"
DRIVER = "driver.json"
"""Names the machine that runs the search, since a lock on this machine is not visible on others."""
ASIDE = {"tune", "cache", "logs"}
"""Folders that Ray and W&B need only while they run; they are not uploaded."""
PAUSE_S = 2.0
"""Minimum seconds between two uploads of a search's folder."""
TICK_S = 20.0
"""Maximum seconds between them; a driver without an upload for three ticks counts as dead."""
CLAIM_S = 3.0
"""Seconds after which a driver that begins looks whether another one has begun too."""


def driver(study: Study) -> str | None:
    """Return the other machine on which the search runs now; None if there is none or the storage is a folder."""
    on, said_at = _named(study)
    return on if time.time() - said_at < 3 * TICK_S else None


def _named(study: Study) -> tuple[str | None, float]:
    """Return the other machine that says that it runs the search, dead or alive, and when it said so."""
    if study.mirror is None:
        return None, 0.0
    try:
        said = json.loads(study.mirror.read(DRIVER))
        on, said_at = str(said["on"]), float(said["time"])
    except (OSError, ValueError, TypeError, KeyError):
        return None, 0.0
    return (on, said_at) if on != _here(study) else (None, 0.0)


def _claim(study: Study, mirror: Mirror) -> bool:
    """Say that this machine runs the search from now on, and return whether the storage took it.

    An object store has no locks, so a machine says so, waits, and looks: of several that begin together the last to say
    so goes on. That fails only where a machine takes longer from its last look to its word than another one waits.

    Raises:
        InputError: another machine runs it.
    """
    began = time.monotonic()
    check_alone(study)
    try:
        _say_so(study, mirror)
    except OSError:
        return False
    time.sleep(max(CLAIM_S, time.monotonic() - began))
    _refuse(study, _named(study)[0])
    return True


def _say_so(study: Study, mirror: Mirror) -> None:
    study.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(study.folder / DRIVER, json.dumps({"on": _here(study), "time": time.time()}).encode())
    mirror.send(DRIVER)


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


@contextmanager
def driving(study: Study) -> Iterator[None]:
    """Hold the lock of the search's driver.

    Raises:
        HeldError: another process of this machine, or of one that shares the storage's folder, holds it.
    """
    with study.store.lock("downloads", study.name):  # a reader that downloads the search holds the other one meanwhile
        lock = study.store.lock("searches", study.name).acquire(timeout=1.0)  # `runs` may hold it for an instant
    with lock.sign():
        yield


def check_alone(study: Study) -> None:
    """Raise InputError if the search runs on another machine."""
    _refuse(study, driver(study))


def _refuse(study: Study, other: str | None) -> None:
    if other is not None:
        law = "a search must run once at a time"
        raise InputError(f"{law}, but {study.name!r} runs on {other}, or did a minute ago")


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
    """Yield the callback that uploads the search while it runs and at the end; an empty list if storage is a folder.

    Raises:
        InputError: another machine runs the search.
    """
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
        self._claimed = _claim(study, mirror)
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
        superseded = self._superseded()
        (self.study.folder / DRIVER).unlink(missing_ok=True)
        if not superseded:
            if (self.study.folder / "study.yaml").exists():  # else the search did not begin
                self._send_rest()
            self.mirror.drop(DRIVER)

    def _send_rest(self) -> None:
        for each in filter(None, (self.mirror, self.study.store.mirror)):
            each.retry()
        if not self._send():
            self._say(
                f"{self.study.storage} does not answer: what it lacks is kept in {self.study.root}, and sent when the "
                "search is resumed on this machine"
            )

    def _work(self) -> None:
        while not self._closing.wait(PAUSE_S):
            self._wake.wait(TICK_S)
            self._wake.clear()
            if self._closing.is_set() or self._superseded():
                continue
            with suppress(OSError):
                _say_so(self.study, self.mirror)
            if (self.study.folder / "study.yaml").exists():
                self._send()

    def _superseded(self) -> bool:
        """Return whether another machine runs the search now, which took this one for dead; then nothing is sent.

        The study is told, so that this search ends.
        """
        if not self._claimed:
            with suppress(OSError):
                _say_so(self.study, self.mirror)
                self._claimed = True
            return False
        other, _ = _named(self.study)
        if other is not None:
            give_up(self.study.store.lock("searches", self.study.name).path, f"{other} runs this search now")
        return other is not None

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
        if (
            path.suffix != ".lock"
            and path.name != DRIVER
            and not any(part[0] == "." or part in ASIDE for part in path.parts)
        ):
            yield folder / path


def _mark(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_mtime_ns, about.st_size


def _here(study: Study) -> str:
    return f"{platform.node()}:{study.folder}"
