"""candidates.csv: its rows are in the file alone, and come from there when it must be written anew."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from search.study.candidate import Candidate
from search.tracking.csv_log import CsvLog
from tests.support.wandb_log import BARE, STUDY, candidate, trial


def rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["candidate"]: row for row in csv.DictReader(file)}


def ended(log: CsvLog, *candidates: Candidate) -> None:
    log.trial_ended(trial("t001"), "finished", candidates, None, "")


def test_rows_of_an_earlier_run_and_of_this_one_survive_a_new_column(tmp_path: Path) -> None:
    path, first, second = tmp_path / "candidates.csv", candidate("c1", 0.1, 1.0), candidate("c2", 0.2, 2.0)
    log = CsvLog(path, [first])
    log.search_started(STUDY, BARE)
    ended(log, second, second)
    new = candidate("c3", 0.3, 3.0)
    ended(log, replace(new, score=replace(new.score, attacks={**new.score.attacks, "oblivious/new": 0.5})))
    found = rows(path)
    assert list(found) == ["c1", "c2", "c3"] and found["c1"]["attacked_accuracy"] == "0.1"
    assert [found[name]["oblivious/new"] for name in found] == ["", "", "0.5"]


def test_what_a_full_disk_cut_off_is_written_with_the_next_rows(tmp_path: Path) -> None:
    path = tmp_path / "candidates.csv"
    log = CsvLog(path, [])
    log.search_started(STUDY, BARE)
    ended(log, candidate("c1", 0.1, 1.0))
    whole = path.read_bytes()
    log._behind, log._missing = True, {"c2": candidate("c2", 0.2, 2.0).row()}
    path.write_bytes(whole + b"c2,f,puv")
    ended(log, candidate("c3", 0.3, 3.0))
    assert list(rows(path)) == ["c1", "c2", "c3"] and rows(path)["c2"]["latency_ms_p50"] == "2.0"


def test_the_end_writes_a_file_that_was_deleted_and_latencies_that_were_measured_again(tmp_path: Path) -> None:
    path, one, other = tmp_path / "candidates.csv", candidate("c1", 0.1, 1.0), candidate("c2", 0.2, 2.0)
    log = CsvLog(path, [])
    log.search_started(STUDY, BARE)
    ended(log, one, other)
    log.search_ended("finished", [one, candidate("c2", 0.2, 1.5)])
    assert [row["latency_ms_p50"] for row in rows(path).values()] == ["1.0", "1.5"]
    path.unlink()
    log.search_ended("finished", [one, other])
    assert list(rows(path)) == ["c1", "c2"]


@pytest.mark.parametrize("left", [None, "", "1,2\n3,4\n"])
def test_a_file_that_is_deleted_or_overwritten_under_a_search_ends_nothing(tmp_path: Path, left: str | None) -> None:
    path, found = tmp_path / "candidates.csv", [candidate(f"c{i}", i / 10, float(i)) for i in (1, 2, 3)]
    log = CsvLog(path, [])
    log.search_started(STUDY, BARE)
    ended(log, found[0])
    path.unlink() if left is None else path.write_text(left)
    ended(log, found[1])
    ended(log, found[2])
    if not left:
        assert list(rows(path)) == ["c2", "c3"]
    log.search_ended("finished", found)
    assert sorted(rows(path)) == ["c1", "c2", "c3"]
