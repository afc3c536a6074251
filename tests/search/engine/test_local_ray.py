"""A Ray cluster of this machine starts wherever temporary files are kept, and whoever has no home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from search.engine import local_ray
from search.engine.local_ray import AFTER, SOCKET, ensure_token, ray_folder
from spaces.exceptions import InputError
from tests.support.paths import ROOT


@pytest.fixture
def deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of temporary files with a path too long for sockets, as batch systems make them."""
    folder = tmp_path / ("job-" + "0" * 100)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def test_a_long_path_is_reached_through_a_short_link_that_goes_with_the_cluster(deep: Path) -> None:
    with ray_folder() as folder:
        assert len(os.fsencode(folder)) + AFTER <= SOCKET
        assert folder.resolve() == deep / "ray"
        (folder / "log").touch()
    assert not folder.parent.exists() and (deep / "ray" / "log").exists()


def test_a_short_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ray, "SOCKET", 1000)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "new"))
    with ray_folder() as folder:
        assert folder == tmp_path / "new" / "ray" and folder.is_dir()


def test_where_no_link_can_be_made_one_line_names_the_variable(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ray, "SHORT", ("/proc/none",))
    with pytest.raises(InputError, match=r"at most 107 bytes.*set RAY_TMPDIR to a folder with a path of at most 39 b"):
        ray_folder().__enter__()
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")
    with pytest.raises(InputError, match=r"needs a folder that can be written, but /proc/none/ray: .*RAY_TMPDIR"):
        ray_folder().__enter__()


def test_a_token_goes_through_the_environment_only_where_no_home_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    ensure_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("HOME", "/proc/none")
    ensure_token()
    token = os.environ["RAY_AUTH_TOKEN"]
    ensure_token()
    assert len(token) == 64 and os.environ["RAY_AUTH_TOKEN"] == token


@pytest.mark.slow
def test_ray_starts_without_a_home_and_under_a_long_path(deep: Path, tmp_path: Path) -> None:
    code = (
        "import os, pwd; pwd.getpwuid = lambda uid: {}[uid]\n"  # a number without a name
        "from search.engine.cluster import joined; from search.study.study import Study; import ray.tune, wandb\n"
        f"with joined(Study(task='digits/A', storage={str(tmp_path)!r}, data_dir={str(tmp_path)!r})):\n"
        "    print(ray.get(ray.remote(num_cpus=1)(lambda: os.environ['HOME']).remote()))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "RAY_AUTH_TOKEN")}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.stdout == "/nonexistent\n", ended.stderr
    assert list((deep / "ray").glob("session_2*"))
