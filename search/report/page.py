"""The report: one self-contained HTML page about a finished or running search, usable without a network.

This module provides the data; the layout is in `templates/`.
"""

from __future__ import annotations

import base64
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from attacks.confidence import wilson
from search.classifiers.task import find_task
from search.data.cache import caches
from search.data.registry import find_data_set, read_index
from search.export import provenance
from search.formatting import milliseconds, percent, spoken_device, spoken_eps
from search.report.charts import ANY, charts
from search.report.cost import cost
from search.report.importance import CHANCE
from search.report.summary import Summary, TrialRecord
from search.storage.atomic import write_atomic
from search.study.candidate import Score
from search.study.columns import COLUMNS, FURTHER
from search.study.resolved import caveat
from search.study.study import Study
from search.study.verdict import UNDEFENDED
from search.templates import render as template

TEMPLATE = Path(__file__).parent / "templates" / "page.html.j2"
TOP = 10
"""Number of rows of the leaderboard."""

LINES = 400
"""Maximum number of lines in the parallel coordinates; more cannot be distinguished."""

DOTS, CURVES = 200, 100
"""Maximum numbers of dots in a slice plot and of learning curves."""

PICTURES = 6
PICTURE_BYTES = 500_000
"""Maximum total size of the pictures, in bytes, so that the page can be sent by mail."""

LIBRARIES = ("torch", "torchattacks", "optuna", "ray", "numpy")


def write(summary: Summary, path: Path) -> Path:
    """Write the page atomically and return its path."""
    return write_atomic(path, render(summary).encode())


def render(summary: Summary) -> str:
    """Return the HTML of the page."""
    study, config = summary.study, summary.study.to_yaml()
    return template(
        TEMPLATE,
        f=summary,
        study=study,
        any=ANY,
        top=summary.ranked[:TOP],
        caveat=caveat(study, summary.images),
        front={c.candidate for c in summary.front},
        interval=interval,
        columns={**COLUMNS, **FURTHER},
        figures=figures(summary),
        threat=threat_in_words(summary),
        measures=measures(summary),
        charts=charts(summary),
        lines=LINES,
        dots=DOTS,
        curves=CURVES,
        chance=CHANCE,
        pictures=pictures(summary),
        faults=summary.faults,
        alarms=summary.alarms,
        cost=cost(summary),
        dataset=find_task(study.task, study.data_dir).dataset,
        again=summary.best and provenance.again(study, summary.best.params),
        export=summary.best and provenance.export(study, summary.best.candidate),
        origins=list(origins(study)),
        config=config,
        study_yaml="data:text/yaml;base64," + base64.b64encode(config.encode()).decode(),
        plotly=Markup(get_plotlyjs()),
    )


def interval(figures: Score | Mapping[str, Any]) -> tuple[float, float]:
    """Return the 95 % Wilson interval of the attacked accuracy."""
    known = figures if isinstance(figures, Mapping) else vars(figures)
    return wilson(known["attacked_accuracy"], known["images"])


def figures(summary: Summary) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """Return the figures of the winner and of the undefended classifier: the audit's where the winner was audited."""
    winner, undefended = (vars(c.score) if c else None for c in (summary.best, summary.undefended))
    if winner is None or undefended is None or (audit := summary.audit) is None:
        return winner, undefended
    bare = audit["baselines"][UNDEFENDED]
    black_box = bare["attacked_accuracy"] if summary.study.threat == "black-box" else None
    bare = {**bare, "attacked_error": 1 - bare["attacked_accuracy"], "black_box_accuracy": black_box}
    audit = {**audit, "worst_draw_accuracy": audit.get("attacked_accuracy_worst_draw")}
    return {**winner, **audit}, {**undefended, **bare}


def threat_in_words(summary: Summary) -> str:
    knows = {
        "white-box": "The attacker knows the classifier and the defense in full",
        "oblivious": "The attacker knows the classifier but not the defense",
        "black-box": "The attacker sees only the classes that the whole answers, and trains a substitute on them",
    }[summary.study.threat]
    reach = "the task's eps" if summary.eps is None else spoken_eps(summary.eps)
    if summary.study.norm == "L2":
        return f"{knows}, and may move an image by up to {reach} in the L2 norm ({summary.named()})."
    return f"{knows}, and may move every pixel by up to {reach} of the way from black to white ({summary.named()})."


