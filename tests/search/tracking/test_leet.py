"""W&B's own terminal browser on a search's folder: no account, no server, a real terminal of usual width."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from search.engine.run import run
from search.tracking import wandb_run
from search.tracking.wandb_tracker import WandbTracker
from tests.conftest import digits_study
from tests.support.engine import Trained

TMUX = shutil.which("tmux")
WANDB = Path(sys.executable).with_name("wandb")


class Terminal:
    """A terminal of 160 x 50 characters in which a command runs."""

    def __init__(self, command: str, folder: Path) -> None:
        self._name = f"crucible-{uuid.uuid4().hex[:8]}"
        self._tmux("new-session", "-d", "-x", "160", "-y", "50", "-c", str(folder), command)

    def keys(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def shows(self, *words: str) -> str:
        """Wait until all words are on the screen, and return the screen."""
        return self._awaited(lambda: self._tmux("capture-pane", "-p").stdout, lambda s: all(w in s for w in words))

    def ends(self) -> None:
        """Wait until the command has ended."""
        self._awaited(lambda: str(self._tmux("has-session").returncode), lambda code: code != "0")

    def close(self) -> None:
        self._tmux("kill-server")

    def _awaited(self, look: Callable[[], str], enough: Callable[[str], bool]) -> str:
        until = time.monotonic() + 60
        while not enough(seen := look()):
            assert time.monotonic() < until, seen
            time.sleep(0.1)
        return seen

    def _tmux(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(TMUX), "-L", self._name, *words], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a search of two trials that logged offline; what leet keeps lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ERROR_REPORTING", "WANDB_SILENT"):
            patch.setenv(name, "false")  # the tracker sets them
        study = digits_study(tmp_path_factory.mktemp("runs"), trials=2, refine=0)
        tracker = WandbTracker("offline", study.folder, print)
        assert run(study, [tracker], debug=True, work=Trained(lambda params: 0.5).work()) == "finished"
        tracker.close()
        yield study.folder


@pytest.fixture
def leet(searched: Path) -> Iterator[Callable[[str], Terminal]]:
    """Run a command in a terminal of its own."""
    with contextlib.ExitStack() as open_ones:

        def start(words: str) -> Terminal:
            terminal = Terminal(f"PATH={WANDB.parent}:$PATH {words}", searched.parent)
            open_ones.callback(terminal.close)
            return terminal

        yield start


@pytest.mark.slow
@pytest.mark.skipif(TMUX is None, reason="no terminal can be had: apt-get install tmux")
def test_leet_shows_the_runs_of_a_search_with_their_charts(searched: Path, leet: Callable[[str], Terminal]) -> None:
    command = wandb_run.leet(searched)
    runs = leet(command)
    screen = runs.shows("Runs [3 items]", "Run Overview", "-t001-smoke", "-t002-smoke", "-search-smoke")
    assert screen.count("offline-run-") == 3
    runs.keys("q")
    runs.ends()
    options = command.split("wandb leet")[0]
    trial = next(searched.glob("wandb/offline-run-*-t001-*"))
    one = leet(f"{options} wandb leet run {trial}")  # in a list, runs of one second stand in any order
    one.shows("Name: smoke-t001", "cheap", "loss", "[x: epoch]")
    one.shows("best_candidate", "train.lambda_rc", "threat", "white-box", "train.lambda_kl")
    best = next(searched.glob("wandb/candidates/wandb/offline-run-*"))
    candidate = leet(f"{options} wandb leet run {best}")
    candidate.shows("attacked_accuracy", "inference.sigma_eps", "feasible")
