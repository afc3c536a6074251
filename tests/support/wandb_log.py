"""A search that is told to W&B, and what it holds then, read back by wandb's own reader."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.util import get_core_path

from attacks.threat import ThreatModel
from search.study.candidate import Candidate, Proposal, Score
from search.study.study import Study
from search.tracking.wandb_tracker import WandbTracker
from spaces.space import Params

KEY = "0123456789abcdef" * 2 + "planted1"
SECRET = "planted-secret-in-the-environment"
HOST = "planted-host-name"
PARAMS = Params({"latent": 128}, {"draws": 6})


def trial(name: str) -> Proposal:
    return Proposal(name, PARAMS, refines=name.startswith("r0"))


STUDY = Study.model_validate({"name": "shown", "seed": 3, "min_clean_accuracy": 0.8, "notes": "what it is for"})


def candidate(name: str, attacked: float, ms: float, clean: float = 0.9, alarms: tuple[str, ...] = ()) -> Candidate:
    score = Score(
        threat=ThreatModel("Linf", 0.3, "white-box"),
        attacked_accuracy=attacked,
        attacked_error=1 - attacked,
        attacked_rejection=0.0,
        oblivious_accuracy=0.75,
        white_box_accuracy=attacked,
        clean_accuracy=clean,
        clean_rejection=0.0,
        latency_ms_p50=ms,
        latency_ms_p95=2 * ms,
        images=100,
        attacks={"white-box/bpda": attacked},
        alarms=alarms,
    )
    return Candidate(candidate=name, fit="f", defense="puvae", task="mnist/A", params=PARAMS, score=score)


BARE = candidate("undefended", 0.01, 0.0)
SIX = [candidate(f"c{i}", attacked=0.1 * i, ms=float(i)) for i in range(1, 6)]
FRONT = ["c5", "c4", "c3", "c2", "c1"]
CURVED = replace(
    SIX[2], candidate="curved", score=replace(SIX[2].score, risk_coverage=((0.0, 0.7), (0.02, 0.6), (0.05, 0.4)))
)
SIX.append(candidate("wrong", attacked=0.9, ms=9.0, clean=0.5))


@contextmanager
def machine(home: Path) -> Iterator[pytest.MonkeyPatch]:
    """Be a machine with secrets in its environment, an account, and no stored key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ERROR_REPORTING", "WANDB_SILENT"):
            patch.setenv(name, "true" if name == "WANDB_SILENT" else "false")
        patch.setenv("HOME", str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("A_SECRET", SECRET)
        patch.setattr(socket, "gethostname", lambda: HOST)
        wandb.teardown()
        yield patch
        start = time.perf_counter()
        wandb.teardown()
        assert time.perf_counter() - start < 5, "the program's end waits for W&B"


def folders_of(folder: Path, key: str) -> list[Path]:
    """Return the folders of the offline runs of a key, the earliest first."""
    homes = (folder / "wandb", folder / "wandb" / "candidates" / "wandb")
    return sorted(run for home in homes for run in home.glob(f"offline-run-*_??????-{key}-*"))


def folder_of(folder: Path, key: str) -> Path:
    (found,) = folders_of(folder, key)
    return found


def inspect(run: Path, *flags: str) -> str:
    """Return what `wandb leet inspect` prints; the command itself takes half a second to begin."""
    (log,) = run.glob("*.wandb")
    command = [get_core_path(), "leet", "inspect", "--no-observability", *flags, "--json"]
    command += ["--run-file", str(log), str(run.parent)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def held(folder: Path, key: str) -> dict[str, Any]:
    """Return what the run of a training, a candidate, or the search holds."""
    return json.loads(inspect(folder_of(folder, key), "--summary"))


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind, in order."""
    found = map(json.loads, inspect(run).splitlines())
    return [history[kind] for history in found if history["type"] == kind]


def points(run: Path, name: str) -> list[tuple[int, float]]:
    """Return (epoch, value) of every point of a metric."""
    items = [history["item"] for history in records(run, "history")]
    return [(item["epoch"], item[name]) for item in items if name in item]


def summaries(run: Path) -> dict[str, tuple[str, str]]:
    """Return against what each metric is drawn, and which of its values the summary keeps."""
    found = {metric["name"]: metric for metric in records(run, "metric") if "summary" in metric}
    return {name: (metric["step_metric"], *metric["summary"]) for name, metric in found.items()}


def timed(call: Callable[..., None], *args: Any) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def told(tracker: WandbTracker) -> list[float]:
    """Tell of a whole search but its end; return how long each call took."""
    calls: list[tuple[Any, ...]] = [(tracker.search_started, STUDY, BARE), (tracker.trial_started, trial("t"))]
    calls += [(tracker.epoch_ended, trial("t"), epoch, {"cheap": 0.5}) for epoch in range(1, 20)]
    calls += [(tracker.trial_ended, trial("t"), "finished", SIX, None, "")]
    return [timed(*call) for call in calls]
