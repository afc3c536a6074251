"""A trial's time limit: a worker whose trial hangs ends itself and leaves word of where it stood.

A hang may sit in C code that never lets go of the interpreter, where no other thread of Python would get its turn.
"""

from __future__ import annotations

import faulthandler
import re
import tempfile
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

    Its word lies in the search's folder, under the trial's name and setting.
    """

    def __init__(self, study: Study, proposal: Proposal) -> None:
        self.study = study
        self.limit = study.trial_timeout
        self.path = study.folder / "stuck" / f"{proposal.name}-{fingerprint(**proposal.params.flat())[:8]}.txt"
        self._left = study.trial_timeout or 0.0
        self._since = 0.0
        self._file: IO[str] | None = None

    def word(self) -> str | None:
        """Return where the trial stood when an earlier worker of it ended itself; None where none did."""
        if not self.path.exists() or not (dump := self.path.read_text()):
            return None
        return f"no end after {self.limit or 0:g} s{_stood(dump)}"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold a trial to its limit; a worker is used again, so the alarm ends with the trial."""
        if self.limit is None:
            yield
            return
        try:
            self.path.parent.mkdir(parents=self.study.mirror is not None, exist_ok=True)
            self._file = self.path.open("w")
        except OSError:  # the limit holds all the same, without a word
            self._file = tempfile.TemporaryFile("w")
        with self._file:
            self._start()
            try:
                yield
            finally:
                self._stop()
                self._file = None
        with suppress(OSError):  # an empty one is no word
            self.path.unlink()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the time stand still."""
        self._stop()
        yield  # a trial that is stopped here needs no alarm any more
        self._start()

    def _start(self) -> None:
        self._since = time.monotonic()
        if self._file is not None:
            faulthandler.dump_traceback_later(max(self._left, 0.001), exit=True, file=self._file)

    def _stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._left -= time.monotonic() - self._since


def _stood(dump: str) -> str:
    """Return in our own code the innermost line of the thread that ran the trial, from faulthandler's dump."""
    for thread in dump.split("\n\n"):
        frames = re.findall(r'File "(.+)", line (\d+) in (.+)', thread)
        if any(function == "execute" for _, _, function in frames):
            ours = [frame for frame in frames if "/lib/python" not in frame[0]]
            file, line, function = (ours or frames)[0]
            return f"; it stood at {Path(file).name} line {line} in {function}"
    return ""
