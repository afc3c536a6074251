"""Signals: whoever asks a process to end is heard as Ctrl-C is, and what is done is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminable() -> Iterator[None]:
    """Take SIGTERM, a batch system's or a cluster's notice to leave, as Ctrl-C; Ray must have set its own before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _as_ctrl_c)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_ctrl_c(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what a script starts with `&`
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)
