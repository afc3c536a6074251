"""What W&B runs cost: counted on the real wandb, offline."""

from __future__ import annotations

from pathlib import Path

from benchmarks.wandb_cost import cost, table
from tests.support.wandb_log import machine


def test_a_candidate_costs_one_file_as_a_run_and_none_as_a_row(tmp_path: Path) -> None:
    with machine(tmp_path):
        none, runs, rows = cost("runs", 0), cost("runs", 20), cost("table", 20)
    assert runs.files - rows.files in range(15, 21)  # the table is a file or two, too
    assert runs.disk_mib > rows.disk_mib > none.disk_mib and min(runs.driver_s, rows.driver_s, none.wall_s) > 0
    assert "| 20 | runs | " in table([runs])
