"""The report in a real browser: that it is drawn in full, fits, says nothing on the console and asks nobody."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from search.report.page import render
from search.report.summary import Summary
from tests.support.browser import CHROMIUM, Browser
from tests.support.summaries import CASES, findings_of, nothing_yet

PROBE = """(() => {
  const charts = [...document.querySelectorAll(".chart")], root = document.documentElement, tables = {};
  const colour = place => getComputedStyle(document.querySelector(place)).fill;
  const seen = {
    charts: charts.map(chart => chart.id).filter(id => document.querySelector(`#${id} .trace`)),
    places: charts.map(chart => chart.id), inner: innerWidth, wide: root.scrollWidth,
    asked: performance.getEntriesByType("resource").map(entry => entry.name),
    ink: getComputedStyle(document.body).color, tick: charts.length && colour("#pareto .ytick text"), tables,
    unreached: [...document.querySelectorAll(".scroll")].filter(box => box.tabIndex !== 0 || !box.ariaLabel).length,
  };
  for (const details of document.querySelectorAll("details[data-of]")) {
    write(details);
    tables[details.dataset.of] = details.querySelectorAll("tbody tr").length;
  }
  dispatchEvent(new Event("beforeprint"));
  seen.printed = charts.map(chart => Number(chart.querySelector("svg.main-svg").getAttribute("width")));
  seen.onPaper = charts.length && colour("#pareto .ytick text");
  return seen;
})()"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed: apt-get install chromium"),
]


@contextmanager
def opened(summary: Summary, folder: Path, width: int, *, dark: bool = False, more: str = "") -> Iterator[Browser]:
    page = folder / "report.html"
    page.write_text(render(summary) + more, encoding="utf-8")
    with Browser(folder / "profile", width, dark=dark) as browser:
        browser.open(page)
        yield browser


def browse(summary: Summary, folder: Path, width: int, *, dark: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Open the page in a headless browser; return what the probe saw and what the console says."""
    with opened(summary, folder, width, dark=dark) as browser:
        return browser.run(PROBE), browser.console


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_draws_every_chart_within_the_page_without_a_word(case: str, width: int, tmp_path: Path) -> None:
    seen, console = browse(CASES[case](), tmp_path, width)
    assert console == [] and seen["asked"] == []
    assert seen["inner"] == width and seen["wide"] <= width
    assert seen["charts"] == seen["places"]
    assert len(seen["charts"]) == {"nothing yet": 0, "one candidate": 3, "rejecting": 12}.get(case, 11)
    assert seen["unreached"] == 0


def test_the_charts_follow_the_colour_scheme_and_are_printed_light_on_the_width_of_paper(tmp_path: Path) -> None:
    light, _ = browse(findings_of(), tmp_path, 1400)
    dark, _ = browse(findings_of(), tmp_path, 1400, dark=True)
    assert light["ink"] == light["tick"] != dark["ink"] == dark["tick"]
    assert light["onPaper"] == dark["onPaper"] == light["tick"]
    assert set(dark["printed"]) == {680, 332}


def test_behind_each_chart_is_a_table(tmp_path: Path) -> None:
    seen, _ = browse(CASES["rejecting"](), tmp_path, 1400)
    rows = {"coverage": 16, "importances": 6, "curves": 7, "scatter": 4}
    assert {of: seen["tables"][of] for of in rows} == rows and {"latency", "slices"} < set(seen["tables"])


def test_a_page_that_asked_a_host_would_be_caught(tmp_path: Path) -> None:
    with opened(nothing_yet(), tmp_path, 1400, more='<img src="https://127.0.0.1:9/x.png">') as browser:
        browser.settle()
        assert "Content Security Policy" in " ".join(browser.console)


def test_the_page_is_printed(tmp_path: Path) -> None:
    with opened(findings_of(), tmp_path, 1400) as browser:
        paper = browser.pdf(tmp_path / "report.pdf").read_bytes()
    assert 5 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 12


def test_five_thousand_candidates_open_in_three_seconds(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render(findings_of(834)), encoding="utf-8")
    for _ in range(2):
        with Browser(tmp_path / "profile", 1400) as browser:
            browser.open(page)
            ms = browser.run("Number(document.documentElement.dataset.drawn)")
            # It does not grow with the candidates, on any machine.
            assert browser.run("document.querySelectorAll('svg *').length") < 20_000
        if ms < 3000 or os.getloadavg()[0] > (os.cpu_count() or 1):
            return
    raise AssertionError(f"all charts of {page} are drawn after {ms} ms")
