"""How far an attack or an audit of a model is, and the time left, from the images that the model was asked so far.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from attacks.evaluation import evaluate
from attacks.gradient_view import bare, gradients, stochastic
from attacks.suites import SUITES
from attacks.threat import ThreatModel
from defenses.base import Defended
from search.console import SAID, ProgressBars, TimeLeft

BACKWARD = 2
"""What a backward pass costs, in forward passes."""
FALLEN, STANDING = 400.0, 2400.0
"""Passes that an audit costs for each image, and more for each that stands. Measured on digits, as those below."""
SOURCE, UNDEFENDED, NOISE = 0.6, 0.6, 2.5
"""What a further gradient source, and the undefended classifier, add to it, as shares; and the factor of noise."""
SUITES_COST = {"standard": 12_000.0, "full": 16_000.0}
"""Passes that a further suite costs for each image that stands; any other suite costs `FALLEN`."""


class AttackProgress:
    """A progress bar with the share of the expected passes that are done, and the time left.

    Args:
        doing: what is done, in words.
        counted: further modules whose passes count beside those of defended classifiers, or their classes.

    Attributes:
        expected: the passes of an image through the model that the whole takes, about; 0: not known yet.
    """

    def __init__(self, console: Console, doing: str, *counted: nn.Module | type[nn.Module]) -> None:
        self._doing, self.expected = doing, 0.0
        self._kinds: tuple[type, ...] = (Defended, *(one for one in counted if isinstance(one, type)))
        self._models = {id(one) for one in counted}  # of a class also, which is no module
        self._asked, self._begun = 0.0, time.monotonic()
        self._bar = ProgressBars(console, left=TimeLeft())
        self._task = self._bar.add_task("" if console.is_terminal else doing, total=1.0, ends=math.nan)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what models are asked, and show it, until the context ends."""
        self._bar.say(self._doing)
        ended, counting = threading.Event(), register_module_forward_pre_hook(self._count)
        showing = threading.Thread(target=self._show, args=(ended,), name="attack progress", daemon=True)
        with self._bar:
            showing.start()
            try:
                yield
            except KeyboardInterrupt as stop:
                stop.add_note(SAID)
                self._bar.say(f"interrupted while {self._doing}")
                raise
            finally:
                counting.remove()
                ended.set()
                showing.join()

    @property
    def share(self) -> float:
        """How much is done, about: it approaches 1 where more is asked than was expected."""
        done = self._asked / self.expected if self.expected else 0.0
        return done if done < 0.9 else 1 - 0.1 * 0.9 / done

    def left(self) -> float:
        """Return the seconds left, about; nan if they cannot be known yet."""
        return (time.monotonic() - self._begun) * (1 - self.share) / self.share if self.share else math.nan

    def _count(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        counts = isinstance(module, self._kinds) or id(module) in self._models
        if counts and given and isinstance(given[0], Tensor):
            backward = torch.is_grad_enabled() and given[0].requires_grad
            self._asked += len(given[0]) * (1 + BACKWARD * backward)

    def _show(self, ended: threading.Event) -> None:
        while not ended.wait(0.5):
            self._bar.update(self._task, completed=self.share, ends=time.monotonic() + self.left())


def standing(target: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, seed: int) -> float:
    """Return the share of the images that stand after a short attack, for the two functions below."""
    white = replace(threat, knowledge="white-box")
    return evaluate(SUITES["quick"], target, x_NCHW, y_N, white, seed=seed).attacked.accuracy


def audit_passes(target: nn.Module, stand: float) -> float:
    """Return the passes that an audit takes for each image, about."""
    further = 1 + SOURCE * (len(gradients(target)) - 1) + UNDEFENDED * (bare(target) is not target)
    return (FALLEN + STANDING * stand) * further * (NOISE if stochastic(target) else 1)


def suite_passes(suite: str, target: nn.Module, stand: float) -> float:
    """Return the passes that a suite takes for each image, about."""
    return (FALLEN + SUITES_COST.get(suite, 0.0) * stand) * (SUITES[suite].draws if stochastic(target) else 1)
