"""Searches on a cluster of two real nodes, of which one has a data folder and a file system of its own."""

from __future__ import annotations

import csv
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from search.data import cache
from search.data.splits import fetch
from search.study.loading import read_study
from tests.support import own
from tests.support.paths import ROOT, hiding

PACKAGES = ("spaces", "attacks", "defenses", "search")
RAY = str(Path(sys.executable).parent / "ray")
SMALL = tuple(
    "--task digits/A --space smoke --trials 2 --epochs 2 --suite quick --eval-images 40 --cheap-images 20 "
    "--classifier-epochs 2 --knob sigma_eps=0,1 --wandb disabled --refine 0".split()
)
AGENT_LATE = "No available agent to submit job"  # Ray waits ten seconds for a node's agent to enlist, then says so


@dataclass(frozen=True)
class Nodes:
    """A cluster: `shared` is a folder that both nodes see, `private` one that each sees otherwise.

    Args:
        arrived: what Ray brought to the second node.
        data: the second node's data folder.
    """

    address: str
    dashboard: str
    environment: dict[str, str]
    arrived: Path
    shared: Path
    private: Path
    data: Path

    def launch(
        self, *arguments: str, root: Path = ROOT, begin: str = "", cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line on the first node; `begin` is Python that comes before it."""
        code = f"import sys; sys.path.insert(0, {str(root)!r}); sys.argv[0] = 'launch.py'; {begin}"
        code += "\nfrom launch import main\nsys.exit(main())"
        command = [sys.executable, "-c", code, *arguments]
        environment = self.environment | {"TMPDIR": str(self.private)}
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes of one CPU; the second has an empty data folder and, where we may mount, a disk of its own."""
    folder = tmp_path_factory.mktemp("cluster")
    temp = Path(tempfile.mkdtemp(prefix="r"))  # sockets lie in it, and their paths must be short
    shared, private, data, empty = (folder / name for name in ("shared", "private", "data", "empty"))
    shared.mkdir()
    private.mkdir()
    fetch("digits", data)
    index = data / "decoded" / "digits" / "decoded.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"came": "from the first node"}))
    port, dashboard, *agents = _free_ports(4)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, **token, "CRUCIBLE_DATA": str(data), "OMP_NUM_THREADS": "1"}
    start = [RAY, "start", "--block", "--num-cpus=1", "--disable-usage-stats", "--object-store-memory=200000000"]
    head = [*start, "--head", f"--port={port}", f"--temp-dir={temp}", f"--dashboard-port={dashboard}"]
    second = [*start, f"--address=127.0.0.1:{port}", f"--dashboard-agent-listen-port={agents[1]}"]
    second.append(f"--temp-dir={temp / 'second'}")  # or each would take the code from under the other's feet
    if may_mount():
        mount = f'mount -t tmpfs none {private} && exec "$@"'
        second = ["unshare", "--mount", "sh", "-c", mount, "sh", *second]
    running = []
    try:
        running.append(_start([*head, f"--dashboard-agent-listen-port={agents[0]}"], environment, folder))
        _wait_until(lambda: _answers(port))
        running.append(_start(second, environment | {"CRUCIBLE_DATA": str(empty)}, folder))
        url = f"http://127.0.0.1:{dashboard}"
        _wait_until(lambda: _alive(url, token["RAY_AUTH_TOKEN"]) == 2)
        (arrived,) = (temp / "second").glob("session_2*/runtime_resources")
        found = Nodes(f"127.0.0.1:{port}", url, environment, arrived, shared, private, empty)
        yield found
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            process.wait(60)
        shutil.rmtree(temp, ignore_errors=True)


def may_mount() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


