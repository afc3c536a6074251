"""Renders a paper's table beside ours: for a terminal, in markdown, and as one self-contained HTML page."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attacks.black_box import STEP
from search.formatting import counted, duration, points, spoken_device
from search.reproduce.cells import ROUNDS, TIMED
from search.reproduce.paper_tables import OURS, tables
from search.reproduce.results import CellResult, SummaryResult, TableResult
from search.templates import render

LEGEND = ("within 2 points", "within 5", "within 10", "more")
TIMES = ("within 1.25 times", "within 1.5 times", "within 2 times", "more")
MUCH = 0.10
"""Largest difference without a note between the bare classifier's accuracy here and in the paper, a fraction."""
EXTRAPOLATED = "≈"
"""Stands before a time that was not waited for."""
STYLES = ("bold blue", "cyan", "yellow", "bold magenta")
"""Styles of the bands, distinguishable with red-green colour blindness; the difference is also printed in digits."""
SPLIT = (
    "Ours are of validation images, the first ones in the data set's own order, so the same in every cell; the paper's "
    "are of test images: the test split is opened by launch.py final alone. "
    "A network that is trained too briefly may lie as far from the paper as a wrong one."
)


def page(found: TableResult) -> RenderableType:
    """Return the table for a terminal: our figure, the paper's, and the difference."""
    columns = found["dimensions"][-1]
    table = Table(title=f"{found['name']}: {found['title']}", title_justify="left", pad_edge=False)
    for name in found["dimensions"][:-1]:
        table.add_column(name)
    for label in found["labels"][columns]:
        table.add_column(label, justify="right")
    for heads, cells in _lines(found):
        table.add_row(*heads, *(_cell(cell) for cell in cells))
    legend = Text("ours over the paper's, and the difference: ")
    for style, words in zip(STYLES, _legend(found), strict=True):
        legend.append(words + "  ", style)
    return Group(table, legend, *(Text(line) for line in notes(found)))


def said(row: CellResult, quantity: str) -> str:
    """Return one cell as a line of text."""
    if row["not_run"]:
        return f"not run: {row['not_run']}"
    ours, paper, distance = figures(row)
    interval = " to ".join(f"{100 * edge:.1f}" for edge in row["interval"]) if row["interval"] else ""
    between = f" ({interval})" if interval else ""
    if row["printed"] == OURS:
        return f"ours {ours}{between}; the paper has none"
    return f"ours {ours}{between}, the paper's {paper}" + (f", {distance}" if distance else "")


def figures(row: CellResult) -> tuple[str, str, str]:
    """Return our figure, the paper's and the difference as text; times are compared as multiples of a base cell's."""
    unknown, relative = row["paper"] is None, row.get("relative")
    about = EXTRAPOLATED if row.get("extrapolated") else ""
    if row["measure"] == "ratio":
        ours = "–" if relative is None else f"{about}{relative['ours']:.3g}"
    elif row["measure"] == "seconds":
        ours = f"{about}{row['ours']:.3g} s" + (f" ({relative['ours']:.3g}×)" if relative else "")
    else:
        ours = points(row["ours"])
    paper = "–" if row["printed"] == OURS else row["printed"]
    paper += " s" if row["measure"] == "seconds" and not unknown else ""
    if relative and row["measure"] == "seconds":
        paper += f" ({relative['paper']:.3g}×)"
    if row["distance"] is None:
        return ours, paper, ""
    return ours, paper, f"×{row['distance']:.2g}" if relative else f"{100 * row['distance']:+.1f}".replace("-", "−")


def notes(found: TableResult) -> list[str]:
    """Return the notes that a reader of the table needs."""
    ran = sum(not row["not_run"] for row in found["cells"])
    threats = "; ".join(dict.fromkeys(row["threat"] for row in found["cells"] if row["setting"]["attack"]))
    state = "" if found["state"] == "finished" else f" ({found['state']}; the same command goes on from here)"
    lines = [
        f"Source: {found['citation']}, {found['source']}.",
        f"Threat model: {found['threat']}." + (f" Attacks: {threats}." if threats else ""),
        f"This run: {found['meaning']}. Seed {found['seed']}, {spoken_device(found['device'])}.",
        f"{ran} of {len(found['cells'])} cells ran{state}, in {duration(found['seconds'])} this time.",
        SPLIT,
    ]
    if any(row["measure"] in ("seconds", "ratio") for row in found["cells"]):
        lines.append("Times differ by machine, so what is compared is each as a multiple of the fastest defense's (×).")
    if any(row["setting"]["knowledge"] == "black-box" for row in found["cells"]):
        lines.append(
            "The black-box attacker starts from the last 150 validation images, which are not attacked; it moves them "
            f"by a step of {-STEP:g} in {ROUNDS} rounds, or fewer where the run is a fraction."
        )
    lines += [found["remark"]] if found["remark"] else []
    if far := [row for row in found["cells"] if row.get("extrapolated")]:
        here = EXTRAPOLATED if any(row["measure"] in ("seconds", "ratio") for row in far) else "In the figure"
        lines.append(
            f"{here}: {counted(len(far), 'time')} extrapolated from {TIMED[0]} and {TIMED[1]} steps, since all steps "
            "cost the same; only the whole table (--fraction 1) waits for all of them."
        )
    lines += [_weaker(row) for row in found["cells"] if row["setting"]["defense"] == "none" and _fools(row)]
    lines += [f"{_where(row)}: {row['note']}." for row in found["cells"] if row["note"]]
    lines += [_summary(one) for one in found["summaries"]]
    lines += [f"{what}: {', '.join(f'{n} {v}' for n, v in ran.items())}." for what, ran in runs(found)]
    return lines + [f"Not run: {why} ({count} cells)." for why, count in missing(found).items()]


