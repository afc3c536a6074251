"""The Ray cluster on which a search runs: start or join it, check its nodes, and leave it."""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from fsspec.core import url_to_fs
from ray.exceptions import AuthenticationError, GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from search.classifiers import own
from search.data import cache, splits
from search.engine.local_ray import ensure_token, ray_folder
from search.study.study import Study
from spaces.exceptions import InputError

ROOT = Path(__file__).resolve().parents[2]
CODE = [str(ROOT / package) for package in ("spaces", "attacks", "defenses", "search")]
ALL_BUT_PYTHON = ["**/*.*", "!**/*.py", "!."]
"""Files of the four packages that are not sent, in .gitignore syntax: workers need only the code of every folder."""
FOLDERS = {"CRUCIBLE_DATA", "CRUCIBLE_CACHE"}
"""Variables that name a folder, perhaps relative to the driver's working directory."""
ASK_S = 300.0
"""Seconds within which a node must receive the code and the data, and check the storage."""
PATIENT = {"RAY_grpc_keepalive_timeout_ms": "120000"}
"""By default a worker closes a silent connection after 20 s, which its driver may notice only after five minutes."""
CONTEXTS = 0.1
"""The fraction of a GPU left to CUDA contexts, which the cap on a process's memory does not count."""


@dataclass(frozen=True)
class WorkerResources:
    """The resources of a worker.

    Args:
        cpu, gpu: CPU cores and GPUs of its node; a fraction of a GPU shares one.
        data: the decoded data set in Ray's object store, for a node that lacks it; None on a cluster of this machine.
        checksum: that of the data set.
        classifiers: those that users added to it, in Ray's object store too.
    """

    cpu: float
    gpu: float
    data: ray.ObjectRef[Any] | None = None
    checksum: str = ""
    classifiers: ray.ObjectRef[Any] | None = None


@contextmanager
def joined(study: Study) -> Iterator[WorkerResources]:
    """Start or join the Ray cluster, yield the resources of each worker, and leave the cluster.

    Raises:
        InputError: there is no such cluster, it runs another Ray or Python, no node has the resources for a trial, or
            a node does not reach the storage.
    """
    with _connected(study, _address(study)):
        yield _join(study)


def at_work(study: Study, resources: WorkerResources, what: Callable[..., Any], *more: object) -> Any:
    """Run a function of the study on a worker."""
    ready(study, resources)
    return what(study, *more)


def ready(study: Study, resources: WorkerResources) -> None:
    """Prepare a worker: cap its share of the GPU memory, and ensure that its node has the data."""
    if 0 < resources.gpu < 1 and torch.cuda.is_available():
        # Ray's fractions are bookkeeping only.
        torch.cuda.set_per_process_memory_fraction((1 - CONTEXTS) * resources.gpu)
    if (data := resources.data) is not None and resources.classifiers is not None:
        dataset = study.task.partition("/")[0]  # no task can be found before its data are there
        cache.adopt(dataset, study.data_dir, lambda: ray.get(data), resources.checksum)
        own.adopt(dataset, study.data_dir, ray.get(resources.classifiers))


def spoken() -> list[str]:
    """Return one line for each node of the joined cluster."""
    lines = []
    for node in ray.nodes():
        held = node["Resources"]
        kinds = [name.partition(":")[2] for name in held if name.startswith("accelerator_type:")]
        gpus = f", {held['GPU']:g} GPUs ({', '.join(kinds) or 'of unknown kind'})" if "GPU" in held else ""
        state = f"{held.get('CPU', 0):g} CPUs{gpus}" if node["Alive"] else "dead"
        lines.append(f"node {node['NodeManagerAddress']}: {state}")
    return lines


