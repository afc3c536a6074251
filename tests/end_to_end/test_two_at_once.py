"""Two of everything at once, in real processes: the second one waits or is refused, and nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.fault_injection import SEARCH, fits, kill, rows, wait_for
from search.exceptions import StorageError
from search.optimizer.proposer import Proposer
from search.study.study import Study
from search.study.sync import driving
from tests.conftest import digits_study
from tests.end_to_end.test_faults import start, status
from tests.search.cli.test_cli import launch
from tests.support import own
from tests.support.paths import ROOT

ONE_SETTING = [*SEARCH, "--knob", "sigma_eps=0", "--debug"]
DRIVE = """
import pathlib, sys, time
from search.exceptions import InputError
from search.study import sync
from tests.conftest import digits_study

study = digits_study(sys.argv[1])
print("ready", flush=True)
while not pathlib.Path(sys.argv[2]).exists():
    time.sleep(0.001)
try:
    with sync.driving(study), sync.syncing(study, print):
        print("drives", flush=True)
        time.sleep(8)
except InputError as error:
    print(error, flush=True)
"""


def test_of_machines_that_begin_together_on_a_uri_one_runs_the_search(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    command = [sys.executable, "-c", DRIVE, f"file://{tmp_path}/far", str(tmp_path / "go")]
    machines = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"CRUCIBLE_CACHE": str(tmp_path / name)}, text=True, stdout=-1
        )
        for name in ("one", "two", "three")
    ]
    assert [each.stdout and each.stdout.readline() for each in machines] == 3 * ["ready\n"]
    (tmp_path / "go").touch()
    said = [each.communicate(timeout=300)[0] for each in machines]
    assert sorted(line[:30] for line in said) == ["a search must run once at a tim"[:30]] * 2 + ["drives\n"]
    assert not (tmp_path / "far" / "smoke" / "driver.json").exists()


def test_a_driver_whose_lock_file_vanished_makes_it_anew_or_ends_where_another_has_taken_it(tmp_path: Path) -> None:
    study = digits_study(tmp_path)
    with driving(study):
        proposer, lock = Proposer(study), study.store.lock("searches", study.name)
        lock.path.unlink()
        proposer.optuna.set_user_attr("first", 1)
        assert lock.path.exists()
        with pytest.raises(TimeoutError):
            another(study)
        lock.path.unlink()
        another(study)
        before = (study.folder / "study.journal").read_bytes()
        for _ in range(2):  # also when the other one has ended
            with pytest.raises(StorageError, match=f"another process has taken {lock.path}"):
                proposer.optuna.set_user_attr("second", 2)
        assert (study.folder / "study.journal").read_bytes() == before


def another(study: Study) -> None:
    """Take the lock of a search in another process, as a driver does."""
    code = "import sys; from search.study.sync import driving; from tests.conftest import digits_study\n"
    code += "with driving(digits_study(sys.argv[1])): pass"
    done = subprocess.run([sys.executable, "-c", code, study.storage], cwd=ROOT, capture_output=True, text=True)
    if "HeldError" in done.stderr:
        raise TimeoutError
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_of_two_searches_two_resumes_and_a_resume_that_sees_no_lock_one_goes_on(tmp_path: Path) -> None:
    asked = [*ONE_SETTING, "--trials", "4"]
    ended = ends([start(tmp_path, "twin", *asked) for _ in range(2)], tmp_path)
    kill(ended.pop())
    before, trained = rows(tmp_path / "twin"), fits(tmp_path)
    (first,) = ends([resume(tmp_path) for _ in range(2)], tmp_path, len(before))

    first.send_signal(signal.SIGSTOP)  # it must not see at once that its lock has gone
    lock = tmp_path / ".store" / "locks" / "searches-twin"
    lock.unlink()
    second = resume(tmp_path)
    wait_for(lambda: lock.exists() and lock.stat().st_size, second)
    first.send_signal(signal.SIGCONT)
    said = first.communicate(timeout=500)[0]
    assert first.returncode == 1 and f"the storage failed: another process has taken {lock}. What had ended" in said
    assert second.wait(500) == 0
    assert before.items() <= rows(tmp_path / "twin").items() and trained.items() <= fits(tmp_path).items()
    assert len(rows(tmp_path / "twin")) == len(fits(tmp_path)) == 4
    assert status(tmp_path, "twin") == {"finished": 4, "pruned": 0, "failed": 0, "running": 0, "interrupted": 0}


def resume(storage: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch.py"), "resume", "twin", "--storage", str(storage), "--debug"]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ends(both: list[subprocess.Popen[str]], storage: Path, count: int = 0) -> list[subprocess.Popen[str]]:
    """Wait until one of two drivers was refused and the other has a candidate more; return the latter."""
    until = time.monotonic() + 900
    while all(each.poll() is None for each in both) or len(rows(storage / "twin")) <= count:
        assert time.monotonic() < until
        time.sleep(0.1)
    (refused,) = (each for each in both if each.poll() is not None)
    said = refused.communicate()[0]
    assert refused.returncode == 2 and said.splitlines()[-1].startswith("error: a search"), said
    return [each for each in both if each is not refused]


@pytest.mark.slow
def test_an_export_while_the_search_runs_disturbs_neither(tmp_path: Path) -> None:
    search = start(tmp_path, "busy", *ONE_SETTING, "--trials", "4")
    wait_for(lambda: rows(tmp_path / "busy"), search)
    exported = launch("export", "busy", "--top", "1", "--despite-alarms", "--storage", str(tmp_path))
    assert exported.returncode == 0, exported.stderr
    assert search.wait(500) == 0
    assert status(tmp_path, "busy") == {"finished": 4, "pruned": 0, "failed": 0, "running": 0, "interrupted": 0}
    assert list((tmp_path / "busy" / "export").glob("*/SHA256SUMS")) and len(rows(tmp_path / "busy")) == 4


def test_three_processes_that_fetch_or_add_the_same_data_do_it_once(tmp_path: Path) -> None:
    pictures = own.folder_of(tmp_path / "pictures")
    environment = os.environ | {"CRUCIBLE_DATA": str(tmp_path / "data")}

    def at_once(*arguments: str) -> list[tuple[int, str]]:
        command = [sys.executable, str(ROOT / "launch.py"), "data", *arguments]
        each = [subprocess.Popen(command, env=environment, text=True, stdout=-1, stderr=-2) for _ in range(3)]
        return [(one.communicate(timeout=500)[0], one.returncode)[::-1] for one in each]

    fetched = at_once("fetch", "digits")
    assert [code for code, _ in fetched] == [0, 0, 0], fetched
    added = at_once("add", "leaves", str(pictures))
    assert Counter(code for code, _ in added) == {0: 1, 2: 2}, added
    assert sum("a data set's name must be new, but 'leaves' " in said for _, said in added) == 2, added
    assert {path.name for path in (tmp_path / "data" / "decoded").iterdir()} == {"digits", "leaves"}
    assert not list((tmp_path / "data" / ".work").iterdir())
