"""Writes the table of a final run as markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from attacks.threat import ThreatModel
from search.export.checks import spoken
from search.final.evaluation import AUTOATTACK, FULL
from search.final.table import COLUMNS, INTERVAL
from search.formatting import counted, points, spoken_device, spoken_threat
from search.storage.atomic import write_atomic
from search.study.verdict import TRAINED, UNDEFENDED, Figures, verdict

Row = Mapping[str, Any]


def forms(table: Mapping[str, Any]) -> dict[str, str]:
    """Return the content of each file of a table by file name."""
    return {
        "FINAL.md": page(table),
        "FINAL.csv": as_csv(table),
        "FINAL.tex": latex(table),
        "FINAL.json": json.dumps(table, indent=1) + "\n",
    }


def write(folder: Path, table: Mapping[str, Any]) -> None:
    """Write a table in all formats."""
    folder.mkdir(exist_ok=True)
    for name, text in forms(table).items():
        write_atomic(folder / name, text.encode())


def as_csv(table: Mapping[str, Any]) -> str:
    """Return one row per figure, accuracies as fractions; each row has the limits of the run and its test openings."""
    alarms = {one["export"]: "; ".join(one["alarms"]) for one in table["exports"]}
    changed = {one["export"]: one["changed"] for one in table["exports"]}
    looks = {one["export"]: len(one["looks"]) for one in table["exports"]}
    rows = [
        {
            **row,
            "each": " ".join(f"{x:.6g}" for x in row["each"]),
            "split": "test",
            "look": looks.get(row["export"], max(looks.values())),  # a baseline has no log: use the exports'
            "smaller": table["smaller"],
            "alarms": alarms.get(row["export"], ""),
            "changed": changed.get(row["export"], ""),
        }
        for row in table["rows"]
    ]
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")  # object: keeps integers


def _models(table: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Row]]:
    """Return the rows of each model by column: one of `COLUMNS`, or a latency."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in table["rows"]:
        accuracy = row["figure"] == "accuracy"
        parts = (row["suite"], row["knowledge"]) if accuracy else (row["figure"], row["device"])
        what = "/".join(filter(None, parts))
        found.setdefault((row["export"], row["model"]), {})[what] = row
    return found


def _cells(rows: Mapping[str, Row], plus_minus: str, dash: str) -> list[str]:
    cells = []
    for what in COLUMNS:
        row = rows[what]
        spread = "" if row["deviation"] is None else f" {plus_minus} {points(row['deviation'])}"
        cells.append(f"{points(row['mean'])}{spread} [{points(row['low'])}{dash}{points(row['high'])}]")
    timed = [row for row in rows.values() if row["figure"] == "latency_ms_p50"]
    devices = [f" ({spoken_device(row['device'])})" if len(timed) > 1 else "" for row in timed]
    return [*cells, ", ".join(f"{row['mean']:.3g}{on}" for row, on in zip(timed, devices, strict=True)) or dash]


def page(table: Mapping[str, Any]) -> str:
    """Return the table in markdown."""
    lines = ["| model | " + " | ".join(f"{name} %" for name in COLUMNS.values()) + " | p50 ms |"]
    lines.append("| --- |" + " --- |" * (len(COLUMNS) + 1))
    for (export, model), rows in _models(table).items():
        name = f"**{model} {export}**" if export else model
        lines.append(f"| {name} | " + " | ".join(_cells(rows, "±", "–")) + " |")
    threats = {spoken_threat(ThreatModel(**one["threat"])): None for one in table["exports"]}
    several = len(table["exports"]) > 1
    parts = [
        f"# Final run on the test split of {table['dataset']}",
        *_warnings(table),
        "\n".join(f"**Verdict on {one['export']}: {_verdict(table, one)}.**" for one in table["exports"]),
        f"{counted(len(table['trained']), 'training')}, seeded {', '.join(map(str, table['trained']))}, on "
        f"{table['trained_on']}; "
        f"{table['images']} test images attacked. Chosen under: {'; '.join(threats)}. `oblivious` (the attacker does "
        "not know the defense), `black-box` (sees only answers) and `white-box` (knows all) are the suite "
        f"`{FULL}` at the same norm and eps, `AutoAttack` is the suite `{AUTOATTACK}` alone, white-box. Figures: "
        f"{INTERVAL}.",
        "\n".join(lines),
        *_rejections(table),
        "## How optimistic the search was",
        *(_spoken_optimism(one) for one in table["exports"]),
        "## What the audit says",
        *(_audited(one) for one in table["exports"]),
    ]
    if several:
        parts.append(
            f"{len(table['exports'])} exports stand side by side on the same test images: who picks the best of them "
            "by this table makes its figure optimistic again."
        )
    return "\n\n".join(parts) + "\n"


