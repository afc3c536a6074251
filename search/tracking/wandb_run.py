"""Opens Weights & Biases runs: mode, project, identity, and the settings that say what of this machine they contain."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import uuid
from functools import partial
from pathlib import Path
from typing import Any, Literal

import wandb
from pydantic import ValidationError
from wandb.errors import AuthenticationError
from wandb.sdk import wandb_setup
from wandb.sdk.lib import wbauth

from search.storage.atomic import write_atomic
from search.storage.uri import mask_credentials
from search.tracking.time_limit import within
from spaces.exceptions import InputError

Mode = Literal["online", "offline", "disabled"]

PATIENCE_S = 20.0
"""Time limit of one call to wandb, in seconds; after it, W&B counts as failed."""

PROJECT = "crucible"
"""The default project, unless $WANDB_PROJECT or `wandb init` sets another one."""

STEPS = {"search": "trial", "training": "epoch"}
"""The metric on the x axis of the charts of each job type that has charts."""

CODE = Path(__file__).resolve().parents[2]
"""The folder of the code; the run of a search contains its commit."""

LEET = {"workspace_layout": {"left_sidebar": 0.4}, "run_layout": {"left_sidebar": 0.36}}
"""Options of `wandb leet`: its lists are by default too narrow for the names of runs and knobs."""


ONE_RUN: dict[str, Any] = {
    **dict.fromkeys(("run_id", "run_name", "run_group", "run_job_type", "resume", "resume_from", "fork_from")),
    **dict.fromkeys(("sweep_id", "sweep_param_path", "launch_config_path")),
    "launch": False,
}
"""Settings that name one run, as the shell of an agent of W&B has them in $WANDB_RUN_ID and the like; we open many."""


def settings() -> wandb.Settings:
    """Return what wandb resolves from variables and its files.

    Raises:
        InputError: wandb refuses one of them.
    """
    try:
        return wandb_setup.singleton().settings
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        given = "" if "key" in name else f"={mask_credentials(first['input'])}"
        raise InputError(f"wandb refuses WANDB_{name.upper()}{given}: {first['msg']}") from None


def found_mode() -> Mode:
    """Return the mode that wandb resolves ($WANDB_MODE, `wandb offline`); online needs a key, or to be asked for."""
    with contextlib.suppress(Exception):  # a variable that wandb refuses
        mode = settings().mode
        if mode == "disabled":
            return "disabled"
        if mode not in ("offline", "dryrun") and (os.environ.get("WANDB_MODE") or has_key()):
            return "online"
    return "offline"


def has_key() -> bool:
    """Return whether wandb finds an API key; without one, it would prompt for it at the terminal."""
    found = settings()
    told = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or found.api_key
    try:
        return bool(told or wbauth.read_netrc_auth(host=found.base_url))
    except (OSError, AuthenticationError):  # a .netrc that may not be read, or what is no key
        return False


def project() -> str:
    """Return the name of the project of all runs."""
    return str(wandb_setup.singleton().settings.project or PROJECT)


def hush(folder: Path) -> None:
    """Set the options that wandb reads only from environment variables.

    The wandb-core of another process, which a parent hands down, is not ours: it ends with that process, and refuses
    the runs of a search that was killed as in use.

    Args:
        folder: the folder of the search.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # crash reports go to a third party
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ["WANDB_DATA_DIR"] = str(folder / "wandb")  # tables are staged here, and offline runs need them
    os.environ["WANDB_CACHE_DIR"] = str(folder / "wandb" / "cache")  # the home folder may be read-only
    if wandb_setup._singleton is None or wandb_setup._singleton._connection is None:
        os.environ.pop(wandb.env.SERVICE, None)


def upload(folder: Path) -> str:
    """Return the command that uploads the offline runs of a search."""
    return shlex.join(["wandb", "sync", str(folder / "wandb"), str(candidates(folder))])


def leet(folder: Path) -> str:
    """Return the command that shows the runs of a search; WANDB_ERROR_REPORTING turns off the usage reports of leet."""
    options = shlex.quote(str(folder / "wandb" / "leet"))
    return f"WANDB_ERROR_REPORTING=false WANDB_CONFIG_DIR={options} wandb leet {shlex.quote(str(folder / 'wandb'))}"


def candidates(folder: Path) -> Path:
    """Return the folder with the runs of candidates, which would crowd the list of trainings in `wandb leet`."""
    return folder / "wandb" / "candidates" / "wandb"


