"""Secrets: what is hushhush in the environment of a search stands nowhere in what it writes or says."""

from __future__ import annotations

import io
import platform
import socket
from pathlib import Path

import pytest
import wandb
from rich.console import Console

from search import session
from search.export import exporter
from search.optimizer.history import SearchHistory
from search.study.catalog import search_names
from search.study.loading import make_study
from spaces.exceptions import InputError
from tests.conftest import digits_study

pytestmark = pytest.mark.slow

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "hushhush",
    "AWS_ACCESS_KEY_ID": "AKIAhushhush1",
    "AWS_SECRET_ACCESS_KEY": "hushhush2/secret+key",
    "HF_TOKEN": "hf_hushhush3",
    "DATABASE_PASSWORD": "hushhush4-password",
    "GITHUB_TOKEN": "ghp_hushhush5",
    "USER": "hushhush6-user",
    "LOGNAME": "hushhush6-user",
    "USERNAME": "hushhush6-user",
    "HOSTNAME": "hushhush7-host",
    "WANDB_USERNAME": "hushhush8-name",
    "WANDB_USER_EMAIL": "hushhush9@example.com",
    "SLURM_JOB_NODELIST": "hushhush10-node",
    "https_proxy": "http://hushhush11:hushhush12@127.0.0.1:9",
}
OURS = b"digits"
"""What must be found, lest the search for secrets sees nothing."""


def test_no_secret_stands_in_what_a_search_a_report_and_an_export_write_or_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ERROR_REPORTING", "WANDB_SILENT"):
        monkeypatch.setenv(name, "false")
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setattr(socket, "gethostname", lambda: SECRETS["HOSTNAME"])
    monkeypatch.setattr(platform, "node", lambda: SECRETS["HOSTNAME"])
    wandb.teardown()
    study = digits_study(
        tmp_path / "runs", wandb="offline", trials=1, epochs=1, eval_images=12, refine=0, defense="identity"
    )
    said = io.StringIO()
    console = Console(file=said, width=200)
    assert session.begin(study, console, debug=True) == 0
    candidates = SearchHistory(study).candidates()[:1]
    exporter.export_all(study, candidates, 1, study.folder / "export", console, despite_alarms=True)
    wandb.teardown()

    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    written = files | {Path("said"): said.getvalue().encode()}
    kinds = {path.suffix for path in files}
    assert {".wandb", ".log", ".html", ".journal", ".csv", ".md", ".json", ".yaml", ".png"} <= kinds
    assert sum(OURS in content for content in written.values()) > 5
    found = {str(path) for path, content in written.items() if b"hushhush" in content.lower()}
    assert found == set()
    host = platform.uname().node.encode()
    assert len(host) < 8 or not any(host in content for content in written.values())


def test_a_password_in_a_storages_uri_is_refused_and_not_repeated() -> None:
    uri = "sftp://me:hushhush13@host/runs"
    for use in (lambda: make_study({"storage": uri}), lambda: search_names(uri)):
        with pytest.raises(InputError, match="without a password.*me:\\*\\*\\*@host") as refused:
            use()
        assert "hushhush13" not in str(refused.value)