def _warnings(table: Mapping[str, Any]) -> list[str]:
    lines = [
        f"> **CHANGED** {one['export']} {one['changed']}: these figures are of the code as it is now."
        for one in table["exports"]
        if one["changed"]
    ]
    lines += [f"> **FAILED CHECK** {one['export']}: {alarm}" for one in table["exports"] for alarm in one["alarms"]]
    lines += [f"> **This is {table['smaller']}.**"] if table["smaller"] else []
    for one in table["exports"]:
        if len(one["looks"]) > 1:
            before = "; ".join(
                f"{look['when']}, {look['images']} images, seeds {look['seeds']}" for look in one["looks"][:-1]
            )
            lines.append(
                f"> **Look {len(one['looks'])} at the test split** by {one['export']}: it was opened before "
                f"({before}). What was learnt then may have shaped what is judged now."
            )
        if one["opened_beside"]:
            lines.append(
                f"> The test split was opened for {len(one['opened_beside'])} more of {one['export']}'s folder too "
                f"({', '.join(one['opened_beside'])}): the best of several is optimistic."
            )
    return ["\n>\n".join(lines)] if lines else []


def _verdict(table: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    """Return what an export is worth on the test images, by the means over the seeds."""
    models = _models(table)
    name = next(model for export, model in models if export == one["export"])
    where = name.partition(" (")[2]  # the protected classifier, norm and eps

    def baseline(kind: str) -> Figures | None:
        """Two exports may have different baselines of one name; that of the second is named after it."""
        named = (f"{kind} ({where} beside {one['export']}", f"{kind} ({where}")
        return next((figures(models["", model]) for model in named if ("", model) in models), None)

    def figures(rows: Mapping[str, Row]) -> Figures:
        attacked = rows[f"{FULL}/{one['threat']['knowledge']}"]
        white_box, clean = (rows[what]["mean"] for what in (f"{FULL}/white-box", "clean"))
        return Figures(attacked["mean"], attacked["error"], white_box, clean)

    undefended = baseline(UNDEFENDED)
    assert undefended is not None
    winner = figures(models[one["export"], name])
    return verdict(ThreatModel(**one["threat"]), table["images"], winner, undefended, baseline(TRAINED))


def _rejections(table: Mapping[str, Any]) -> list[str]:
    """Return the rejection rates, one line per model that rejects."""
    lines = []
    for (export, model), rows in _models(table).items():
        if any(rows[what]["rejection"] for what in COLUMNS):
            told = (f"{COLUMNS[w]} {points(rows[w]['rejection'])} ({points(rows[w]['error'])})" for w in COLUMNS)
            lines.append(f"{model} {export} rejects, and accepts wrongly (in brackets), percent: {', '.join(told)}.")
    return ["\n".join(lines)] if lines else []


def _spoken_optimism(one: Mapping[str, Any]) -> str:
    lines = [f"{one['export']}, attacked accuracy under {spoken_threat(ThreatModel(**one['threat']))}:"]
    for each in one["optimism"]:
        again, way = each["retrained"], "optimistic" if each["optimistic"] >= 0 else "pessimistic"
        deviation = "" if again["deviation"] is None else f" ± {points(again['deviation'])}"
        lines.append(
            f"- the {each['by']}'s figure (suite {each['suite']}, {each['validation_images']} validation images) was "
            f"{points(each['validation'])} %; the same attacks leave the same weights {points(each['test'])} % of "
            f"{each['test_images']} test images: {way} by {points(abs(each['optimistic']))} points (95 % interval of "
            f"the difference {points(each['low'])} to {points(each['high'])}). Retrained: "
            f"{points(again['mean'])}{deviation} %."
        )
    return "\n".join(lines)


def _audited(one: Mapping[str, Any]) -> str:
    counts: dict[str, int] = {}
    for alarms in one["alarms_on_test"]:
        for alarm in alarms:
            counts[alarm] = counts.get(alarm, 0) + 1
    seeds = len(one["alarms_on_test"])
    again = "; ".join(f"FAILED in {n} of {seeds} seeds: {alarm}" for alarm, n in counts.items()) or "no check failed"
    validation, tested = (one["optimism"][1][f"{split}_images"] for split in ("validation", "test"))
    exported = "; ".join(f"FAILED {alarm}" for alarm in one["alarms_on_test_as_exported"]) or "no check failed"
    before = "".join(f"\nFAILED {alarm}" for alarm in one["alarms"])
    return (
        f"{one['export']}, before the export, on {validation} validation images: {spoken(one['checks'])}.{before}\n"
        f"Audited again on {tested} test images: as it was exported, {exported}; retrained, {again}."
    )


def latex(table: Mapping[str, Any]) -> str:
    """Return the table as a LaTeX tabular that needs no package."""
    heads = ["model", *(f"{name} %" for name in COLUMNS.values()), "p50 ms"]
    rows = [(f"{m} {export}".strip(), *_cells(rows, "±", "–")) for (export, m), rows in _models(table).items()]
    styled = pd.DataFrame(rows, columns=heads).style.hide(axis="index")
    styled = styled.format(escape="latex").format_index(escape="latex", axis="columns")
    begin, head, *body, end = styled.to_latex(column_format="l" + "r" * (len(heads) - 1)).splitlines()
    lines = [begin, r"\hline", head, r"\hline", *body, r"\hline", end]
    said = f"Test split of {table['dataset']}, {len(table['trained'])} seeds; AutoAttack is white-box. {INTERVAL}."
    notes = [
        said,
        *_warnings(table),
        *([f"print this beside the table: {table['smaller']}"] if table["smaller"] else []),
    ]
    comments = [f"% {line}" for text in notes for line in text.splitlines()]
    return "\n".join((*comments, *(line.replace("–", "--").replace("±", r"$\pm$") for line in lines))) + "\n"
