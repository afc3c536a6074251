"""The papers' tables as data: every number to reproduce, and its setting.

The numbers are in `tables/`, one file per paper, as printed: accuracies in percent. Here they are converted to
fractions. A table is a block of cells along named dimensions; the last dimension is the columns. Each label of a
dimension has fields of a Setting. The setting of a cell is the defaults of the table, overridden by the fields of its
labels in the order of the dimensions. PuVAE and Defense-VAE call oblivious attacks white-box; here they are oblivious.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from operator import contains
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from attacks.threat import Knowledge
from search.reproduce.cell_setting import Setting, setting
from spaces.exceptions import InputError, choose

FOLDER = Path(__file__).parent / "tables"
Kind = Literal["average", "largest"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ABSENT, ILLEGIBLE, OURS = "-", "?", "ours"
"""How a file marks a cell that is empty in the paper, one whose number is not in the paper's text, and one that the
paper does not have and that stands beside it: ours alone."""


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Args:
        labels: one for each dimension.
        value: a fraction, or seconds; None if the paper's text does not have it.
        printed: the number as printed in the paper; `OURS` if the paper has no such cell.
        note: a doubt about the number.
    """

    labels: tuple[str, ...]
    value: float | None
    printed: str
    setting: Setting
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """A number that the paper gives for many cells: all cells that have `labels`."""

    kind: Kind
    labels: Mapping[str, str]
    value: float
    printed: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of a paper.

    Args:
        name: paper and number, such as puvae/3.
        title: what the table shows.
        citation: the paper.
        source: the place in the paper.
        file: the file of the paper's text; the numbers are in its `lines`.
        quantity: `accuracy` (fractions; errors and rejections too) or `seconds`.
        called: the paper's name of its threat model; empty if it has none.
        dimensions: names in order; the last dimension is the columns.
        labels: the labels of each dimension, in the order of the paper.
        remark: a note for readers of the numbers.
    """

    name: str
    title: str
    citation: str
    source: str
    file: str
    lines: tuple[int, int]
    quantity: Literal["accuracy", "seconds"]
    called: str
    dimensions: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    summaries: tuple[Summary, ...]
    remark: str

    def cell(self, *labels: str) -> Cell | None:
        """Return the cell with these labels, one for each dimension; None if it is empty in the paper."""
        return next((cell for cell in self.cells if cell.labels == labels), None)

    def of(self, labels: Mapping[str, str]) -> list[Cell]:
        """Return the cells that have these labels."""
        places = {self.dimensions.index(name): label for name, label in labels.items()}
        return [cell for cell in self.cells if all(cell.labels[i] == label for i, label in places.items())]

    def only(self, labels: Sequence[str]) -> Table:
        """Return the part with these labels: of a dimension that has some of them, no others; without labels, all.

        Raises:
            InputError: there is no such label, or no cell has one of each dimension.
        """
        for label in labels:
            choose(f"a label of {self.name}", label, [one for legal in self.labels.values() for one in legal])
        kept = {name: tuple(one for one in legal if one in labels) or legal for name, legal in self.labels.items()}
        cells = tuple(cell for cell in self.cells if all(map(contains, kept.values(), cell.labels)))
        if not cells:
            raise InputError(f"{self.name} must have a cell for the labels to keep, but has none for {list(labels)}")
        title = ", ".join((self.title, *labels)) + " alone" if labels else self.title
        part = replace(self, title=title, labels=kept, cells=cells)
        whole = (one for one in self.summaries if len(part.of(one.labels)) == len(self.of(one.labels)))
        return replace(part, summaries=tuple(whole))

    @property
    def knowledge(self) -> tuple[Knowledge, ...]:
        """The true knowledge levels of its attackers."""
        found = {cell.setting.knowledge for cell in self.cells if cell.setting.attacks}
        return tuple(known for known in get_args(Knowledge) if known in found)

    @property
    def threat(self) -> str:
        """The correct name of its threat model, with the paper's name if that differs."""
        if not self.knowledge:
            return "no attack"
        true = ", ".join(self.knowledge)
        return true if self.called in ("", true) else f'{true} (the paper says "{self.called}")'


@cache
def tables() -> list[Table]:
    """Return all tables, sorted by paper."""
    return [table for path in sorted(FOLDER.glob("*.yaml")) for table in read(path.read_text(encoding="utf-8"))]


def table(name: str) -> Table:
    """Return the table called `name`, such as puvae/3.

    Raises:
        InputError: there is none; the message lists the names of all tables.
    """
    known = {table.name: table for table in tables()}
    return known[choose("a table", name, list(known))]


def read(text: str) -> Iterator[Table]:
    """Yield the tables of one file.

    Raises:
        InputError: a label, number or setting is invalid; the message names the table.
    """
    paper = yaml.safe_load(text)
    for raw in paper["tables"]:
        try:
            yield _table(raw, paper["papers"][raw["name"].partition("/")[0]])
        except (InputError, KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"table {raw.get('name')}: {type(error).__name__}: {error}") from error


def _table(raw: dict[str, Any], paper: Mapping[str, str]) -> Table:
    cells, summaries = _numbers(raw)
    return Table(
        name=raw["name"],
        title=raw["title"],
        citation=paper["citation"],
        source=raw["source"],
        file=paper["file"],
        lines=tuple(raw["lines"]),
        quantity=raw.get("quantity", "accuracy"),
        called=raw.get("called", ""),
        dimensions=tuple(raw["labels"]),
        labels={name: tuple(legal) for name, legal in raw["labels"].items()},
        cells=tuple(cells),
        summaries=tuple(summaries),
        remark=raw.get("remark", ""),
    )


def _numbers(raw: dict[str, Any]) -> tuple[list[Cell], list[Summary]]:
    """Parse lines such as `A | FGSM | 12.46 78.57` into cells and summaries."""
    labels: Mapping[str, Mapping[str, Any]] = raw["labels"]
    *leading, columns = labels
    timed = raw.get("quantity") == "seconds"
    notes = {tuple(key.split(" | ")): text for key, text in raw.get("notes", {}).items()}
    cells: list[Cell] = []
    summaries: list[Summary] = []
    for line in raw["values"].splitlines():
        *heads, values = (part.strip() for part in line.split("|"))
        kind = heads[-1] if heads and heads[-1] in KINDS else None
        if len(values.split()) != len(labels[columns]) or (kind is None and len(heads) != len(leading)):
            raise ValueError(f"a row must have {len(leading)} labels and {len(labels[columns])} values: {line!r}")
        for column, printed in zip(labels[columns], values.split(), strict=True):
            value, note = _value(printed, timed), notes.pop((*heads, column), "")
            if kind is None and printed != ABSENT:
                chosen = [_of(name, label, labels) for name, label in zip(labels, (*heads, column), strict=True)]
                made = setting([raw["defaults"], *chosen])
                cells.append(Cell((*heads, column), value, printed, made, note))
            elif kind is not None and value is not None:
                named = {**dict(zip(leading, heads[:-1], strict=False)), columns: column}
                summaries.append(Summary(kind, named, value, printed, note))
    if notes:
        raise ValueError(f"a note must stand for a cell, but not {list(notes)}")
    return cells, summaries


def _of(name: str, label: str, labels: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the Setting fields of a label."""
    fields: Mapping[str, Any] = labels[name][choose(f"a label of {name}", label, list(labels[name]))]
    return fields


def _value(printed: str, timed: bool) -> float | None:
    """Parse a number; percent are converted to a fraction."""
    if printed in (ABSENT, ILLEGIBLE, OURS):
        return None
    return float(Decimal(printed) / (1 if timed else 100))
