"""The leaderboard: a table of the best candidates and the undefended classifier for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from attacks.confidence import wilson
from search.formatting import brief, points, spoken_threat
from search.study import ranking
from search.study.candidate import Candidate
from search.study.columns import HEADINGS
from search.study.study import Study

WORDS = "oblivious: the attacker does not know the defense; white-box: the attacker knows all of it"
"""What stands below the table."""


@dataclass(frozen=True)
class Column:
    """One column: its heading, and the cell of each row."""

    heading: str
    cells: Sequence[str]
    justify: Literal["left", "right"] = "right"
    min_width: int = 0

    @property
    def width(self) -> int:
        return max(self.min_width, len(self.heading), *map(len, self.cells))


@dataclass(frozen=True)
class Leaderboard:
    """A table on the terminal; where it is wider, in parts that each begin with the first column: no figure is cut.

    Args:
        dim: whether the last row is no candidate.
    """

    title: str
    columns: Sequence[Column]
    dim: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, part in enumerate(self._parts(options.max_width)):
            title = None if number else self.title
            table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
            for column in part:
                table.add_column(column.heading, justify=column.justify, min_width=column.min_width, overflow="fold")
            rows = list(zip(*(column.cells for column in part), strict=True))
            for place, row in enumerate(rows):
                table.add_row(*row, style="dim" if self.dim and place == len(rows) - 1 else None)
            yield table

    def _parts(self, width: int) -> list[list[Column]]:
        first, *others = self.columns
        parts = [[first]]
        for column in others:
            if len(parts[-1]) > 1 and sum(each.width + 2 for each in (*parts[-1], column)) - 2 > width:
                parts.append([first])
            parts[-1].append(column)
        return parts


def leaderboard(
    study: Study, searched: Sequence[str], undefended: Candidate | None, ranked: Sequence[Candidate], top: int = 10
) -> Leaderboard:
    """Return a table of the best candidates and the undefended classifier, in percent, with 95 % Wilson intervals."""
    threat = ranked[0].score.threat if ranked else undefended.score.threat if undefended else None
    title = (
        f"{study.name}: {study.defense} on {study.label}, attacked accuracy under {threat and spoken_threat(threat)}"
    )
    rejects = any(c.score.clean_rejection or c.score.attacked_rejection for c in ranked)
    apart = ("attacked_error", "attacked_rejection", "clean_rejection") if rejects else ()
    names = (*apart, *_noise(ranked), "oblivious_accuracy", "white_box_accuracy", "clean_accuracy", "latency_ms_p50")
    best, last = ranked[:top], [] if undefended is None else [undefended]
    figures = list(zip(*(_figures(candidate, rejects, _noise(ranked)) for candidate in (*best, *last)), strict=True))
    figures = figures or [()] * (len(names) + 3)
    headings = [HEADINGS["attacked_accuracy"], "95 %", *(HEADINGS[name] for name in names)]
    columns = [Column("candidate", [*(c.candidate for c in best), *("undefended" for _ in last)], "left", 13)]
    columns += [
        Column(name, [*(brief(c.params.flat()[name]) for c in best), *("-" for _ in last)]) for name in searched
    ]
    columns += [Column(heading, cells, min_width=6) for heading, cells in zip(headings, figures[:-1], strict=True)]
    columns.append(Column(HEADINGS["latency_images"], figures[-1], "left", 8))  # clean or attacked, the slower
    if len(ranking.devices(ranked)) > 1:
        columns.append(Column(HEADINGS["device"], [*(c.score.device for c in best), *("" for _ in last)], "left"))
    return Leaderboard(title, columns, dim=bool(last))


def refusals(study: Study, candidates: Sequence[Candidate]) -> str:
    """Return one line: how many candidates satisfy all constraints, and what refuses how many of the others."""
    within = len(ranking.feasible(study, candidates))
    refused = ranking.refusals_in_words(study, candidates)
    if not within:
        return f"no candidate meets all constraints: {refused}"
    return f"constraints: {within} of {len(candidates)} candidates meet all" + (f"; {refused}" if refused else "")


def _noise(ranked: Sequence[Candidate]) -> tuple[str, ...]:
    """Return the columns of a search that scored noise that the attacker knows apart."""
    asked = any(c.score.known_noise_accuracy is not None for c in ranked)
    return ("worst_draw_accuracy", "known_noise_accuracy") if asked else ()


def _figures(candidate: Candidate, rejects: bool, noise: Sequence[str]) -> list[str]:
    score = candidate.score
    apart = (score.attacked_error, score.attacked_rejection, score.clean_rejection) if rejects else ()
    low, high = wilson(score.attacked_accuracy, score.images)
    return [
        points(score.attacked_accuracy),
        f"{100 * low:.0f}-{100 * high:.0f}",
        *map(points, apart),
        *(points(getattr(score, name)) for name in noise),
        points(score.oblivious_accuracy),
        points(score.white_box_accuracy),
        points(score.clean_accuracy),
        f"{score.latency_ms_p50:.1f}",
        score.latency_images or "-",
    ]