def slots(resources: WorkerResources) -> int:
    """Return how many trials the cluster can run at once in its present state; at least one."""
    nodes = (node["Resources"] for node in ray.nodes() if node["Alive"])
    asked = {kind: amount for kind, amount in (("CPU", resources.cpu), ("GPU", resources.gpu)) if amount}
    return max(1, sum(int(min(node.get(k, 0.0) / amount + 1e-6 for k, amount in asked.items())) for node in nodes))


def capacity(study: Study) -> int:
    """Return how many of the study's trials its cluster can run at once; join it only for this question."""
    with _connected(study, study.address):
        return slots(_asked(study)[0])


def _address(study: Study) -> str | None:
    """Return the study's cluster; a job that was submitted to a cluster runs on that one."""
    return study.address or ("auto" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else None)


def _join(study: Study) -> WorkerResources:
    resources, fitting = _asked(study)
    if _address(study) is None:
        return resources
    dataset = study.resolved.task.dataset
    resources = replace(
        resources,
        data=ray.put(cache.pack(dataset, study.data_dir)),
        checksum=splits.checksum(dataset, study.data_dir),
        classifiers=ray.put(own.pack(dataset, study.data_dir)),
    )
    _look_over(study, resources, fitting)
    return resources


def _asked(study: Study) -> tuple[WorkerResources, list[dict[str, Any]]]:
    """Return the resources of a trial, and the nodes that have them."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    cpu, gpu = study.cpus_per_trial, study.gpu_share(any("GPU" in node["Resources"] for node in nodes))
    return WorkerResources(cpu, gpu), _fitting(nodes, cpu, gpu)


@contextmanager
def _connected(study: Study, address: str | None) -> Iterator[None]:
    """Connect this process to Ray for a while; a connection of the user's own is left alone."""
    if ray.is_initialized():
        raise InputError(
            "a search must connect to Ray itself, but this process is connected already: call ray.shutdown() first, "
            "or run the search in a process of its own"
        )
    with ray_folder() if address is None else nullcontext() as folder:
        try:
            _connect(study, address, folder)
            yield
        finally:
            ray.shutdown()


@contextmanager
def _apart(address: str | None) -> Iterator[None]:
    """Leave the user's working directory, and on a cluster the script's folder too.

    Ray puts both first in the path of every worker, where a folder named attacks/ would be imported in place of ours,
    and on another node an older copy of our code in place of the one that is sent.
    """
    script = sys.argv[:1]
    with tempfile.TemporaryDirectory() as empty, chdir(ROOT if address is None else empty):
        sys.argv[:1] = script if address is None else [""]
        try:
            yield
        finally:
            sys.argv[:1] = script


