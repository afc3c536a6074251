"""Keeps the data from a defense's own code: while that runs, no file of them can be opened in this process.

A file is known by its device and inode, so a symbolic link, a hard link or /proc/self/fd is no way around; a copy
cannot be made, as its original cannot be read. A file system gives the inode of a deleted file to a new one, which is
told from it by its size and its time. Nor can it look at its callers, in whose variables are the labels and the
attacked images, or ask Python for all objects. What still gets past: native code that opens files without telling
Python, programs that an installed package starts, other copies of a data set on the machine, and code that changes this
module's own state, or finds the judged images in this process's memory in a way that Python does not report.
"""

from __future__ import annotations

import _posixsubprocess
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, wraps
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from attacks.installed import LIBRARY, PACKAGES
from search.data.folders import roots
from search.exceptions import TrialError
from spaces.exceptions import InputError

OPENINGS = {"open": 1, "os.remove": 1, "os.truncate": 1, "os.utime": 1, "os.link": 1, "os.rename": 2}
"""Audit events of Python, and how many of their first arguments are paths."""
PROGRAMS = frozenset({"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"})
"""Audit events that start another program, which could read the files for this one."""
NOTES = frozenset({"os.putenv", "os.mkdir", "os.symlink", "socket.connect", "socket.bind"})
"""Audit events by which a model could tell a later process what it was asked; and files that it opens to write."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
ANSWERING = "audited", "asked"
"""What happens to a defense that has to do nothing but answer."""
LOOKING = frozenset({"_getframe", "_current_frames", "_current_exceptions", "setprofile", "settrace"})
"""Audit events `sys.NAME` of code that gets at the variables of its callers or of other threads."""
OBJECTS = frozenset({"gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys.monitoring.register_callback"})
FRAMES = frozenset({"tb_frame", "gi_frame", "cr_frame", "ag_frame"})
"""Attributes that lead to a frame; Python reports those that are read."""
NAMING = "typing.py", "enum.py", "dataclasses.py", "collections/__init__.py", "logging/__init__.py", "warnings.py"
"""Files of Python's library that look for the name of their caller, and return no frame but by `logging`."""
DATA, SEARCH = (str(folder) for folder in Path(__file__).parents[:2])
ATTACKS = str(Path(__file__).parents[2] / "attacks")
Identity = tuple[int, int]
"""The device and the inode of a file."""
Seen = tuple[Path, int, int]
"""Where a file lay when it was identified, its size in bytes and when it was last changed, in ns."""

_folders: set[Path] = set()
_doing: list[str] = []
_asking = threading.local()
_refusals: list[str] = []
_data: dict[Identity, Seen] = {}


def watch(*paths: Path) -> None:
    """Add files, or folders with all that is in them, that cannot be opened inside `closed`."""
    _folders.update(paths)


@contextmanager
def closed(doing: str) -> Iterator[None]:
    """Refuse every opening of a file of the data, in all threads of this process, until the context ends.

    Args:
        doing: what happens meanwhile to a defense, such as "trained", for the error.

    Raises:
        TrialError: the data were asked for, also where the code inside caught the refusal.
    """
    _listen()
    if not _doing:
        _identify()
    before = len(_refusals)
    _doing.append(doing)
    try:
        yield
    finally:
        _doing.pop()
    if len(_refusals) > before:
        raise TrialError(_refusals[before])


def refuse_while_closed(what: str) -> None:
    """Raise a TrialError inside `closed`.

    Args:
        what: what is refused, such as "reads FILE".
    """
    if _doing:
        _refusals.append(_refusal(what))
        raise TrialError(_refusals[-1])


def _refusal(what: str) -> str:
    law = "a defense must not get at the data that it is judged by"
    return f"{law}, but it {what} while it is {_doing[-1]} (search/data/guard.py)"


def _identify() -> None:
    global _data
    usual, found = list[Path](), dict[Identity, Seen]()
    with suppress(InputError):  # it may not be seen
        usual = [part for root in roots(None) for name in ("decoded", "raw") for part in (root / name).glob("*")]
    for path in {*_folders, *usual}:
        with suppress(OSError):
            found |= _identities(path, path.stat().st_mtime_ns)
    _data = found


