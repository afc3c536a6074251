"""Who drives a search on a URI, and who waits for a download."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from search.exceptions import StorageError
from search.optimizer.proposer import Proposer
from search.storage.mirror import Mirror
from search.study import catalog, sync
from search.study.candidate import Proposal
from search.study.catalog import open_search
from search.study.winner import keep
from spaces.space import Params
from tests.search.storage.test_mirror import far_study, on


def test_a_driver_that_another_machine_took_for_dead_ends_and_sends_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "PAUSE_S", 0.01)
    monkeypatch.setattr(sync, "CLAIM_S", 0.0)
    study = far_study(tmp_path)
    on("one", tmp_path, monkeypatch)
    study.root.mkdir(parents=True)
    there = tmp_path / "far" / "smoke"
    other = json.dumps({"on": "other:machine", "time": 0})  # its clock may be wrong
    with sync.driving(study), sync.syncing(study, print) as syncs:
        study.write()
        proposer, until = Proposer(study), time.monotonic() + 60
        with pytest.raises(StorageError, match="other:machine runs this search now"):
            while time.monotonic() < until:
                (there / "driver.json").write_text(other)
                syncs[0].trial_ended(Proposal("t001", Params({}, {})), "pruned", [], None, "")
                time.sleep(0.2)
                proposer.optuna.set_user_attr("still", "drives")
        (there / "driver.json").write_text(other)
        (there / "study.journal").write_text("the other's\n")
    assert (there / "driver.json").read_text() == other and (there / "study.journal").read_text() == "the other's\n"


@pytest.mark.parametrize("whole", [True, False])
def test_the_latest_audit_counts_wherever_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    study = far_study(tmp_path)
    on("one", tmp_path, monkeypatch)
    study.root.mkdir(parents=True)
    study.write()
    assert study.mirror is not None
    study.mirror.send("study.yaml")
    keep(study, {"candidate": "a", "written": "2026-11-30T10:00:00+00:00", "alarms": ["noise"]})
    on("two", tmp_path, monkeypatch)
    other = open_search("smoke", study.storage, whole=whole)
    path = other.folder / "audits" / "a.json"
    assert json.loads(path.read_bytes())["alarms"] == ["noise"]
    own = {"candidate": "a", "written": "2026-11-30T09:00:00+00:00", "alarms": ["noise", "gradient", "step size"]}
    path.write_text(json.dumps(own))
    open_search("smoke", study.storage, whole=whole)
    assert json.loads(path.read_bytes())["alarms"] == ["noise"]
    path.write_text(json.dumps(own | {"written": "2026-11-30T11:00:00+00:00"}))
    open_search("smoke", study.storage, whole=whole)
    assert len(json.loads(path.read_bytes())["alarms"]) == 3


def test_who_opens_a_search_that_another_process_downloads_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, begun, ended = far_study(tmp_path), threading.Event(), list[str]()
    on("one", tmp_path, monkeypatch)
    study.root.mkdir(parents=True)
    study.write()
    assert study.mirror is not None
    study.mirror.send("study.yaml")
    bring = catalog.bring

    def slowly(mirror: Mirror, *, whole: bool) -> None:
        begun.set()
        time.sleep(1.5)
        bring(mirror, whole=whole)
        ended.append(mirror.part)

    monkeypatch.setattr(catalog, "bring", slowly)
    reader = threading.Thread(target=open_search, args=("smoke", study.storage))
    reader.start()
    assert begun.wait(60)
    open_search("smoke", study.storage)
    assert ended == ["smoke", "smoke"]
    reader.join()
    begun.clear()
    reader = threading.Thread(target=open_search, args=("smoke", study.storage))
    reader.start()
    assert begun.wait(60)
    with sync.driving(study):  # it is not refused either
        assert len(ended) == 3
    reader.join()
