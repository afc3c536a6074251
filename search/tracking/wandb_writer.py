"""Writes the W&B runs of a search in a separate thread.

A failure of W&B never stops, slows or fails the search. All writes to a run are kept until it is finished: if the
server fails, the run is written again from its beginning, offline.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ParamSpec

import wandb

from search.tracking import wandb_run
from search.tracking.time_limit import within
from search.tracking.wandb_run import Mode

P = ParamSpec("P")
Write = Callable[[wandb.Run], None]

FLUSH_S = 60.0
"""Time limit for uploads at the end, in seconds; what is not uploaded by then is written offline."""

AT_ONCE = 8
"""How many runs of candidates are sent to a server at once: each waits for about five answers, one after the other."""

LOWER: dict[Mode, tuple[Mode, ...]] = {
    "online": ("offline", "offline", "disabled"),
    "offline": ("offline", "disabled"),  # wandb-core may have died; it is restarted once
    "disabled": ("disabled",),
}
MEANING: dict[Mode, str] = {
    "online": "the search goes on",
    "offline": "the search goes on and logs offline; upload it with: {upload}",
    "disabled": "the search goes on without it",
}
INTERRUPTED = 255
"""The exit code of a run that is still open when the writer is closed."""


@dataclass
class Page:
    """A run and the writes to it.

    Args:
        about: arguments of wandb.init: name, group, job type, tags, config, notes.
        whole: no earlier session has written to it, so `writes` is complete; None if this is not known yet.
    """

    about: dict[str, Any]
    whole: bool | None = None
    writes: list[Write] = field(default_factory=list)
    exit_code: int | None = None
    run: wandb.Run | None = None


class WandbWriter:
    """Writes runs; each is identified by a key.

    Args:
        mode: None uses the mode that wandb resolves ($WANDB_MODE, `wandb offline`); offline where there is no key.
        folder: the folder of the search; wandb writes to its subfolder `wandb/`.
        say: prints one line for the user; called from the writer's thread.
    """

    def __init__(self, mode: Mode | None, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder.resolve()
        self._say = say
        self._said: set[Mode] = set()
        self._pages: dict[str, Page] = {}
        self._begun: set[str] | None = None
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._late = False
        self._ended = 0
        wandb_run.hush(self._folder)
        self._mode: Mode = mode or wandb_run.found_mode()
        self._lower = list(LOWER[self._mode])
        if self._mode != "disabled":
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()

    def __repr__(self) -> str:
        return f"WandbWriter(mode={self._mode!r}, folder={str(self._folder)!r})"

    @property
    def mode(self) -> Mode:
        """The present mode: after failures it changes from online to offline, then to disabled."""
        return self._mode

    @property
    def upload(self) -> str | None:
        """The command that uploads the offline runs; None if the mode is not offline."""
        return wandb_run.upload(self._folder) if self._mode == "offline" else None

    def open(self, key: str, about: dict[str, Any]) -> None:
        """Open a run, unless it is already open.

        Args:
            about: arguments of wandb.init: name, group, job type, tags, config.
        """
        self._put(self._open, key, about)

    def write(self, key: str, write: Write) -> None:
        """Write to an open run; `write` may be called again, on another run with the same id."""
        self._put(self._write, key, write)

    def finish(self, key: str, exit_code: int) -> None:
        self._put(self._finish, key, exit_code)

    def log(self, runs: Mapping[str, Page]) -> None:
        """Write runs that are complete already, each by its key: open, write and finish them."""
        self._put(self._log, dict(runs))

    def close(self) -> None:
        """Finish every run and stop, in about `FLUSH_S` where a server is slow; further calls do nothing.

        It takes longer only while offline runs are being written, and gives up after two time limits without progress.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._jobs.put(None)
        thread.join(FLUSH_S)
        self._late, before = True, -1
        while thread.is_alive() and before < self._ended:
            before = self._ended
            thread.join(2 * wandb_run.PATIENCE_S)
        if thread.is_alive():
            self._mode = "disabled"
            self._complain(TimeoutError("it does not end"))
            wandb_run.abandon()

    def _put(self, job: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        if self._thread is not None:
            self._jobs.put(partial(job, *args, **kwargs))

    # The methods below run in the writer's thread.

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._carefully(job)
        for key in list(self._pages):
            self._carefully(partial(self._write, key, lambda run: run.summary.update({"state": "interrupted"})))
            self._carefully(partial(self._finish, key, INTERRUPTED))

    def _carefully(self, job: Callable[[], None]) -> None:
        with contextlib.suppress(Exception):  # `say` comes from the caller, and may fail too
            if self._late and self._mode == "online":
                self._step_down(TimeoutError("the server is slow"))
            job()
        self._ended += 1

    def _open(self, key: str, about: dict[str, Any]) -> None:
        if self._mode != "disabled" and key not in self._pages:
            page = self._pages[key] = Page(about)
            try:
                within(wandb_run.PATIENCE_S, partial(self._start, key, page))
            except Exception as error:
                self._step_down(error)

    def _write(self, key: str, write: Write) -> None:
        if page := self._pages.get(key):
            page.writes.append(write)
            self._attempt(page, write)

    def _finish(self, key: str, exit_code: int) -> None:
        if page := self._pages.get(key):
            page.exit_code = exit_code
            self._attempt(page, partial(wandb.Run.finish, exit_code=exit_code))
            self._pages.pop(key, None)

    def _log(self, runs: dict[str, Page]) -> None:
        if self._mode == "disabled":
            return
        self._pages |= runs
        faults: list[Exception] = []
        with ThreadPoolExecutor(AT_ONCE if self._mode == "online" else 1) as several:
            list(several.map(partial(self._log_whole, faults), runs))
        if faults:
            self._step_down(faults[0])
        for key in runs:
            self._pages.pop(key, None)

    def _log_whole(self, faults: list[Exception], key: str) -> None:
        """Write a whole run; after a fault, this one's or another's, it is left to be written again."""
        page = self._pages[key]
        try:
            if faults or (self._late and self._mode == "online"):
                raise TimeoutError("the server is slow")
            self._write_whole(key, page)
        except Exception as error:
            faults.append(error)
        else:
            if page.run is not None:
                wandb_run.tidy(page.run)
            self._pages.pop(key)
            self._ended += 1

    def _start(self, key: str, page: Page) -> None:
        replaces = page.whole is True  # after a failure: it is written again
        if page.whole is None:
            if self._begun is None:  # once: a search has thousands of runs
                self._begun = wandb_run.begun(self._folder)
            page.whole = wandb_run.identity(self._folder, page.about["group"], key) not in self._begun
        page.run = wandb_run.start(self._folder, key, self._mode, page.about, replaces=replaces)

    def _attempt(self, page: Page, write: Write) -> None:
        try:
            _on(page, write)
        except Exception as error:
            if self._is_fault(error):
                self._step_down(error)
            else:
                self._complain(error)

    def _is_fault(self, error: Exception) -> bool:
        """Return whether W&B failed; otherwise the write itself is invalid, for example a picture that is missing."""
        if isinstance(error, TimeoutError | ConnectionError):  # ConnectionError also if wandb-core has died
            return True
        return not isinstance(error, OSError) and (self._mode == "online" or isinstance(error, wandb.Error))

    def _step_down(self, fault: Exception) -> None:
        """Change to the next lower mode that works, and write all open runs again."""
        while self._mode != "disabled":
            self._mode = self._lower.pop(0)
            wandb_run.abandon()
            if self._rewritten():
                break
        self._complain(fault)

    def _rewritten(self) -> bool:
        if self._mode == "disabled":
            self._pages.clear()
        try:
            for key, page in self._pages.items():
                self._write_whole(key, page)
        except Exception:
            return False
        return True

    def _write_whole(self, key: str, page: Page) -> None:
        """Open a run and write to it what was written so far; finish it if it has ended."""
        within(wandb_run.PATIENCE_S, partial(self._start, key, page))
        writes = list(page.writes)
        if page.exit_code is not None:
            writes.append(partial(wandb.Run.finish, exit_code=page.exit_code))
        for write in writes:
            with contextlib.suppress(FileNotFoundError):  # a missing picture is reported by the run of the search
                _on(page, write)

    def _complain(self, error: Exception) -> None:
        if self._mode not in self._said:
            self._said.add(self._mode)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            meaning = MEANING[self._mode].format(upload=wandb_run.upload(self._folder))
            self._say(f"W&B failed ({reason[:200]}); {meaning}")


def _on(page: Page, write: Write) -> None:
    if page.run is not None:
        within(wandb_run.PATIENCE_S, partial(write, page.run))