def measures(summary: Summary) -> Iterator[tuple[str, str, list[str], str]]:
    """Yield each measure: name, condition, values for the winner and the undefended classifier, meaning."""
    images = summary.best.score.latency_images if summary.best else ""
    device = spoken_device(summary.device) if summary.device else ""
    batch = ", ".join(filter(None, ("p50, batch of 128", images and f"{images} images", device)))
    rejection = [
        ("Attacked images accepted and wrong", summary.named(), "attacked_error", percent),
        ("Attacked images rejected", summary.named(), "attacked_rejection", percent),
        ("Clean images rejected", "no attack", "clean_rejection", percent),
    ]
    asked = [("Black-box accuracy", summary.named("black-box"), "black_box_accuracy", percent)]
    noise = [
        ("In the worst draw of the noise", summary.named(), "worst_draw_accuracy", percent),
        ("Where the attacker knows the noise", summary.named("white-box"), "known_noise_accuracy", percent),
    ]
    rows: list[tuple[str, str, str, Callable[[Any], str]]] = [
        *(rejection if summary.rejects else []),
        (
            "Oblivious accuracy",
            f"{summary.named('oblivious')}: the attacker does not know the defense",
            "oblivious_accuracy",
            percent,
        ),
        *(asked if summary.study.threat == "black-box" else []),
        ("White-box accuracy", f"{summary.named('white-box')}: the attacker knows it", "white_box_accuracy", percent),
        *(noise if summary.study.noise == "known" else []),
        ("Clean accuracy", "no attack", "clean_accuracy", percent),
        ("Purification latency", batch, "latency_ms_p50", milliseconds),
    ]
    for measure, condition, name, spoken in rows:
        yield measure, condition, [spoken(known[name]) if known else "–" for known in figures(summary)], COLUMNS[name]


def origins(study: Study) -> Iterator[tuple[str, str]]:
    """Yield the code, libraries and data that affect the figures, with their versions."""
    code, installed = provenance.code(), provenance.libraries()
    commit = f"commit {code['commit']}{', changed since' if code['changed_since'] else ''}; " if code["commit"] else ""
    yield "Crucible", f"{commit}SHA-256 of its sources {code['sha256']}"
    yield "Python", platform.python_version()
    yield from ((name, installed[name]) for name in LIBRARIES if name in installed)
    data = find_task(study.task, study.data_dir).dataset
    yield f"{data}, training and validation images", f"SHA-256 {checksum}" if (checksum := _checksum(study)) else "–"
    yield f"licence of {data}", find_data_set(data, study.data_dir).licence


def _checksum(study: Study) -> str:
    """Return the SHA-256 of the decoded data; empty if they are not on this machine."""
    for decoded in caches(find_task(study.task, study.data_dir).dataset, study.data_dir):
        try:
            return str(read_index(decoded)["checksum"])
        except (OSError, ValueError, KeyError):
            continue
    return ""


def pictures(summary: Summary) -> list[tuple[TrialRecord, str]]:
    """Return the trials whose pictures are shown, the best first, each with a data URL."""
    leaders = filter(None, map(summary.fit, summary.ranked[: 5 * TOP]))
    shown: list[tuple[TrialRecord, str]] = []
    room = PICTURE_BYTES
    for trial in {t.trial: t for t in (*leaders, *summary.trials)}.values():
        data = _png(trial.picture)
        if data and len(data) <= room and len(shown) < PICTURES:
            room -= len(data)
            shown.append((trial, "data:image/png;base64," + base64.b64encode(data).decode()))
    return shown


def _png(picture: Path | None) -> bytes:
    try:
        data = picture.read_bytes() if picture else b""
    except OSError:  # the pictures may have been deleted
        return b""
    return data if data.startswith(b"\x89PNG\r\n\x1a\n") else b""
