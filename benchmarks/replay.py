"""Searches on a table of real trainings: what each step costs, and how good the incumbent is on held-out images.

It imports numpy alone, since the searches of others run in an environment of their own (`benchmarks/peers.py`).
Shapes: T trainings, E epochs, S inference settings, N images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).parent / "tables"
POINT = 0.01
CAP, STALE = 0.3, 40
"""A search ends when it has cost this fraction of the grid, or that many steps in succession cost nothing."""


class Step(NamedTuple):
    """A new incumbent: the cost so far as a fraction of the grid's, its accuracy on the judged and held-out images."""

    cost: float
    judged: float
    held_out: float


class Table:
    """Every training of a grid with its verdicts.

    Attributes:
        trainings: the train-time knobs of each training.
        settings: the inference-time knobs of each setting.
        levels_T: for each training, the rank of each searched knob's value, from 0.
        sizes: how many values each searched knob has; a knob of words is unordered.
        curve_TE: quick score of each epoch.
        judged_TSN, held_out_TSN: whether an image withstood the attacks; the search sees the judged images alone.
        clean_TSN: whether a clean judged image was classified correctly.
        epoch_s, image_s: seconds of an epoch, and of the attacks on one image at one setting (medians).
    """

    def __init__(self, path: Path) -> None:
        stored = np.load(path)
        about = json.loads(str(stored["about"]))
        self.name = path.stem
        self.fields: dict[str, Any] = about["fields"]
        self.trainings: list[dict[str, Any]] = about["trainings"]
        self.settings: list[dict[str, Any]] = about["settings"]
        self.epoch_s, self.image_s = about["epoch_s"], about["image_s"]
        self.curve_TE = stored["curve"].astype(float)
        bits = np.unpackbits(stored["attacked"], axis=-1)[..., : 2 * about["judged"]].astype(bool)
        self.judged_TSN, self.held_out_TSN = bits[..., : about["judged"]], bits[..., about["judged"] :]
        self.clean_TSN = np.unpackbits(stored["clean"], axis=-1)[..., : about["judged"]].astype(bool)
        self.values = _values(self.trainings)
        self.ordered = {name: not isinstance(values[0], str) for name, values in self.values.items()}
        self.levels_T = [{n: v.index(training[n]) for n, v in self.values.items()} for training in self.trainings]
        self._place = {tuple(levels.values()): t for t, levels in enumerate(self.levels_T)}

    @property
    def images(self) -> int:
        return self.judged_TSN.shape[-1]

    @property
    def epochs(self) -> int:
        return self.curve_TE.shape[1]

    @property
    def whole_s(self) -> float:
        """Seconds of the whole grid: every epoch, and every image at every setting."""
        return len(self.trainings) * (self.epochs * self.epoch_s + len(self.settings) * self.images * self.image_s)

    @property
    def winner(self) -> tuple[int, int]:
        """The training and setting that the whole grid would choose, by the judged images."""
        t, s = np.unravel_index(int(self.judged_TSN.mean(-1).argmax()), self.judged_TSN.shape[:2])
        return int(t), int(s)

    @property
    def goal(self) -> float:
        """One point below the held-out accuracy of the winner."""
        return float(self.held_out_TSN[self.winner].mean()) - POINT

    def place(self, levels: Mapping[str, int]) -> int:
        return self._place[tuple(levels[name] for name in self.values)]


def _values(trainings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of each knob that has several, in order."""
    every = {name: sorted({training[name] for training in trainings}) for name in trainings[0]}
    return {name: values for name, values in every.items() if len(values) > 1}


class Spent(BaseException):
    """Raised when a search ends; a BaseException, so that no library catches it."""


class Replay:
    """One search on a table.

    Attributes:
        cost: seconds so far.
        trail: every new incumbent.
    """

    def __init__(self, table: Table, cap: float = CAP) -> None:
        self.table = table
        self.cap = cap
        self.cost = 0.0
        self.trail: list[Step] = []
        self._free, self._most_free = 0, STALE * (table.epochs + len(table.settings))
        self._epochs = np.zeros(len(table.trainings), int)
        self._images = np.zeros((len(table.trainings), len(table.settings)), int)

    def train(self, training: int, upto: int) -> float:
        """Train up to an epoch, from the last one that was paid for, and return its quick score."""
        more = max(0, upto - self._epochs[training])
        self._epochs[training] += more
        self._pay(more * self.table.epoch_s)
        return float(self.table.curve_TE[training, upto - 1])

    def attack(self, training: int, setting: int, upto: int) -> float:
        """Attack the first images that were not attacked yet, and return the accuracy on all up to there."""
        more = max(0, upto - self._images[training, setting])
        self._images[training, setting] += more
        self._pay(more * self.table.image_s)
        found = float(self.table.judged_TSN[training, setting, :upto].mean())
        if upto == self.table.images and (not self.trail or found > self.trail[-1].judged):
            held_out = float(self.table.held_out_TSN[training, setting].mean())
            self.trail.append(Step(self.cost / self.table.whole_s, found, held_out))
        return found

    def sweep(self, training: int) -> float:
        """Attack all images at every setting of a finished training, and return the best accuracy."""
        return max(self.attack(training, setting, self.table.images) for setting in range(len(self.table.settings)))

    def _pay(self, seconds: float) -> None:
        self._free = 0 if seconds else self._free + 1
        if (self.cost + seconds) / self.table.whole_s > self.cap or self._free > self._most_free:
            raise Spent
        self.cost += seconds


def reached(table: Table, trail: Sequence[Step]) -> float:
    """Return the cost until the incumbent reached the goal; infinite if it never did."""
    return next((step.cost for step in trail if step.held_out >= table.goal - 1e-9), float("inf"))


def regret(table: Table, trail: Sequence[Step], share: float) -> float:
    """Return by how much the incumbent at this cost is below the best of the table, on held-out images."""
    held_out = [step.held_out for step in trail if step.cost <= share]
    return float(table.held_out_TSN.mean(-1).max()) - (held_out[-1] if held_out else 0.0)
