"""Reproduces a paper's table: every cell runs through the store, so that nothing is trained or attacked twice.

An interrupted run continues where it stopped. Attacks use validation images: only `launch.py final` opens the test
split.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from attacks.confidence import wilson
from attacks.gradient_view import Gradient
from defenses.base import Metrics
from search.console import SAID, terminable
from search.formatting import spoken_threat
from search.reproduce import paper_tables
from search.reproduce.attack_cell import NotRun, threat
from search.reproduce.cell_setting import Setting
from search.reproduce.cells import Cells, Ours
from search.reproduce.figures import PICTURES
from search.reproduce.fraction import Fraction
from search.reproduce.page import html, markdown, said
from search.reproduce.paper_tables import Cell, Summary, Table
from search.reproduce.progress import TableProgress
from search.reproduce.results import CellResult, SummaryResult, TableResult
from search.storage.atomic import write_atomic
from search.storage.outage import trouble
from search.study.loading import make_study
from search.trial.latency import device_name
from spaces.exceptions import InputError

BANDS = (0.02, 0.05, 0.10)
"""Upper limits of the bands 0, 1 and 2 for differences in accuracy, fractions; larger differences are in band 3."""
FACTORS = (1.25, 1.5, 2.0)
"""The same for times, as factors; times are compared as multiples of the fastest defense's."""

GRADIENTS: Mapping[Gradient, str] = {"exact": "the exact gradient", "bpda": "BPDA", "surrogate": "the surrogate"}


def reproduce(
    name: str,
    *,
    fraction: float = 1.0,
    only: Sequence[str] = (),
    storage: str = "runs",
    data_dir: str | Path | None = None,
    out: Path | None = None,
    seed: int = 0,
    console: Console,
) -> TableResult:
    """Run every cell of a paper's table, and write both versions as JSON, markdown, HTML and pictures.

    Args:
        name: the name of the table, such as puvae/3.
        fraction: the fraction of the work to do (search/reproduce/fraction.py); 1 is all.
        only: labels of the cells to run, such as a data set or a classifier; none: all.
        storage: a storage; its store is shared with searches.
        out: the output folder; default: a folder in STORAGE/tables.

    Returns:
        The table, as JSON.

    Raises:
        InputError: there is no such table or label, the fraction is not in (0, 1], the seed is invalid, or the storage
            or `out` is not writable.
    """
    table, portion = paper_tables.table(name).only(only), Fraction(fraction)
    part, other = "" if portion.whole else f"-fraction-{fraction:g}", f"-seed-{seed}" if seed else ""
    part += "".join("-" + re.sub(r"\W+", "-", label) for label in only)
    study = make_study({"storage": storage, "seed": seed})
    out = out or study.root / "tables" / f"{name.replace('/', '-')}{part}{other}"
    return beside(table, portion, storage=storage, data_dir=data_dir, out=out, seed=seed, console=console)


def beside(
    table: Table,
    portion: Fraction,
    *,
    storage: str,
    data_dir: str | Path | None = None,
    out: Path,
    seed: int = 0,
    console: Console,
) -> TableResult:
    """Run every cell of `table`; see `reproduce`."""
    found = _begun(table, portion, seed, out)
    progress = TableProgress(console, len(table.cells))

    def heard(what: str, epoch: int, epochs: int, metrics: Metrics) -> None:
        progress.epoch(what, epoch, epochs)

    cells = Cells(storage, data_dir, portion, seed, heard)
    try:
        make_study({"storage": storage}).store.make()
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"a table is written into {error.filename}, but that cannot be: {error.strerror}") from None
    begin = time.monotonic()
    order = _order(table)
    with progress.running(), terminable():
        try:
            progress.expect(cells, [table.cells[i].setting for i in order])
            for i in order:
                row, setting = found["cells"][i], table.cells[i].setting
                progress.cell(" · ".join(table.cells[i].labels))
                _run_cell(cells, setting, row)
                _compare(found, table)
                progress.done(said(row, found["quantity"]), row["seconds"])
                _write(found, out, begin)
            found["state"] = "finished"
            draw = PICTURES.get(table.name)
            found["pictures"] = [] if draw is None else [path.name for path in draw(found, table, cells, out)]
        except KeyboardInterrupt as stop:
            stop.add_note(SAID)
            found["state"] = "interrupted"
            console.print("interrupted: what is done is kept, and the same command goes on", highlight=False)
            raise
        finally:
            _write(found, out, begin)
    console.print(f"{out / 'table.html'}, .md and .json", highlight=False, soft_wrap=True)
    return found