def _start(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "ray.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _alive(url: str, token: str) -> int:
    asked = urllib.request.Request(f"{url}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
    except (OSError, LookupError, TypeError):
        return 0
    return sum(node["state"] == "ALIVE" for node in nodes)


def _wait_until(what: Any, seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.2)


def _copy(folder: Path) -> Path:
    """Return a folder with the code alone."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", folder)
    return folder


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _candidates(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "candidates.csv").open()))


@pytest.mark.slow
def test_code_and_data_reach_a_node_that_has_neither_and_nothing_else_does(nodes: Nodes, tmp_path: Path) -> None:
    root = _copy(tmp_path / "copy")
    for name in ("runs/huge.bin", "data/huge.npy", "search/huge.pt", "defenses/notes.ipynb", ".venv/huge.so"):
        (root / name).parent.mkdir(exist_ok=True)
        with (root / name).open("wb") as file:
            file.truncate(600 * 2**20)  # more than Ray takes
    more = ("--name", "away", "--storage", str(nodes.shared), "--address", nodes.address, *SMALL)
    theirs = hiding(tmp_path / "theirs")
    searched = nodes.launch("search", *more, root=root, cwd=theirs)
    assert searched.returncode == 0, searched.stdout + searched.stderr
    assert len(_candidates(nodes.shared / "away")) == 4
    assert 200_000 < _size(nodes.arrived) < 2_000_000
    came = nodes.data / "decoded" / "digits"
    assert json.loads((came / "decoded.json").read_text())["came"] == "from the first node"
    assert cache.fault(came, thorough=True) is None
    assert [path.name for path in nodes.data.iterdir() if path.is_dir()] == [".work", "decoded"]  # nothing was fetched
    assert not list(nodes.shared.glob(".token-*"))


@pytest.mark.slow
def test_a_users_data_and_classifier_reach_a_node_that_has_neither(nodes: Nodes, tmp_path: Path) -> None:
    own.files(tmp_path)
    added = nodes.launch("data", "add", "leaves", str(tmp_path / "pictures"))
    assert added.returncode == 0, added.stderr
    words = ("mine", f"{tmp_path}/net.py:net", "--data", "leaves", "--weights", str(tmp_path / "net.pt"))
    assert nodes.launch("classifier", "add", *words).returncode == 0
    more = ("--name", "own", "--storage", str(nodes.shared), "--address", nodes.address, *SMALL)
    searched = nodes.launch("search", *more, "--task", "leaves/mine", "--eval-images", "10")
    assert searched.returncode == 0, searched.stdout + searched.stderr
    assert len(_candidates(nodes.shared / "own")) == 4
    assert cache.fault(nodes.data / "decoded" / "leaves", thorough=True) is None
    assert {path.name for path in (nodes.data / "classifiers" / "leaves" / "mine").iterdir()} == {
        "classifier.json",
        "classifier.py",
        "weights.safetensors",
    }


@pytest.mark.slow
def test_a_search_may_be_submitted_as_a_job(nodes: Nodes, tmp_path: Path) -> None:
    submit = [RAY, "job", "submit", f"--address={nodes.dashboard}", f"--working-dir={_copy(tmp_path / 'copy')}", "--"]
    search = [sys.executable, "launch.py", "search", "--name", "job", "--storage", str(nodes.shared), *SMALL]
    until = time.monotonic() + 180
    while True:  # it says no --address: a job runs on the cluster that it was submitted to
        submitted = subprocess.run(
            [*submit, *search], env=nodes.environment, capture_output=True, text=True, timeout=300
        )
        if AGENT_LATE not in submitted.stderr or time.monotonic() > until:
            break
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert len(_candidates(nodes.shared / "job")) == 4
    assert read_study(nodes.shared / "job" / "study.yaml").address is None


@pytest.mark.slow
def test_a_storage_that_is_not_shared_is_refused_at_once(nodes: Nodes) -> None:
    if not may_mount():
        pytest.skip("a disk of a node's own needs the right to mount")
    refused = nodes.launch("search", "--address", nodes.address, "--storage", str(nodes.private), *SMALL)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    law = f"the storage must be a folder that every node reaches, but {nodes.private} is another one on node "
    assert law in refused.stderr and "put it on a shared file system" in refused.stderr
    assert not (nodes.private / "search").exists() and not list(nodes.private.glob(".token-*"))
    told = nodes.launch("doctor", "--address", nodes.address, "--storage", str(nodes.private), "--json")
    assert told.returncode == 1
    (finding,) = [found for found in json.loads(told.stdout) if found["what"] == "cluster"]
    assert law in finding["found"] and not finding["well"]


@pytest.mark.slow
def test_a_cluster_of_another_ray_is_refused_in_one_line(nodes: Nodes) -> None:
    older, law = "import ray; ray.__version__ = '2.59.0'", "a cluster must run the same Ray and Python as this process"
    there = ("--address", nodes.address, "--storage", str(nodes.shared))
    refused = nodes.launch("search", *there, "--name", "other", *SMALL, begin=older)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"{law}, 2.59.0 on 3." in refused.stderr
    assert not (nodes.shared / "other").exists()
    told = nodes.launch("doctor", *there, "--json", begin=older)
    (finding,) = [found for found in json.loads(told.stdout) if found["what"] == "cluster"]
    assert told.returncode == 1 and law in finding["found"] and "install requirements.lock on all" in finding["found"]