def start(folder: Path, key: str, mode: Mode, about: dict[str, Any], *, replaces: bool) -> wandb.Run:
    """Open a run; the caller must limit the time.

    Args:
        key: identifies the run within its search.
        about: arguments of wandb.init: name, group, job type, tags, config.
        replaces: whether the run replaces its data on a server; otherwise it is continued.

    Raises:
        ConnectionError: the mode is online, and there is no key.
    """
    if mode == "online" and not has_key():
        raise ConnectionError("there is no key: run `wandb login` or set WANDB_API_KEY")
    identified = identity(folder, about["group"], key)
    home = candidates(folder).parent if about["job_type"] == "candidate" else folder
    home.mkdir(exist_ok=True)
    for name, value in ONE_RUN.items():
        setattr(wandb_setup.singleton().settings, name, value)
    run = wandb.init(
        project=project(),
        id=identified,
        dir=str(home),
        mode=mode,
        resume=None if replaces else "allow",
        reinit="create_new",
        settings=_settings(about["job_type"], system_metrics=about["config"].get("system_metrics", False)),
        **about,
    )
    if step := STEPS.get(about["job_type"]):
        run.define_metric(step)
        run.define_metric("*", step_metric=step)
    return run


def _settings(job_type: str, *, system_metrics: bool) -> wandb.Settings:
    """Return settings that keep wandb fast and silent.

    Only the run of the search describes this machine: command, commit, Python, packages, hardware. No run contains the
    names of the host and of the user, or environment variables.
    """
    describes = job_type == "search"
    slurm = any(name.startswith("SLURM_") for name in os.environ)  # wandb would send these, with the names of nodes
    return wandb.Settings(
        # Shorter than our own time limit, so that the clearer error of wandb is reported.
        init_timeout=PATIENCE_S * 0.8,
        finish_timeout=PATIENCE_S * 0.8,
        finish_timeout_raises=True,
        stop_fn=lambda: None,  # otherwise the stop button of one run interrupts the whole search
        console="off",
        silent=True,
        symlink=job_type != "candidate",  # latest-run and the like, which take a tenth of its time
        disable_code=True,  # the tracker saves the code: wandb would save launch.py alone
        save_code=False,
        disable_git=not describes,
        git_root=str(CODE) if describes else None,
        host=PROJECT,
        username="",
        email="",
        label_disable=True,
        program="launch.py",  # otherwise the path, which may contain a user name
        x_executable="python",
        x_disable_machine_info=not describes,
        x_disable_meta=slurm or not describes,
        x_disable_stats=not (describes and system_metrics),
        x_save_requirements=describes,
        x_transaction_log_flush_interval=5.0,
    )


def identity(folder: Path, search: str, key: str) -> str:
    """Return the id of a run: unchanged when the search is resumed, different in another folder."""
    path = folder / "wandb" / "identity"
    if not path.exists():
        options = folder / "wandb" / "leet"
        path.parent.mkdir(exist_ok=True)  # not its parents: a storage that has gone must return by itself
        options.mkdir(exist_ok=True)
        write_atomic(options / "wandb-leet.json", json.dumps(LEET).encode())
        write_atomic(path, uuid.uuid4().hex[:8].encode())
    # The key first: `wandb leet` truncates what it lists.
    return re.sub(r"[^\w.-]+", "-", f"{key}-{search[:40]}-{path.read_text(encoding='utf-8')}")


def begun(folder: Path) -> set[str]:
    """Return the ids of the runs of which this folder contains a part, but for those of candidates."""
    return {path.name.partition("_")[2].partition("-")[2] for path in (folder / "wandb").glob("*run-*_*-*")}


def tidy(run: wandb.Run) -> None:
    """Delete the logs of a finished run of a candidate, which take more space than the run itself."""
    for name in ("logs", "tmp"):
        shutil.rmtree(Path(run.dir).parent / name, ignore_errors=True)


def abandon() -> None:
    """Kill wandb-core, which serves all runs; at exit it would wait a minute for a server that does not answer."""
    with contextlib.suppress(Exception):  # wandb-core may not be running
        service = wandb_setup.singleton().assert_service()
        if service._proc is not None:  # None: another program started it
            service._proc._process.kill()
            within(PATIENCE_S, partial(service.teardown, 0))
    # Not wandb.teardown(): the thread of each open run would print a traceback.
    wandb_setup._singleton = None
