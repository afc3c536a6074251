"""How far an audit is, and the time left, from the images that the model was asked so far.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import TextColumn
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from defenses.base import Defended
from search.auditing.protocol import Classifier
from search.console import progress_bars
from search.formatting import duration

EVERY_S = 25.0
"""Seconds between two lines where the output is piped."""
BACKWARD = 2
"""What a backward pass costs, in forward passes."""


class AuditProgress:
    """A progress bar on a terminal, a line every 25 seconds where the output is piped.

    Args:
        doing: what is done, in words.

    Attributes:
        expected: the passes of an image through the model that the whole takes, about; 0: not known yet.
    """

    def __init__(self, console: Console, doing: str) -> None:
        self._console, self._doing, self.expected = console, doing, 0.0
        self._asked, self._begun = 0.0, time.monotonic()
        self._bar = progress_bars(console, left=TextColumn("{task.fields[left]}"))
        self._task = self._bar.add_task("auditing", total=1.0, left="–")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what models are asked, and show it, until the context ends."""
        self._say(self._doing)
        ended, counting = threading.Event(), register_module_forward_pre_hook(self._count)
        showing = threading.Thread(target=self._show, args=(ended,), name="audit progress", daemon=True)
        with self._bar:
            showing.start()
            try:
                yield
            finally:
                counting.remove()
                ended.set()
                showing.join()

    @property
    def share(self) -> float:
        """How much is done, about: it approaches 1 where more is asked than was expected."""
        done = self._asked / self.expected if self.expected else 0.0
        return done if done < 0.9 else 1 - 0.1 * 0.9 / done

    def left(self) -> float | None:
        """Return the seconds left, about; None if it cannot be known yet."""
        if not self.share:
            return None
        return (time.monotonic() - self._begun) * (1 - self.share) / self.share

    def _count(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        if isinstance(module, Defended | Classifier) and given and isinstance(given[0], Tensor):
            backward = torch.is_grad_enabled() and given[0].requires_grad
            self._asked += len(given[0]) * (1 + BACKWARD * backward)

    def _show(self, ended: threading.Event) -> None:
        piped = not self._console.is_terminal
        while not ended.wait(EVERY_S if piped else 0.5):
            self._bar.update(self._task, completed=self.share, left=duration(self.left()))
            if piped:
                self._say(f"audited {100 * self.share:.0f} %, about {duration(self.left())} left")

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)