@cache
def _identities(path: Path, changed: int) -> dict[Identity, Seen]:
    """Return what identifies a file, or a folder and all that is in it; `changed` is when it last changed."""
    found = {each: each.stat() for each in (path, *path.rglob("*"))}
    return {(one.st_dev, one.st_ino): (each, one.st_size, one.st_mtime_ns) for each, one in found.items()}


@cache
def _listen() -> None:
    """Be told of all that is opened from now on; Python has no way to end this, but outside `closed` it costs nothing.

    Functions of torch and multiprocessing that Python does not report are made to report themselves.
    """
    sys.addaudithook(_heard)
    torch.from_file = _reported("open", torch.from_file)
    torch.UntypedStorage.from_file = _reported("open", torch.UntypedStorage.from_file)  # type: ignore[method-assign]
    _posixsubprocess.fork_exec = _reported("subprocess.Popen", _posixsubprocess.fork_exec)


def _reported(event: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def reporting(*given: Any, **more: Any) -> Any:
        sys.audit(event, *given, *more.values())
        return function(*given, **more)

    return reporting


def _heard(event: str, given: tuple[Any, ...]) -> None:
    if not _doing or getattr(_asking, "now", False):
        return
    _asking.now = True  # what is done here is heard, too
    try:
        _judge(event, given)
    finally:
        _asking.now = False


def _judge(event: str, given: tuple[Any, ...]) -> None:
    """Refuse what a defense may not do."""
    for path in given[: OPENINGS.get(event, 0)]:
        if _is_data(path):
            refuse_while_closed(f"opens {os.fsdecode(path) if isinstance(path, bytes) else path}")
    if event in PROGRAMS and not _trusted():
        refuse_while_closed("starts another program")
    writes = event == "open" and len(given) > 2 and isinstance(given[2], int) and given[2] & WRITES
    if (writes or event in NOTES) and _doing[-1] in ANSWERING and not _trusted():
        _refuse_known("leaves notes of what it is asked")
    if _looks(event, given) and not _names():
        _refuse_known("looks at its callers or at all objects")


def _refuse_known(what: str) -> None:
    """Refuse; and note it, unless Python's library alone is on this thread's stack: then it may be for anyone."""
    if _asker() is None:
        raise TrialError(_refusal(what))
    refuse_while_closed(what)


def _looks(event: str, given: tuple[Any, ...]) -> bool:
    """Return whether an event is of code that looks at variables of other code."""
    if event == "object.__getattr__":
        return given[1] in FRAMES
    return event in OBJECTS or (event.startswith("sys.") and event[4:] in LOOKING)


def _names() -> bool:
    """Return whether those who look are trusted, or a part of Python's library that needs a name only."""
    frame = sys._getframe(3)
    by = [each.f_code.co_filename for each in (frame, frame.f_back) if each is not None]
    here = by[0].startswith(LIBRARY) and by[0].endswith(NAMING)
    return (here and ("logging" not in by[0] or by[-1] == by[0])) or _trusted()


def _is_data(path: Any) -> bool:
    """Return whether a path or a descriptor leads to a file of the data."""
    folders: list[int | None] = [None]
    if isinstance(path, str | bytes) and not os.path.isabs(path):  # it may be meant relative to an open folder
        with suppress(OSError):
            folders += map(int, os.listdir("/proc/self/fd"))
    return any(_is_ours(path, folder) for folder in folders)


def _is_ours(path: Any, folder: int | None) -> bool:
    try:
        found = os.stat(path, dir_fd=folder)
        identity = found.st_dev, found.st_ino
        where, *before = _data[identity]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    if before == [found.st_size, found.st_mtime_ns]:
        return True
    with suppress(OSError):  # it changed, or it is another file, which has its inode by now
        there = os.stat(where)
        return identity == (there.st_dev, there.st_ino)
    return False


def _trusted() -> bool:
    """Return whether an installed package, such as torch, or the search asks, directly or through Python's library."""
    file = _asker() or ""
    return file.startswith((*PACKAGES, SEARCH, ATTACKS)) and not file.startswith(DATA)


def _asker() -> str | None:
    """Return the file of the innermost code that is not of Python's library; None if there is none on this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        packaged = file.startswith(PACKAGES)  # which may lie below the library
        if packaged or not (file == __file__ or file.startswith((*LIBRARY, "<frozen "))):
            return file
        frame = frame.f_back
    return None
