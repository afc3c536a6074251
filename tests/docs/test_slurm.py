"""deploy/slurm.sh under a real Slurm of two nodes: its time limit, the queue, an array, and who cancels a job."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.fault_injection import fits, rows
from tests.search.cli.test_cli import launch
from tests.support.slurm import NODES, Slurm, lacking, slurm

SCRIPT = "deploy/slurm.sh"
TINY = "--task digits/A --space smoke --epochs 2 --suite quick --train-images 300 --eval-images 40 --cheap-images 20 "
TINY += "--classifier-epochs 2 --wandb disabled --refine 0 --stopping none"
EACH = 6
"""Candidates of a training."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000), pytest.mark.skipif(bool(lacking()), reason=lacking())]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm() as started:
        yield started


def test_a_job_saves_before_its_time_limit_and_goes_on_when_it_is_requeued(cluster: Slurm, tmp_path: Path) -> None:
    runs, folder = tmp_path / "runs", tmp_path / "runs" / "first"
    flags = [*TINY.split(), "--trials", "500"]
    job = cluster.sbatch("--time=60", "--signal=B:TERM@60", SCRIPT, "first", str(runs), *flags)
    cluster.wait(job, lambda: len(rows(folder)) >= EACH)
    # Slurm counts limits in minutes and looks at them every half one: 30 to 90 s are left, and it warns in the last 60.
    limit = math.ceil(seconds(cluster.about(job)["RunTime"]) / 60 + 0.5)
    cluster.told("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    about = cluster.wait_for_state(job, "PENDING")
    assert about["Restarts"] == "1" and "go on with: python launch.py resume first" in cluster.log(job)
    kept, trained = rows(folder), fits(runs)
    assert EACH <= len(kept) < 500 * EACH

    study = folder / "study.yaml"  # what is left is made small
    study.write_text(
        re.sub(r"^trials: 500$", f"trials: {len(kept) // EACH + 1}", study.read_text(), flags=re.MULTILINE)
    )
    cluster.told("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=60")
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", "TIMEOUT")["ExitCode"] == "0:0", cluster.log(job)
    assert kept.items() <= rows(folder).items() and len(rows(folder)) == len(kept) + EACH
    assert trained.items() <= fits(runs).items()
    assert re.search(r"trainings have ended, \d+ candidates are kept", cluster.log(job))


def test_an_array_shares_a_storage_and_a_cancelled_job_ends_for_good(cluster: Slurm, tmp_path: Path) -> None:
    runs, flags = tmp_path / "runs", [*TINY.split(), "--trials", "%a", "--seed", "%a"]
    array = cluster.sbatch("--array=1,500", "--nodes=1", "--time=60", SCRIPT, "seed-%a", str(runs), *flags)
    short, long = f"{array}_1", f"{array}_500"
    cluster.wait(long, lambda: len(rows(runs / "seed-500")) >= EACH)
    cluster.told("scancel", long)
    about = cluster.wait_for_state(long, "CANCELLED", seconds=300)
    assert about["Restarts"] == "0", cluster.log(long)
    assert not Path(f"/tmp/ray-{about['JobId']}").exists()
    assert len(rows(runs / "seed-500")) >= EACH

    assert cluster.wait_for_state(short, "COMPLETED", "FAILED", "TIMEOUT")["ExitCode"] == "0:0", cluster.log(short)
    assert len(rows(runs / "seed-1")) == EACH
    state = json.loads(launch("status", "seed-500", "--storage", str(runs), "--json").stdout)
    assert not state["runs"] and state["running"] == 0 and state["interrupted"] >= 1
    assert not [line for name in NODES for line in cluster.commands(name) if "ray" in line]


def test_an_array_without_its_number_in_the_name_is_refused(cluster: Slurm, tmp_path: Path) -> None:
    array = cluster.sbatch("--array=1", "--nodes=1", SCRIPT, "same", str(tmp_path))
    assert cluster.wait_for_state(f"{array}_1", "FAILED", "COMPLETED", seconds=60)["ExitCode"] == "2:0"
    assert "must hold %a, the number in the array, but is same" in cluster.log(f"{array}_1")


def seconds(slurms: str) -> int:
    """Return the seconds of a duration that Slurm prints as HH:MM:SS."""
    hours, minutes, rest = map(int, slurms.split(":"))
    return 3600 * hours + 60 * minutes + rest
