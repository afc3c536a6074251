"""The Ray cluster that a search runs on: started here or joined, and left again."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from search.study import Study
from spaces.space import InputError

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def joined(study: Study) -> Iterator[dict[str, float]]:
    """Start or join the Ray cluster, yield a trial's resources, and leave it.

    Raises:
        InputError: there is no such cluster, or it does not hold what a trial asks for.
    """
    try:
        yield _join(study)
    finally:
        ray.shutdown()


def _join(study: Study) -> dict[str, float]:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if study.address is None:
        options |= {"address": "local", "include_dashboard": False}
        options |= {"runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}}}
    else:
        excludes = [".git", ".venv", "runs", "docs", "tests", "*.pyc"]
        options |= {"address": study.address, "runtime_env": {"working_dir": str(ROOT), "excludes": excludes}}
    _reachable(study.address)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, AuthenticationError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"address must be a running Ray cluster, but {study.address}: {reason} "
            "(where the cluster asks for a token, set RAY_AUTH_MODE=token)"
        ) from None
    held = ray.cluster_resources()
    gpus = study.gpus_per_trial
    asked = {"cpu": study.cpus_per_trial, "gpu": (0.25 if held.get("GPU") else 0.0) if gpus is None else gpus}
    for kind, amount in asked.items():
        if amount > held.get(kind.upper(), 0.0):
            raise InputError(
                f"{kind}s_per_trial must be at most what the cluster has, {held.get(kind.upper(), 0.0):g}, "
                f"but is {amount:g}"
            )
    return asked


def _reachable(address: str | None) -> None:
    """Refuse an address where nobody listens at once; Ray would try for more than a minute."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or "://" in str(address):
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise InputError(f"address must be a running Ray cluster, but {address}: {error}") from None