def _connect(study: Study, address: str | None, folder: Path | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    environment = {"CUDA_VISIBLE_DEVICES": ""} if study.gpus_per_trial == 0 else {}  # Ray would show all GPUs
    if address is None:
        environment |= {name: os.path.abspath(os.environ[name]) for name in FOLDERS & os.environ.keys()}
        ensure_token()
        options |= {"address": "local", "include_dashboard": False, "_temp_dir": str(folder)}
        options |= {"runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT), **environment}}}
    else:
        sent = {"py_modules": CODE, "excludes": ALL_BUT_PYTHON, "env_vars": environment | PATIENT}
        options |= {"address": address, "runtime_env": sent}
    _reachable(address)
    try:
        with _apart(address):
            ray.init(**options)
    except (ConnectionError, ValueError, AuthenticationError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"address must be a running Ray cluster, but {address}: {reason} "
            "(where the cluster asks for a token, set RAY_AUTH_MODE=token)"
        ) from None
    except RuntimeError as error:
        if address is None:
            raise
        raise InputError(_refused(address, error)) from None


def _refused(address: str, error: RuntimeError) -> str:
    """Return in one line why Ray did not join a running cluster."""
    versions = re.findall(r"(?:Ray|Python): (\S+)", str(error))
    if len(versions) == 4:
        return (
            "a cluster must run the same Ray and Python as this process, "
            f"{versions[2]} on {versions[3]}, but {address} runs {versions[0]} on {versions[1]}: "
            "install requirements.lock on all its nodes, or submit the search to it (`ray job submit`)"
        )
    if "No node info found" in str(error):
        return (
            f"a search must run on a node of its cluster, but this machine is none of {address}: make it one "
            f"(`ray start --address={address}`), or submit the search to it (`ray job submit`)"
        )
    return f"address must be a running Ray cluster, but {address}: {str(error).splitlines()[0]}"


def _reachable(address: str | None) -> None:
    """Reject immediately an address where nothing listens; Ray would retry for more than a minute."""
    if "://" in str(address):
        raise InputError(
            f"address must be auto or HOST:PORT, but is {address}: from a machine that is no node of the cluster, "
            "submit the search (`ray job submit`)"
        )
    host, colon, port = (address or "").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise InputError(f"address must be a running Ray cluster, but {address}: {error}") from None


def _fitting(nodes: list[dict[str, Any]], cpu: float, gpu: float) -> list[dict[str, Any]]:
    """Return the nodes that have the resources for a trial."""
    if gpu > 1 and gpu % 1:
        raise InputError(f"gpus_per_trial must be a fraction of one GPU or whole ones, but is {gpu:g}")
    sizes = [(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in nodes]
    for name, amount, most in zip(("cpus", "gpus"), (cpu, gpu), map(max, zip(*sizes, strict=True)), strict=True):
        if amount > most:
            raise InputError(
                f"{name}_per_trial must be at most what the cluster has on one node, {most:g}, but is {amount:g}"
            )
    fitting = [node for node, (cpus, gpus) in zip(nodes, sizes, strict=True) if cpus >= cpu and gpus >= gpu]
    if not fitting:
        held = ", ".join(f"{cpus:g} and {gpus:g}" for cpus, gpus in sorted(set(sizes)))
        raise InputError(
            f"a training must fit on one node, but asks for {cpu:g} CPUs and {gpu:g} GPUs of nodes with {held}"
        )
    return fitting


def _look_over(study: Study, resources: WorkerResources, nodes: list[dict[str, Any]]) -> None:
    """Send the code and the data to each node, and check that it reaches the storage.

    Raises:
        InputError: a node lacks a package, has no disk space for the data, or sees another storage.
    """
    files, token = url_to_fs(f"{study.storage}/.token-{uuid.uuid4().hex}")
    files.pipe_file(token, b"crucible")
    look: Any = ray.remote(at_work)
    visit = replace(resources, gpu=0)  # it requests no GPU, and must not use one
    try:
        asked = []
        for node in nodes:
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            seen = look.options(num_cpus=0, scheduling_strategy=pinned).remote(study, visit, _sees, token)
            asked.append((node["NodeID"], node["NodeManagerAddress"], seen))
        for node, address, seen in asked:
            if not _answer(node, address, seen):
                raise InputError(
                    f"the storage must be a folder that every node reaches, but {study.storage} is another one on node "
                    f"{address}, or is not there: put it on a shared file system and name it by --storage, or give a "
                    "URI (s3://...)"
                )
    finally:
        files.rm_file(token)


def _sees(study: Study, token: str) -> bool:
    files, _ = url_to_fs(study.storage)
    return bool(files.exists(token))


def _answer(node: str, address: str, asked: ray.ObjectRef[bool]) -> bool:
    """Return whether a node sees the storage; True also for a node that died meanwhile."""
    try:
        return ray.get(asked, timeout=ASK_S)
    except GetTimeoutError:
        reason = f"it did not answer in {ASK_S:g} s"
    except RayTaskError as error:
        reason = str(error.cause)
    except RayError as error:
        if node not in {each["NodeID"] for each in ray.nodes() if each["Alive"]}:
            return True
        reason = str(error)
    reason = " ".join(reason.split()[:60])
    raise InputError(
        f"each node must have what requirements.lock names, the data and the storage, but node {address}: {reason}"
    )