def _fools(row: CellResult) -> bool:
    """Return whether the bare classifier keeps much more accuracy under attack here than in the paper."""
    return row["setting"]["attack"] is not None and row["distance"] is not None and row["distance"] > MUCH


def _weaker(row: CellResult) -> str:
    ours, paper, _ = figures(row)
    return f"{_where(row)}: the bare classifier keeps {ours} % here and {paper} % there, so the attacks are not alike."


def _where(row: CellResult | SummaryResult) -> str:
    return " · ".join(row["labels"].values())


def runs(found: TableResult) -> list[tuple[str, dict[str, Any]]]:
    """Return the size of each training of this run: images, epochs, batch size, and reduced knobs."""
    kept: list[tuple[str, dict[str, Any]]] = []
    for row in found["cells"]:
        defense = row["setting"]["defense"]
        one = ("classifier" if defense == "none" else defense, {n.replace("_", " "): v for n, v in row["ran"].items()})
        if row["ran"] and one not in kept:
            kept.append(one)
    return kept


def missing(found: TableResult) -> dict[str, int]:
    """Return the reasons why cells were not run, with the number of cells."""
    why = [row["not_run"] for row in found["cells"] if row["not_run"]]
    return {reason: why.count(reason) for reason in why}


def markdown(found: TableResult) -> str:
    """Return the table in markdown: our figure / the paper's (difference)."""
    lines = [f"# {found['name']}: {found['title']}", "", *cells_only(found)]
    pictures = [f"\n![{found['title']}]({name})" for name in found["pictures"]]
    return "\n".join([*lines, *pictures, "", *(f"- {line}" for line in notes(found))]) + "\n"


def cells_only(found: TableResult) -> Iterator[str]:
    """Yield the lines of the table in markdown, without its title and notes."""
    *leading, columns = found["dimensions"]
    heads = [*leading, *found["labels"][columns]]
    yield from (_row(heads), _row(["---"] * len(heads)))
    for labels, cells in _lines(found, blank=False):
        yield _row([*labels, *(_cell(cell).plain.replace("\n", " ") for cell in cells)])


def html(found: TableResult, out: Path) -> str:
    """Return a self-contained HTML page; its pictures are read from `out`."""
    pictures = [_embedded(out / name) for name in found["pictures"]]
    return render(
        Path(__file__).parent / "templates" / "reproduce.html.j2",
        found=found,
        lines=list(_lines(found)),
        alone=OURS,
        figures=figures,
        said=said,
        duration=duration,
        legend=_legend(found),
        notes=notes(found),
        pictures=pictures,
        flags=_flags(found),
    )


def _flags(found: TableResult) -> str:
    """Return the flags of the command that makes the same cells again."""
    whole = {one.name: one.labels for one in tables()}.get(found["name"], {})
    part = [labels for name, labels in found["labels"].items() if tuple(labels) != whole.get(name, tuple(labels))]
    flags = "" if found["fraction"] == 1 else f" --fraction {found['fraction']:g}"
    flags += "".join(f" --only {shlex.quote(label)}" for labels in part for label in labels)
    return flags + (f" --seed {found['seed']}" if found["seed"] else "")


def _embedded(path: Path) -> str:
    kind = "svg+xml" if path.suffix == ".svg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _lines(found: TableResult, *, blank: bool = True) -> Iterator[tuple[Sequence[str], list[CellResult | None]]]:
    """Yield the labels and cells of each line; with `blank`, repeated labels are empty."""
    *leading, columns = found["dimensions"]
    cells: dict[tuple[str, ...], dict[str, CellResult]] = {}
    for row in found["cells"]:
        cells.setdefault(tuple(row["labels"][name] for name in leading), {})[row["labels"][columns]] = row
    before: Sequence[str] = ()
    for heads, line in cells.items():
        same = [i < len(heads) - 1 and heads[: i + 1] == tuple(before[: i + 1]) for i in range(len(heads))]
        yield (
            ["" if blank and again else head for again, head in zip(same, heads, strict=True)],
            [line.get(label) for label in found["labels"][columns]],
        )
        before = heads


def _cell(row: CellResult | None) -> Text:
    if row is None:
        return Text("")
    if row["not_run"]:
        return Text("not run" + ("" if row["printed"] == OURS else f" / {row['printed']}"), "dim")
    ours, paper, distance = figures(row)
    if row["printed"] == OURS:
        return Text(ours)
    style = "" if row["band"] is None else STYLES[row["band"]]
    return Text(f"{ours} / {paper}" + (f"\n({distance})" if distance else ""), style)


def _legend(found: TableResult) -> Sequence[str]:
    return TIMES if found["quantity"] == "seconds" else LEGEND


def _summary(one: SummaryResult) -> str:
    where, note = _where(one), f" ({one['note']})" if one["note"] else ""
    if one["ours"] is None:
        return f"{one['kind']} of {where}: the paper's {one['printed']}{note}; none of ours ran."
    ours = f"{100 * one['ours']:.1f} over {one['cells']} of {one['of']} cells"
    apart = "of all cells, so they do not compare"
    if one["distance"] is not None:
        apart = f"{100 * one['distance']:+.1f}".replace("-", "−")
    return f"{one['kind']} of {where}: ours {ours}, the paper's {one['printed']}{note}, {apart}."


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
