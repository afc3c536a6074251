"""Locks in folders whose file system has none, or that hold files of locks from elsewhere."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from search import session
from search.cli.doctor import examine
from search.data.folders import lock
from search.data.splits import fetch
from search.study import sync
from search.study.study import Study
from spaces.exceptions import InputError


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS], ids=["no locks", "no such call"])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system whose flock fails, and how it says so."""

    def refuse(*given: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    return os.strerror(request.param)


def test_a_place_without_locks_is_refused_before_anything_runs(no_locks: str, study: Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"whose files can be locked, but {tmp_path}: {no_locks}$"):
        session.begin(study, Console(quiet=True), debug=True)
    with pytest.raises(InputError, match=f"cannot be used for digits: .*{no_locks}: .*; set .CRUCIBLE_DATA"):
        fetch("digits", str(tmp_path / "data"))
    found = {each.what: each for each in examine(str(tmp_path / "runs"), str(tmp_path / "data"))}
    for what in ("storage", "data folder", "Ray's scratch"):
        assert not found[what].well and found[what].found.endswith(f"where files cannot be locked: {no_locks}")
    study.store.make()
    (study.store.root / "locks").mkdir()
    study.store.lock("searches", study.name).path.touch()
    assert not sync.runs(study)  # `status` only looks


def test_the_file_of_a_lock_that_was_copied_or_left_over_holds_nothing(tmp_path: Path, study: Study) -> None:
    (tmp_path / ".digits.lock").touch()
    with lock(tmp_path / ".digits.lock").acquire(timeout=0):
        pass
    study.store.make()
    (study.store.root / "locks").mkdir()
    (study.store.root / "locks" / f"searches-{study.name}").touch()
    assert not sync.runs(study)
    with study.store.lock("searches", study.name).acquire(timeout=0):
        assert sync.runs(study)
