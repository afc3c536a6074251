"""What a command whose output is piped says while it works."""

from __future__ import annotations

import io
import math
import re
import time

import pytest
from rich.console import Console

from search.console import EVERY_S, Counting, ProgressBars, TimeLeft, working


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.console.EVERY_S", 0.1)


def test_no_silence_is_longer_than_30_seconds() -> None:
    assert EVERY_S <= 30


def test_silence_is_broken_by_what_is_done_of_how_much(hasty: None) -> None:
    with ProgressBars(Console(file=(pipe := io.StringIO())), Counting("trainings")) as bars:
        whole = bars.add_task("night", total=8)
        bars.add_task("hidden", total=1, visible=False)
        bars.update(whole, completed=3)
        time.sleep(0.35)
    lines = pipe.getvalue().splitlines()
    assert 2 <= len(lines) <= 3
    assert all(re.fullmatch(r"night: 3 of 8 trainings, 0:00:00 so far(, 0:00:0\d left)?", line) for line in lines)


def test_a_time_left_runs_down_between_estimates_and_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bars, now = ProgressBars(Console(file=io.StringIO()), left=TimeLeft()), 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    bars.add_task("night", ends=math.nan)
    (task,) = bars.tasks
    said = [str(TimeLeft().render(task))]
    bars.update(task.id, ends=now + 180)
    for passed in (0, 60, 100, 30):
        now += passed
        said.append(str(TimeLeft().render(task)))
    assert said == ["–", "3\u00a0min", "2\u00a0min", "20\u00a0s", "–"]


def test_who_speaks_anyway_is_not_interrupted(hasty: None) -> None:
    with ProgressBars(Console(file=(pipe := io.StringIO()))) as bars:
        bars.add_task("night", total=8)
        for nth in range(10):
            time.sleep(0.03)
            bars.say(f"line {nth}")
    assert pipe.getvalue().splitlines() == [f"line {nth}" for nth in range(10)]


def test_what_follows_the_last_of_them_is_not_silent_either_and_nothing_costs_nothing(hasty: None) -> None:
    with ProgressBars(Console(file=(pipe := io.StringIO())), Counting("trainings")) as bars:
        begin = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - begin < 0.25 and pipe.getvalue() == ""
        bars.update(bars.add_task("night", total=8), completed=8)
        time.sleep(0.15)
    assert pipe.getvalue().startswith("night: 8 of 8 trainings, 0:00:00 so far")


def test_a_terminal_shows_bars_and_no_lines(hasty: None) -> None:
    with ProgressBars(Console(file=(screen := io.StringIO()), force_terminal=True, width=100)) as bars:
        bars.add_task("night", total=8)
        time.sleep(0.3)
    assert "so far" not in screen.getvalue() and "━" in screen.getvalue()


def test_work_without_a_known_end_says_for_how_long_it_works(hasty: None) -> None:
    with working(Console(file=(pipe := io.StringIO())), "judging mine"):
        time.sleep(0.15)
    assert pipe.getvalue() == "judging mine\njudging mine: 0:00:00 so far\n"
