"""What this machine can do, and what is missing, each with its remedy."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from search import remote, tasks
from search.datasets import DATASETS
from search.study import Study
from spaces.space import InputError

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `remedy` is empty where all is well or nothing is needed."""

    what: str
    well: bool
    found: str
    remedy: str = ""


def examine(storage: str, data_dir: str | None, address: str | None = None) -> list[Finding]:
    """Return the findings on this machine, and on the cluster at an address."""
    here = [_python(), *_packages(), _device(), _memory(), *_storage(storage), *_data(data_dir), _wandb()]
    return here + (_cluster(address, storage, data_dir) if address else [])


def _python() -> Finding:
    well = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding("python", well, sys.version.split()[0], "" if well else "use Python 3.11, 3.12 or 3.13")


def _packages() -> list[Finding]:
    findings = []
    for name in ("torch", "torchattacks", "ray", "optuna", "wandb"):
        try:
            findings.append(Finding(name, True, version(name)))
        except PackageNotFoundError:
            findings.append(Finding(name, False, "not installed", "make setup"))
    return findings


def _device() -> Finding:
    if torch.cuda.is_available():
        return Finding(
            "device", True, ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        )
    built = "no GPU is seen" if torch.version.cuda else "this torch is a CPU build"
    return Finding("device", True, f"{os.cpu_count()} CPU cores; {built}", "a GPU needs its driver and a CUDA torch")


def _memory() -> Finding:
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    well = shared > GIB
    remedy = "" if well else "give the machine or container more (docker run --shm-size=4g)"
    return Finding("shared memory", well, f"{shared / GIB:.1f} GiB free for Ray's objects", remedy)


def _storage(storage: str) -> list[Finding]:
    """Look at the disk that a search writes to and, where the storage is a URI, whether it answers."""
    try:
        storage = remote.checked(storage)
        mirror, disk = remote.mirror(storage), _disk(remote.local(storage))
        if mirror is not None:
            mirror.reach()
    except ValueError as error:
        return [Finding("storage", False, storage, str(error))]
    except OSError as error:
        return [disk, Finding("storage URI", False, str(error), "see to its credentials, or choose another --storage")]
    return [disk, Finding("storage URI", True, f"{storage} can be written")] if mirror else [disk]


def _disk(storage: Path) -> Finding:
    there = next(path for path in (storage.absolute(), *storage.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    well = free > 5 * GIB and os.access(there, os.W_OK)
    return Finding("storage", well, f"{free / GIB:.0f} GiB free in {there}", "" if well else "choose another --storage")


def _data(data_dir: str | None) -> list[Finding]:
    findings = []
    for dataset in DATASETS:
        status = tasks.check(dataset, data_dir)
        remedy = "" if status.state == "ready" else f"python launch.py data fetch {dataset}"
        findings.append(Finding(dataset, status.state != "altered", f"{status.state}: {status.detail}", remedy))
    return findings


def _wandb() -> Finding:
    key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
    return Finding(
        "W&B", True, "a key is found" if key else "no key: runs are logged offline", "" if key else "wandb login"
    )


def _cluster(address: str, storage: str, data_dir: str | None) -> list[Finding]:
    """Join a cluster as a search would, which tries its versions, the way of code and data, and the storage."""
    from search.cluster import joined, spoken  # Ray takes a second to import

    study = Study(task="digits/A", address=address, storage=storage, data_dir=data_dir)
    study.root.mkdir(parents=True, exist_ok=True)
    try:
        with joined(study):
            return [Finding("cluster", True, node) for node in spoken()]
    except (InputError, OSError) as error:
        return [Finding("cluster", False, str(error), "docs/cluster.md")]
