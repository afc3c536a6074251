"""One run of Weights & Biases: whose it is, where it lies, and what it does not tell of this machine."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import uuid
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import wandb
from wandb.sdk import wandb_setup
from wandb.sdk.lib import wbauth

from search.storage.atomic import write_atomic
from search.tracking.time_limit import within

Mode = Literal["online", "offline", "disabled"]

PATIENCE_S = 20.0
"""How long one call to wandb may take before W&B counts as failed."""

PROJECT = "crucible"
"""Where runs go unless $WANDB_PROJECT, or a `wandb init`, says otherwise."""

STEPS = {"search": "trial", "trial": "epoch", "refinement": "epoch"}
"""Against what the charts of each type of run are drawn."""


def found_mode() -> Mode:
    """Return what $WANDB_MODE says, or else online where a key is found."""
    for mode in get_args(Mode):
        if os.environ.get("WANDB_MODE") == mode:
            return mode
    with contextlib.suppress(Exception):
        return "online" if has_key() else "offline"
    return "offline"


def has_key() -> bool:
    """Say whether wandb would find a key; it would ask for one at the terminal otherwise."""
    settings = wandb_setup.singleton().settings
    told = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key
    return bool(told or wbauth.read_netrc_auth(host=settings.base_url))


def project() -> str:
    """Return the project of all runs."""
    return str(wandb_setup.singleton().settings.project or PROJECT)


def hush(folder: Path) -> None:
    """Set what wandb takes from the environment alone.

    Args:
        folder: the search's.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its crash reports go to a third party
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ["WANDB_DATA_DIR"] = str(folder / "wandb")  # tables are staged here: an offline run needs them
    os.environ["WANDB_CACHE_DIR"] = str(folder / "wandb" / "cache")  # a home folder may be read-only


def upload(folder: Path) -> str:
    """Return the command that uploads what a search logged offline."""
    return f"wandb sync {shlex.quote(str(folder / 'wandb'))}"


def leet(folder: Path) -> str:
    """Return the command that shows what a search logged; leet would tell W&B of its use otherwise."""
    return f"WANDB_ERROR_REPORTING=false wandb leet {shlex.quote(str(folder / 'wandb'))}"


def start(folder: Path, key: str, mode: Mode, about: dict[str, Any], *, replaces: bool) -> wandb.Run:
    """Open a run; the caller bounds the time.

    Args:
        key: names the run within its search.
        about: what wandb.init takes: name, group, job type, tags, config.
        replaces: whatever a server has of the run gives way; else it goes on.

    Raises:
        ConnectionError: online is asked for without a key.
    """
    if mode == "online" and not has_key():
        raise ConnectionError("there is no key: run `wandb login` or set WANDB_API_KEY")
    run = wandb.init(
        project=project(),
        id=identity(folder, about["group"], key),
        dir=str(folder),
        mode=mode,
        resume=None if replaces else "allow",
        reinit="create_new",
        settings=_settings(),
        **about,
    )
    if step := STEPS.get(about["job_type"]):
        run.define_metric(step)
        run.define_metric("*", step_metric=step)
    return run


def _settings() -> wandb.Settings:
    """Return what keeps wandb quick and quiet, and the machine's name, environment and code to itself."""
    return wandb.Settings(
        # shorter than our own patience, so that wandb's clearer error comes first
        init_timeout=PATIENCE_S * 0.8,
        finish_timeout=PATIENCE_S * 0.8,
        finish_timeout_raises=True,
        stop_fn=lambda: None,  # else the stop button of one trial's page interrupts the whole search
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        host=PROJECT,
        label_disable=True,
        program=PROJECT,  # else its path, which may lie in somebody's home
        save_code=False,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=5.0,
    )


def identity(folder: Path, search: str, key: str) -> str:
    """Return a run's identity: the same when the search is resumed, another in another folder."""
    path = folder / "wandb" / "identity"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, uuid.uuid4().hex[:8].encode())
    return re.sub(r"[^\w.-]+", "-", f"{search[:40]}-{key}-{path.read_text()}")


def begun(folder: Path, search: str, key: str) -> bool:
    """Say whether this folder holds a part of the run already."""
    return any((folder / "wandb").glob(f"*run-*_*-{identity(folder, search, key)}"))


def abandon() -> None:
    """Leave wandb-core behind: it serves all runs, and waits a minute for a dead server when the program ends."""
    with contextlib.suppress(Exception):  # none may run
        service = wandb_setup.singleton().assert_service()
        if service._proc is not None:  # else it is another program's
            service._proc._process.kill()
            within(PATIENCE_S, partial(service.teardown, 0))
    # Not wandb.teardown(): the threads of runs that are still open would write a traceback each.
    wandb_setup._singleton = None
