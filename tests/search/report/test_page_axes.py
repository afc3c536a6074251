"""The axes of the report's charts in a real browser: percent lie between 0 and 100, milliseconds above 0."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from search.report.page import render
from search.report.summary import Summary
from search.study.candidate import Candidate
from tests.support.summaries import findings_of, rejecting

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --virtual-time-budget=5000 --window-size=1300,1000".split()
)
AXES = """<script>const waiting = setInterval(() => {
  if (!document.documentElement.dataset.drawn) return;
  clearInterval(waiting);
  const found = {};
  for (const chart of document.querySelectorAll(".chart")) for (const name of ["xaxis", "yaxis"]) {
    const axis = chart._fullLayout[name];
    if (axis.visible) found[`${chart.id} ${name}`] = [axis.ticksuffix, axis.type, ...axis.range];
  }
  document.documentElement.dataset.axes = JSON.stringify(found);
}, 50);</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed: apt-get install chromium"),
]


def extreme(summary: Summary) -> Summary:
    """Half of the candidates keep nothing under attack, and half keep all; some purify in no time."""

    def moved(nth: int, c: Candidate) -> Candidate:
        kept = float(nth % 2)
        score = replace(c.score, attacked_accuracy=kept, attacked_error=1 - kept, clean_accuracy=1.0)
        return replace(c, score=replace(score, latency_ms_p50=0.0 if nth % 3 == 0 else 0.4))

    found = [moved(nth, c) for nth, c in enumerate(summary.candidates)]
    curves = [replace(t, curve=[nth % 2 for _ in t.curve]) for nth, t in enumerate(summary.trials)]
    return replace(summary, candidates=found, best=found[1], front=[found[1]], trials=curves)


@pytest.mark.parametrize(
    "case", [lambda: extreme(findings_of()), findings_of, rejecting], ids=["all", "usual", "rejects"]
)
def test_percent_end_at_0_and_100_and_milliseconds_at_0(case: object, tmp_path: Path) -> None:
    assert callable(case)
    (page := tmp_path / "report.html").write_text(render(case()) + AXES, encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (told,) = re.findall(r'<html[^>]* data-axes="([^"]*)"', ran.stdout)
    axes = json.loads(html.unescape(told))
    percent = {name: axis[2:] for name, axis in axes.items() if axis[0] == " %"}
    assert {"pareto yaxis", "curves yaxis", "scatter xaxis", "scatter yaxis", "slice0 yaxis"} <= percent.keys()
    assert all(0 <= low < high <= 100 for low, high in percent.values()), percent
    times = {name: axis[2:] for name, axis in axes.items() if axis[0] == " ms" and axis[1] == "linear"}
    assert times and all(low >= 0 for low, _ in times.values()), times
