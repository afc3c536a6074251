"""The raw rows behind a table of docs/results.md: searches read from a storage, and the table made of them again.

    python -m benchmarks.result_rows collect --storage /tmp/runs lambda-kl class-mean > docs/results/puvae-kl.json
    python -m benchmarks.result_rows table docs/results/puvae-kl.json

A row is a candidate at one inference setting. Each oblivious attack stands alone, over all images; white-box attacks
stand together. `nats` is the KL divergence to the prior in the last epoch, with the 1/2 that PuVAE's Eq. 16 leaves out.
`table` takes the table.json of `launch.py reproduce` too, and a JSON list of several that differ in their size alone.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from search.formatting import points
from search.optimizer.history import SearchHistory
from search.reproduce.page import cells_only
from search.reproduce.results import TableResult
from search.study.candidate import Candidate
from search.study.catalog import open_search
from search.study.study import Study

FURTHER = {"nats": "KL, nats", "worst draw": "worst draw", "known noise": "known noise", "ms": "ms / 128"}
"""Figures that some rows have, and their headings."""
KNOWING = "white-box", "known-noise"
"""Attacks of those who know the defense: they stand together."""
SIZE = "train_images", "epochs", "eval_images", "classifier_epochs", "seed", "precision"


def collect(storage: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the rows of searches of one task and one threat model, the undefended classifier's first.

    Raises:
        ValueError: the searches are not comparable.
    """
    studies = [open_search(name, storage) for name in names]
    alike = {(study.label, str(study.resolved.threat), study.suite, study.eval_images) for study in studies}
    if len(alike) != 1:
        raise ValueError(f"searches of one table must have one task, threat, suite and size, but are of {alike}")
    histories = [SearchHistory(study) for study in studies]
    undefended = histories[0].undefended()
    rows = [] if undefended is None else [_row(studies[0], undefended)]
    rows += [_row(h.study, one) for h in histories for one in sorted(h.candidates(), key=lambda c: c.candidate)]
    return {"task": studies[0].label, "threat": str(studies[0].resolved.threat), "rows": rows}


def _row(study: Study, candidate: Candidate) -> dict[str, Any]:
    score = candidate.score
    kept = {"clean": score.clean_accuracy, **score.attacks}
    row: dict[str, Any] = {
        "search": study.name,
        "defense": candidate.defense,
        **candidate.params.flat(),
        "images": score.images,
    }
    row |= {name: getattr(study, name) for name in SIZE if name not in row} | {"accuracy": kept}
    if candidate.defense == "puvae":
        row["nats"] = study.store.about("fits", candidate.fit)["curve"][-1]["kl"] / 2
    if score.known_noise_accuracy is not None:
        row |= {"worst draw": score.worst_draw_accuracy, "known noise": score.known_noise_accuracy}
        row["ms"] = score.latency_ms_p50
    return row


def sizes(runs: Sequence[TableResult]) -> Iterator[str]:
    """Yield the lines of a paper's table at several sizes, the smallest first: in percent, a column for each."""
    runs = sorted(runs, key=lambda run: run["fraction"])
    *leading, across = runs[0]["dimensions"]
    shown = [name for name in leading if len(runs[0]["labels"][name]) > 1]
    told = any(cell["paper"] is not None for cell in runs[0]["cells"])
    lines = dict[str, list[list[str]]]()
    heads = dict[str, None]()
    for cells in zip(*(run["cells"] for run in runs), strict=True):
        if any(cell["ours"] is not None for cell in cells):
            heads[cells[0]["labels"][across]] = None
            each = [*(points(cell["ours"]) for cell in cells), *([cells[0]["printed"]] if told else [])]
            lines.setdefault(" ".join(cells[0]["labels"][name] for name in shown), []).append(each)
    columns = [*(f"{run['fraction']:g}" for run in runs), *(["the paper's"] if told else [])]
    yield f"| {' '.join(shown)} | {' | '.join(columns)} |"
    yield f"|{' --- |' * (1 + len(columns))}"
    for label, figures in lines.items():
        cells = (" / ".join(each) for each in zip(*figures, strict=True))
        yield f"| {label or ' / '.join(heads)} | {' | '.join(cells)} |"


def table(found: Any) -> Iterator[str]:
    """Yield the lines of the Markdown table, in percent; of the knobs those that differ between its rows."""
    if isinstance(found, list):
        yield from sizes(found)
        return
    if "cells" in found:
        yield from cells_only(cast(TableResult, found))
        return
    rows = found["rows"]
    attacks = list(dict.fromkeys(name for row in rows for name in row["accuracy"] if not name.startswith(KNOWING)))
    further = [name for name in FURTHER if any(name in row for row in rows)]
    apart = {*SIZE, "search", "defense", "images", "accuracy", *FURTHER}
    (most, _), *_ = Counter(row["defense"] for row in rows).most_common(1)
    defended = [row for row in rows if row["defense"] == most]
    knobs = [name for name in defended[0] if name not in apart and len({str(row[name]) for row in defended}) > 1]
    before = [FURTHER[name] for name in further if name == "nats"]
    after = [FURTHER[name] for name in further if name != "nats"]
    heads = ["defense", *knobs, *before, *(name.removeprefix("oblivious/") for name in attacks), "white-box", *after]
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for row in rows:
        cells = [row["defense"], *(_knob(row[name]) if name in row else "–" for name in knobs)]
        cells += [f"{row['nats']:.2f}" if "nats" in row else "–" for _ in before]
        knowing = min(left for name, left in row["accuracy"].items() if name.startswith("white-box"))
        cells += [points(left) for left in (*(row["accuracy"][name] for name in attacks), knowing)]
        cells += [points(row.get(name)) for name in further if name not in ("nats", "ms")]
        cells += [f"{row['ms']:.0f}" if "ms" in row else "–" for name in further if name == "ms"]
        yield f"| {' | '.join(cells)} |"


def _knob(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("names", nargs="+")
    collecting.add_argument("--storage", required=True)
    commands.add_parser("table").add_argument("file", type=Path)
    args = parser.parse_args()
    if args.command == "collect":
        print(json.dumps(collect(args.storage, args.names), indent=1))
    else:
        print("\n".join(table(json.loads(args.file.read_bytes()))))


if __name__ == "__main__":
    main()