def _begun(table: Table, portion: Fraction, seed: int, out: Path) -> TableResult:
    """Return the table without any results of ours."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "name": table.name,
        "title": table.title,
        "citation": table.citation,
        "source": table.source,
        "quantity": table.quantity,
        "remark": table.remark,
        "threat": table.threat,
        "called": table.called,
        "dimensions": list(table.dimensions),
        "labels": {name: list(labels) for name, labels in table.labels.items()},
        "fraction": portion.fraction,
        "meaning": str(portion),
        "split": "validation",
        "seed": seed,
        "device": device_name(device),
        "state": "running",
        "folder": str(out),
        "seconds": 0.0,
        "cells": [_not_reached(table, cell) for cell in table.cells],
        "summaries": [],
        "pictures": [],
    }


def _not_reached(table: Table, cell: Cell) -> CellResult:
    return {
        "labels": dict(zip(table.dimensions, cell.labels, strict=True)),
        "paper": cell.value,
        "printed": cell.printed,
        "note": cell.note,
        "measure": cell.setting.measure,
        "threat": _named(cell.setting),
        "setting": asdict(cell.setting),
        "ours": None,
        "interval": None,
        "distance": None,
        "band": None,
        "images": 0,
        "seconds": 0.0,
        "ran": {},
        "not_run": "not reached yet",
    }


def _named(setting: Setting) -> str:
    """Return the correct name of the threat model of a cell."""
    if setting.measure == "fooled":
        return "white-box, from noise, bounded by no eps"
    if setting.attack is None:
        return "no attack"
    asks = ", by a substitute that asks the bare classifier" if setting.oracle == "bare" else ""
    asks += ", at each wrong class in turn" if setting.every_target else ""
    asks += f", by {GRADIENTS[setting.gradient]} alone" if setting.gradient else ""
    if setting.eps is None:
        return f"{setting.knowledge}, least L2, bounded by no eps{asks}"
    return spoken_threat(threat(setting)) + asks


def _order(table: Table) -> list[int]:
    """Return the indices of the cells in running order: bare classifiers first, then grouped by training.

    Ratios come last, beginning with the cell that the others are multiples of.
    """
    groups: dict[tuple[float, bool, str, str, str, str], list[int]] = {}
    for i, cell in enumerate(table.cells):
        s = cell.setting
        bare, knobs = s.defense == "none", str(sorted(s.knobs.items()))
        far = 1 + abs((cell.value or 0.0) - 1) if s.measure == "ratio" else 0.0
        groups.setdefault((far, not bare, s.defense, s.task, s.protect or "", knobs), []).append(i)
    return [i for group in sorted(groups, key=lambda group: group[:2]) for i in groups[group]]


def _run_cell(cells: Cells, setting: Setting, row: CellResult) -> None:
    """Run a cell and record its result; an error is recorded in the cell and does not end the run."""
    try:
        ours: Ours = cells.run(setting)
    except NotRun as reason:
        row["not_run"] = str(reason)
    except Exception as error:  # any error of a defense
        if trouble(error):
            raise
        words = str(error).splitlines()[0] if str(error) else "no reason given"
        row["not_run"] = f"{type(error).__name__}: {words}"
    else:
        row["ours"], row["not_run"] = ours.value, ""
        row["interval"] = wilson(ours.value, ours.images) if ours.images else None
        row["images"], row["seconds"], row["ran"] = ours.images, ours.seconds, dict(ours.ran)
        row["extrapolated"] = ours.extrapolated


def _compare(found: TableResult, table: Table) -> None:
    """Set the distances: differences of fractions, and ratios of times relative to the fastest defense."""
    rows = found["cells"]
    timed = [row for row in rows if row["measure"] in ("seconds", "ratio") and row["ours"] is not None]
    for row in rows:
        if row["ours"] is None or row["paper"] is None or row in timed:
            continue
        distance = row["distance"] = row["ours"] - row["paper"]
        row["band"] = sum(abs(distance) > limit + 1e-9 for limit in BANDS)
    for measure in ("seconds", "ratio"):
        _compare_times([row for row in timed if row["measure"] == measure])
    found["summaries"] = [_summed(one, rows) for one in table.summaries]


def _compare_times(rows: Sequence[CellResult]) -> None:
    """Compare times as multiples of a base cell: the fastest in the paper, or the one with ratio 1 there."""
    times = [(row, row["ours"], row["paper"]) for row in rows if row["ours"] is not None and row["paper"]]
    far = {"seconds": lambda paper: paper, "ratio": lambda paper: abs(paper - 1)}
    for row, ours, paper in times:
        base, base_ours, base_paper = min(times, key=lambda time: far[row["measure"]](time[2]))
        own, theirs = ours / base_ours, paper / base_paper
        row["relative"] = {"ours": own, "paper": theirs, "to": " · ".join(base["labels"].values())}
        row["distance"] = own / theirs
        row["band"] = sum(max(own / theirs, theirs / own) > factor for factor in FACTORS)


def _summed(summary: Summary, rows: Sequence[CellResult]) -> SummaryResult:
    """Return a number that the paper gives for many cells, and our number over the cells that ran."""
    alike = [r for r in rows if all(r["labels"][name] == label for name, label in summary.labels.items())]
    ours = [row["ours"] for row in alike if row["ours"] is not None]
    value = (max(ours) if summary.kind == "largest" else sum(ours) / len(ours)) if ours else None
    return {
        "kind": summary.kind,
        "labels": dict(summary.labels),
        "paper": summary.value,
        "printed": summary.printed,
        "note": summary.note,
        "ours": value,
        "cells": len(ours),
        "of": len(alike),
        "distance": value - summary.value if value is not None and len(ours) == len(alike) else None,
    }


def _write(found: TableResult, out: Path, begin: float) -> None:
    found["seconds"] = round(time.monotonic() - begin, 1)
    for name, text in (
        ("table.json", json.dumps(found, indent=1)),
        ("table.md", markdown(found)),
        ("table.html", html(found, out)),
    ):
        write_atomic(out / name, text.encode())
