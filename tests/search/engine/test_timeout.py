"""A trial's time limit: a worker that hangs ends itself, and leaves where it stood."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from search.engine.timeout import TrialTimeout
from search.study.candidate import Proposal
from spaces.space import Params
from tests.conftest import digits_study
from tests.support.paths import ROOT

HANGS = """
import sys, threading, time
from search.engine.timeout import TrialTimeout
from search.study.candidate import Proposal
from spaces.space import Params
from tests.conftest import digits_study
from pathlib import Path

def hangs():
    time.sleep(60)  # here

def trial():
    study = digits_study(Path(sys.argv[1]), trial_timeout=1.0)
    study.folder.mkdir(parents=True)
    with TrialTimeout(study, Proposal("t001", Params({}, {}))).running():
        hangs()

def beside():
    while True:
        sum(range(1000))

for work in {threads}:
    threading.Thread(target=work, daemon=True).start()
time.sleep(60)
"""


@pytest.mark.parametrize("threads", ["(trial,)", "(beside, trial)", "(trial, beside)"])
def test_a_worker_that_hangs_ends_itself_and_says_where_it_stood(tmp_path: Path, threads: str) -> None:
    script = tmp_path / "hanging.py"
    script.write_text(HANGS.replace("{threads}", threads))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "runs")], env={"PYTHONPATH": str(ROOT)}, timeout=50, check=False
    )
    assert done.returncode == 1
    line = 1 + next(at for at, text in enumerate(script.read_text().splitlines()) if text.endswith("# here"))
    study = digits_study(tmp_path / "runs", trial_timeout=1.0)
    word = TrialTimeout(study, Proposal("t001", Params({}, {}))).word()
    assert word == f"no end after 1 s; it stood at hanging.py line {line} in hangs"
    longer = digits_study(tmp_path / "runs", trial_timeout=2.0)  # as where `resume` raises the limit
    assert TrialTimeout(longer, Proposal("t001", Params({}, {}))).word() is None


def test_a_trial_that_ends_in_time_leaves_nothing(tmp_path: Path) -> None:
    study = digits_study(tmp_path, trial_timeout=60.0)
    study.folder.mkdir(parents=True)
    timeout = TrialTimeout(study, Proposal("t001", Params({}, {})))
    with timeout.running(), timeout.paused():
        pass
    assert timeout.word() is None and not timeout.path.exists()
