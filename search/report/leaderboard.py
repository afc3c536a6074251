"""The leaderboard: a table of the best candidates and the undefended classifier for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from attacks.confidence import wilson
from search.formatting import brief, points, spoken_threat
from search.study import ranking
from search.study.candidate import Candidate
from search.study.columns import HEADINGS
from search.study.study import Study

WORDS = "oblivious: the attacker does not know the defense; white-box: the attacker knows all of it"
"""What stands below the table."""


def leaderboard(
    study: Study, searched: Sequence[str], undefended: Candidate | None, ranked: Sequence[Candidate], top: int = 10
) -> Table:
    """Return a table of the best candidates and the undefended classifier, in percent, with 95 % Wilson intervals."""
    threat = ranked[0].score.threat if ranked else undefended.score.threat if undefended else None
    title = (
        f"{study.name}: {study.defense} on {study.label}, attacked accuracy under {threat and spoken_threat(threat)}"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("candidate", no_wrap=True, min_width=13)
    for heading in searched:
        table.add_column(heading, justify="right", no_wrap=True)
    rejects = any(c.score.clean_rejection or c.score.attacked_rejection for c in ranked)
    several = len(ranking.devices(ranked)) > 1
    apart = ("attacked_error", "attacked_rejection", "clean_rejection") if rejects else ()
    shown = (*apart, "oblivious_accuracy", "white_box_accuracy", "clean_accuracy", "latency_ms_p50")
    for heading in (HEADINGS["attacked_accuracy"], "95 %", *(HEADINGS[name] for name in shown)):
        table.add_column(heading, justify="right", no_wrap=True, min_width=max(6, len(heading)))
    table.add_column(
        HEADINGS["latency_images"], no_wrap=True, min_width=8
    )  # clean or attacked images, whichever took longer
    if several:
        table.add_column(HEADINGS["device"])
    for candidate in ranked[:top]:
        knobs, device = candidate.params.flat(), [candidate.score.device] if several else []
        figures = _figures(candidate, rejects)
        table.add_row(candidate.candidate, *(brief(knobs[name]) for name in searched), *figures, *device)
    if undefended is not None:
        table.add_row("undefended", *("-" for _ in searched), *_figures(undefended, rejects), style="dim")
    return table


def refusals(study: Study, candidates: Sequence[Candidate]) -> str:
    """Return one line: how many candidates satisfy all constraints, and what refuses how many of the others."""
    within = len(ranking.feasible(study, candidates))
    refused = ranking.refusals_in_words(study, candidates)
    if not within:
        return f"no candidate meets all constraints: {refused}"
    return f"constraints: {within} of {len(candidates)} candidates meet all" + (f"; {refused}" if refused else "")


def _figures(candidate: Candidate, rejects: bool) -> list[str]:
    score = candidate.score
    apart = (score.attacked_error, score.attacked_rejection, score.clean_rejection) if rejects else ()
    low, high = wilson(score.attacked_accuracy, score.images)
    return [
        points(score.attacked_accuracy),
        f"{100 * low:.0f}-{100 * high:.0f}",
        *map(points, apart),
        points(score.oblivious_accuracy),
        points(score.white_box_accuracy),
        points(score.clean_accuracy),
        f"{score.latency_ms_p50:.1f}",
        score.latency_images or "-",
    ]
