"""A trial's time limit: a worker whose trial hangs ends itself and writes a stack dump.

A hang may be in C code that never releases the interpreter lock, so that no other Python thread can run.
"""

from __future__ import annotations

import faulthandler
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from search.storage.fingerprint import fingerprint
from search.study.candidate import Proposal
from search.study.study import Study


class TrialTimeout:
    """Ends this process when a trial has worked for too long; waiting for the driver or the storage does not count.

    The stack dump is in the search's folder, under the trial's name and setting.
    """

    def __init__(self, study: Study, proposal: Proposal) -> None:
        self.study = study
        self.limit = study.trial_timeout
        self.path = study.folder / "stuck" / f"{proposal.name}-{fingerprint(**proposal.params.flat())[:8]}.txt"
        self._left = study.trial_timeout or 0.0
        self._since = 0.0
        self._file: IO[str] | None = None

    def word(self) -> str | None:
        """Return where the trial was when an earlier worker of it ended itself at this limit; None if none did."""
        begin, _, dump = self.path.read_text(encoding="utf-8").partition("\n") if self.path.exists() else ("", "", "")
        thread, _, limit = begin.partition(" ")
        return f"no end after {limit} s{_stood(dump, thread)}" if dump and limit == self._limit() else None

    def _limit(self) -> str:
        return f"{self.limit or 0:g}"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Enforce the time limit of a trial; the worker is reused, so the alarm ends with the trial."""
        if self.limit is None:
            yield
            return
        try:
            self.path.parent.mkdir(parents=self.study.mirror is not None, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8")
        except OSError:  # the limit still applies, without a dump
            self._file = tempfile.TemporaryFile("w", encoding="utf-8")
        with self._file:
            self._file.write(f"0x{threading.get_ident():016x} {self._limit()}\n")  # the thread as faulthandler has it
            self._file.flush()
            self._start()
            try:
                yield
            finally:
                self._stop()
                self._file = None
        with suppress(OSError):  # a file without a dump has no effect
            self.path.unlink()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time in this context."""
        self._stop()
        yield  # if the trial is stopped here, no alarm is needed any more
        self._start()

    def _start(self) -> None:
        self._since = time.monotonic()
        if self._file is not None:
            faulthandler.dump_traceback_later(max(self._left, 0.001), exit=True, file=self._file)

    def _stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._left -= time.monotonic() - self._since


def _stood(dump: str, thread: str) -> str:
    """Return the innermost line of our own code in a thread, from faulthandler's dump of all threads."""
    for stack in dump.split("\n\n"):
        frames = re.findall(r'File "(.+)", line (\d+) in (.+)', stack)
        if frames and f"hread {thread} " in stack:  # the first stack stands below the line that names the limit
            ours = [frame for frame in frames if "/lib/python" not in frame[0]]
            file, line, function = (ours or frames)[0]
            return f"; it stood at {Path(file).name} line {line} in {function}"
    return ""
