"""The types of table.json, the result of a reproduction."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class Relative(TypedDict):
    """A time as a multiple of that of the cell `to`, ours and the paper's."""

    ours: float
    paper: float
    to: str


class CellResult(TypedDict):
    """One number of a paper beside ours: fractions, or seconds. `printed` is "ours" where the paper has no such cell.

    `band` grades the difference: 0 smallest, 3 largest. `ran` is the size of this run: training images, epochs, knobs
    that the fraction reduced. `not_run` is the reason if there is no number of ours; otherwise it is empty.
    `extrapolated`: our time, `ours` or `batch_s`, is that of few steps multiplied; it was not waited for.
    """

    labels: dict[str, str]
    paper: float | None
    printed: str
    note: str
    measure: str
    threat: str
    setting: dict[str, Any]
    ours: float | None
    interval: tuple[float, float] | None
    distance: float | None
    band: int | None
    images: int
    seconds: float
    ran: dict[str, Any]
    not_run: str
    relative: NotRequired[Relative]
    batch_s: NotRequired[float]
    extrapolated: NotRequired[bool]


class SummaryResult(TypedDict):
    """A number that a paper gives for many cells, and ours over the `cells` of them that ran."""

    kind: str
    labels: dict[str, str]
    paper: float
    printed: str
    note: str
    ours: float | None
    cells: int
    of: int
    distance: float | None


class TableResult(TypedDict):
    """A paper's table beside ours."""

    name: str
    title: str
    citation: str
    source: str
    quantity: Literal["accuracy", "seconds"]
    remark: str
    threat: str
    called: str
    dimensions: list[str]
    labels: dict[str, list[str]]
    fraction: float
    meaning: str
    split: str
    seed: int
    device: str
    state: Literal["running", "finished", "interrupted"]
    folder: str
    seconds: float
    cells: list[CellResult]
    summaries: list[SummaryResult]
    pictures: list[str]
