"""A storage on a real S3: moto's server over HTTP, s3fs, real processes, and machines with nothing in common but it."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import socket
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.fault_injection import SEARCH as SMALL
from benchmarks.fault_injection import kill, two_nodes, wait_for
from tests.support.extras import PYTHON
from tests.support.paths import ROOT
from tests.support.s3 import HURRIED, S3, Trouble, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="`make extras` makes the environment with s3fs and a server"),
]

ONE_SETTING = [*SMALL, "--knob", "sigma_eps=0", "--storage", S3.uri]
"""A candidate a training, in a second or two."""
SHORT_FINAL = Path(__file__).parents[2] / "support" / "short_final.py"
ON_S3 = ["--storage", S3.uri]


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving(tmp_path, port) as server:
        yield server


def rows(s3: S3, name: str) -> dict[str, dict[str, str]]:
    """Return the rows of candidates.csv in the bucket, without what a second measurement may replace."""
    found = list(csv.DictReader(io.StringIO(s3.read(f"{name}/candidates.csv").decode())))
    by_name = {row["candidate"]: {k: v for k, v in row.items() if not k.startswith("latency_")} for row in found}
    assert len(by_name) == len(found), "a candidate stands twice"
    return by_name


def status(s3: S3, machine: str, name: str) -> dict[str, int]:
    code, said = s3.launch(machine, "status", name, "--json", *ON_S3)
    assert code == 0, said
    state = json.loads(said)
    return {key: state[key] for key in ("finished", "pruned", "failed", "running", "interrupted", "candidates")}


def sent_twice(s3: S3) -> list[str]:
    """Return the entries of the store that were sent more than once, though nothing was wrong."""
    sent = Counter(line.split()[1] for line in s3.log() if line.startswith("PUT /bucket/runs/.store/"))
    return [path for path, times in sent.items() if times > 1 and "/progress/" not in path]


def no_secret_in(s3: S3, *folders: Path) -> None:
    """Look for credentials in every file of the machines and in every object of the bucket."""
    files = {str(path): path.read_bytes() for top in (s3.folder, *folders) for path in top.rglob("*") if path.is_file()}
    files |= {f"{s3.uri}/{name}": s3.read(name) for name in s3.sizes()}
    kinds = {".html", ".journal", ".csv", ".yaml", ".png"} | ({".log"} if folders else set())  # Ray's
    assert kinds <= {Path(name).suffix for name in files}
    assert sum(b"digits" in content for content in files.values()) > 10
    assert [name for name, content in files.items() if b"hushhush" in content] == []


def test_the_environment_is_what_the_page_says() -> None:
    page, makefile = ((ROOT / name).read_text() for name in ("docs/cluster.md", "Makefile"))
    assert "`pip install --constraint requirements.lock '.[s3]'`" in page
    assert (
        "pip install --quiet --constraint requirements.lock '.venv-extras/extras[s3,s3-server,kubernetes]'" in makefile
    )
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["s3"]
    code = "import sys; from importlib.metadata import version; print(*[f'{n}=={version(n)}' for n in sys.argv[1:]])"
    names = [pin.partition("==")[0] for pin in extra]
    assert subprocess.check_output([PYTHON, "-c", code, *names], text=True).split() == extra


def test_a_search_that_is_killed_goes_on_elsewhere_and_is_read_on_a_third_machine(s3: S3) -> None:
    asked = [*ONE_SETTING, "--trials", "3", "--epochs", "8", "--debug"]
    driver = s3.start("one", "search", "--name", "moves", *asked)
    try:
        wait_for(lambda: s3.has_got("moves/pictures/t001.png"), driver, s3.folder / "one" / "said")
        at = len(s3.log())
        wait_for(lambda: any("PUT /bucket/runs/.store/progress/" in line for line in s3.log()[at:]), driver)
    finally:
        kill(driver)
    before = {name: size for name, size in s3.sizes().items() if name.startswith(".store/fits/")}
    assert before
    shutil.rmtree(s3.folder / "one" / "cache")

    s3.drop("moves/driver.json")  # the minute is over
    code, said = s3.launch("two", "resume", "moves", *ON_S3, "--debug")
    assert code == 0, said
    after = s3.sizes()
    assert before.items() <= after.items() and sent_twice(s3) == []
    assert sum(name.startswith(".store/fits/") and name.endswith("entry.json") for name in after) == 3

    whole = {"finished": 3, "pruned": 0, "failed": 0, "running": 0, "interrupted": 0, "candidates": 3}
    found = rows(s3, "moves")
    assert status(s3, "three", "moves") == whole and len(found) == 3
    s3.drop("moves/report.html")
    assert s3.launch("three", "report", "moves", *ON_S3)[0] == 0 and s3.sizes()["moves/report.html"] > 1e6
    code, said = s3.launch("three", "export", "moves", "--candidate", min(found), "--despite-alarms", *ON_S3)
    assert code == 0, said
    (export,) = (s3.folder / "three").glob("cache/storage/*/moves/export/*/card.md")
    assert f"moves/export/{export.parent.name}/weights.safetensors" in s3.sizes()
    seeds = ["--seeds", "1", "--images", "20", "--debug"]
    code, said = s3.launch("three", "final", str(export.parent), *seeds, script=SHORT_FINAL)
    assert code == 0 and (export.parent / "final" / "FINAL.md").exists(), said
    no_secret_in(s3)


def test_two_nodes_share_a_bucket_and_nothing_else(s3: S3) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment("node").items():
            patch.setenv(name, value)
        with two_nodes(str(PYTHON)) as nodes:
            asked = [*ONE_SETTING, "--trials", "4", "--address", nodes.address]
            driver = s3.start("one", "search", "--name", "pair", *asked, also=nodes.token)
            try:
                assert driver.wait(500) == 0, (s3.folder / "one" / "said").read_text()
            finally:
                kill(driver)
            caches = [node / "cache" for node in nodes.folder.iterdir()]
            assert len(caches) == 2 and all(list(cache.glob("storage/*/.store/fits/*/*")) for cache in caches)
            no_secret_in(s3, nodes.folder)
    whole = {"finished": 4, "pruned": 0, "failed": 0, "running": 0, "interrupted": 0, "candidates": 4}
    assert status(s3, "three", "pair") == whole and sent_twice(s3) == []


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("refuses", "Access Denied"),
        ("fails", "Please try again"),
        ("full", "Storage backend is full"),
        ("silent", "Read timeout on endpoint URL"),
    ],
)
def test_a_search_goes_on_while_its_s3_takes_nothing_and_sends_the_rest_later(
    s3: S3, trouble: Trouble, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "silent":
        for variable, value in HURRIED.items():
            monkeypatch.setenv(variable, value)
    search = s3.start("one", "search", "--name", "waits", *ONE_SETTING, "--trials", "2", "--debug")
    wait_for(lambda: s3.has_got("waits/pictures/t001.png"), search, s3.folder / "one" / "said")
    s3.trouble(trouble)
    assert search.wait(500) == 0
    said = (s3.folder / "one" / "said").read_text()
    told = re.findall(f"{reason}.*; work goes on, and is sent later\n", said)
    assert 1 <= len(told) <= 2, said  # of the search, of the store
    assert f"{s3.uri} does not answer: what it lacks is kept in {s3.folder}/one/cache/storage/" in said
    assert "Traceback" not in said and "failed" not in said

    code, said = s3.launch("two", "search", "--name", "other", *ONE_SETTING, "--debug")
    assert code == 2 and said.count("\n") == 1 and reason in said
    assert "error: a storage must " in said and not list((s3.folder / "two").glob("cache/storage/*/other"))

    s3.trouble("")
    code, said = s3.launch("one", "resume", "waits", *ON_S3, "--debug")
    assert code == 0 and "waits is finished: 2 of 2 trainings ended, 2 candidates" in said
    whole = {"finished": 2, "pruned": 0, "failed": 0, "running": 0, "interrupted": 0, "candidates": 2}
    assert status(s3, "three", "waits") == whole and len(rows(s3, "waits")) == 2
    held = s3.sizes()
    assert sum(name.startswith(".store/fits/") and name.endswith("entry.json") for name in held) == 2
    no_secret_in(s3)


def test_a_search_waits_for_an_s3_that_takes_ten_seconds_for_each_answer(s3: S3) -> None:
    search = s3.start("one", "search", "--name", "slow", *ONE_SETTING, "--trials", "2", "--debug")
    wait_for(lambda: s3.has_got("slow/pictures/t001.png"), search, s3.folder / "one" / "said")
    s3.trouble("slow")
    wait_for(lambda: sum(line.endswith("slow") for line in s3.log()) > 8, search, s3.folder / "one" / "said")
    s3.trouble("")
    assert search.wait(500) == 0
    said = (s3.folder / "one" / "said").read_text()
    assert "does not answer" not in said and "is sent later" not in said, said
    whole = {"finished": 2, "pruned": 0, "failed": 0, "running": 0, "interrupted": 0, "candidates": 2}
    assert status(s3, "three", "slow") == whole and sent_twice(s3) == []


def test_a_server_that_falls_silent_in_mid_request_is_given_up_after_its_time_outs(tmp_path: Path) -> None:
    code = "import pathlib, search.storage.mirror as m; m.Mirror('s3://bucket/runs', '', pathlib.Path('none')).reach()"
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        server = S3(silent.getsockname()[1], tmp_path)
        command, environment = [str(PYTHON), "-c", code], server.environment("one") | HURRIED
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and 's3://bucket/runs: Read timeout on endpoint URL: "http://127' in done.stderr


def test_a_bucket_or_credentials_that_are_missing_are_named_in_one_line(s3: S3) -> None:
    asked = ["search", "--name", "none", *ONE_SETTING, "--debug"]
    code, said = s3.launch("one", *asked[:-2], "s3://elsewhere/runs", "--debug")
    assert code == 2 and "but s3://elsewhere/runs: The specified bucket does not exist" in said, said
    without = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SESSION_TOKEN": ""}
    assert s3.start("one", *asked, also={"HOME": str(s3.folder / "home")} | without).wait(300) == 2
    assert "but s3://bucket/runs: Unable to locate credentials" in (s3.folder / "one" / "said").read_text()
