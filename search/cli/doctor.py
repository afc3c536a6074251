"""Checks what this machine can do and what is missing, with a remedy for each problem."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from search.data import splits
from search.data.folders import roots, try_lock
from search.data.registry import data_set_names
from search.engine.local_ray import REMEDY, ray_folder
from search.storage.mirror import mirror_of
from search.storage.uri import check_storage, local_folder
from search.study.study import Study
from spaces.exceptions import InputError

GIB = 2**30
LOCK = Path(__file__).resolve().parents[2] / "requirements.lock"
NAMED = ("torch", "ray", "optuna", "wandb")
"""Packages with a row of their own: all nodes of a cluster need the same versions."""
OPEN_FILES = 8192
"""Open files that Ray needs; Ray raises the soft limit itself, up to the hard limit."""
DEVICES, DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")
SHARED = Path("/dev/shm")
GPU = "where there is one: its driver; in a container also --gpus all"
MORE = "give the machine or container more (docker run --shm-size=4g)"


@dataclass(frozen=True)
class Finding:
    """The result of one check; `remedy` is empty if there is nothing to do."""

    what: str
    well: bool
    found: str
    remedy: str = ""

    @property
    def optional(self) -> bool:
        """Whether the thing is missing but not required."""
        return self.well and bool(self.remedy)


def examine(storage: str, data_dir: str | None, address: str | None = None) -> list[Finding]:
    """Return the results of all checks of this machine, and of the cluster at `address`."""
    here = [_python(), *_packages(), _device(), _memory(), _files(), *_storage(storage), *_disks(data_dir)]
    here += [*_data(data_dir), _wandb()]
    return here + (_cluster(address, storage, data_dir) if address else [])


def _python() -> Finding:
    well = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding("python", well, sys.version.split()[0], "" if well else "use Python 3.11, 3.12 or 3.13")


def _packages() -> list[Finding]:
    """Compare the installed versions with the pinned versions."""
    pinned = dict(line.split("==") for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line)
    held = {name: _installed(name) for name in pinned}
    other = {name: f"{held[name]}, not {pinned[name]}" for name in pinned if not _same(held[name], pinned[name])}
    found = [Finding(name, name not in other, other.get(name, held[name])) for name in NAMED]
    rest = "; ".join(f"{name} {said}" for name, said in other.items() if name not in NAMED)
    found.append(Finding("packages", not rest, rest or f"all {len(pinned)} as requirements.lock pins them"))
    return [each if each.well else Finding(each.what, False, each.found, "make clean setup") for each in found]


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _same(held: str, pinned: str) -> bool:
    return held.partition("+")[0] == pinned  # 2.13.0+cpu is a build of 2.13.0


def _device() -> Finding:
    """Check the GPUs of this machine, and why torch cannot use them."""
    built = f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build of torch"
    told = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", DRIVER.read_text(encoding="utf-8")) if DRIVER.exists() else None
    driver = f"driver {told[0]}" if told else "no driver"
    given = len([path for path in DEVICES.glob("nvidia*") if path.name[6:].isdigit()])
    if torch.cuda.is_available():
        return _tried(f"{driver}, {built}")
    if not given:
        return Finding("device", True, f"{os.cpu_count()} CPU cores; no GPU is seen, {driver}, {built}", GPU)
    found = f"{given} GPU{'s' * (given > 1)}, {driver}, but {built}"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return Finding("device", False, f"{found}; CUDA_VISIBLE_DEVICES hides them", "unset CUDA_VISIBLE_DEVICES")
    if not torch.version.cuda:
        remedy = f"install a CUDA build of torch {version('torch').partition('+')[0]}"
        return Finding("device", False, found, remedy)
    remedy = "update the driver, or install a torch built for the CUDA that it knows (nvidia-smi shows which)"
    return Finding("device", False, f"{found}: {_refusal(torch.cuda.init)}", remedy)


def _tried(found: str) -> Finding:
    """Test each GPU: torch lists a GPU whose architecture it was not built for, but cannot use it."""
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        if refusal := _refusal(partial(torch.ones, 1, device=f"cuda:{index}")):
            remedy = f"install a torch built for it: this one was built for {', '.join(torch.cuda.get_arch_list())}"
            return Finding("device", False, f"{name}, {found}: {refusal}", remedy)
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Finding("device", True, f"{names}; {found}")


def _refusal(use: Callable[[], object]) -> str:
    """Return why a GPU cannot be used; empty if it can."""
    try:
        use()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return ""


def _memory() -> Finding:
    if not SHARED.exists():
        return Finding("shared memory", False, f"there is no {SHARED} for Ray's objects", MORE)
    disk = shutil.disk_usage(SHARED)
    well = disk.free > GIB
    found = f"{disk.free / GIB:.1f} of {disk.total / GIB:.1f} GiB free in {SHARED} for Ray's objects"
    return Finding("shared memory", well, found, "" if well else MORE)


def _files() -> Finding:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    well = most == resource.RLIM_INFINITY or most >= OPEN_FILES
    found = "no limit" if most == resource.RLIM_INFINITY else f"at most {most}"
    remedy = "" if well else f"ulimit -Hn {OPEN_FILES} before Ray starts (docker run --ulimit nofile={OPEN_FILES})"
    return Finding("open files", well, f"{found} in a process; Ray wants {OPEN_FILES}", remedy)


def _storage(storage: str) -> list[Finding]:
    """Check the disk that a search writes to and, if the storage is a URI, whether it is writable."""
    try:
        storage = check_storage(storage)
        mirror = mirror_of(storage)
        remedy = "set $CRUCIBLE_CACHE to another folder" if mirror else "choose another --storage"
        disk = _disk("storage", local_folder(storage), remedy)
        if mirror is not None:
            mirror.reach()
    except ValueError as error:
        return [Finding("storage", False, storage, str(error))]
    except OSError as error:
        return [disk, Finding("storage URI", False, str(error), "see to its credentials, or choose another --storage")]
    return [disk, Finding("storage URI", True, f"{storage} can be written")] if mirror else [disk]


def _disks(data_dir: str | None) -> list[Finding]:
    elsewhere = "choose another --data-dir, or set $CRUCIBLE_DATA"
    try:
        data, _ = roots(data_dir)
        found = _disk("data folder", data, elsewhere)
    except InputError as error:
        found = Finding("data folder", False, str(error), elsewhere)
    try:
        with ray_folder() as folder:
            ray = _disk(
                "Ray's scratch", folder.resolve().parent, "free some, or set $RAY_TMPDIR to a folder on another disk"
            )
    except InputError as error:
        ray = Finding("Ray's scratch", False, str(error), REMEDY)
    return [found, ray]


def _disk(what: str, folder: Path, remedy: str) -> Finding:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    free, writable = shutil.disk_usage(there).free, os.access(there, os.W_OK)
    fault = "" if writable else ", which cannot be written"
    try:
        if writable:
            try_lock(there)
    except OSError as error:
        fault = f", where files cannot be locked: {error.strerror}"
    well = free > 5 * GIB and not fault
    return Finding(what, well, f"{free / GIB:.0f} GiB free in {there}{fault}", "" if well else remedy)


def _data(data_dir: str | None) -> list[Finding]:
    summary = []
    try:
        names = data_set_names(data_dir)
    except InputError:  # said of the data folder
        return []
    for dataset in names:
        status = splits.check(dataset, data_dir)
        found, remedy = status.detail, "" if status.state == "ready" else f"python launch.py data fetch {dataset}"
        if status.state == "absent":
            found, _, remedy = status.detail.partition(": ")
        elif status.state == "altered":  # what a user added, or what no source has, cannot be fetched
            found, _, remedy = status.detail.rpartition("; ")
        summary.append(Finding(dataset, status.state != "altered", f"{status.state}: {found}", remedy))
    return summary


def _wandb() -> Finding:
    from search.tracking.wandb_run import found_mode, has_key, settings  # wandb takes a second to import

    try:
        server = settings().base_url
    except InputError as error:
        return Finding("W&B", False, f"{error}; searches log offline", "set it to what wandb takes, or unset it")
    mode = found_mode()
    if has_key():
        return Finding("W&B", True, f"a key for {server}; searches log {mode} unless told otherwise")
    return Finding("W&B", True, f"no key for {server}: searches log offline", "wandb login")


def _cluster(address: str, storage: str, data_dir: str | None) -> list[Finding]:
    """Join a cluster like a search does, which checks its versions, the transfer of code and data, and the storage."""
    from search.engine.cluster import joined, spoken  # Ray takes a second to import

    study = Study(task="digits/A", address=address, storage=storage, data_dir=data_dir)
    try:
        study.root.mkdir(parents=True, exist_ok=True)
        with joined(study):
            return [Finding("cluster", True, node) for node in spoken()]
    except (InputError, OSError) as error:
        return [Finding("cluster", False, str(error), "docs/cluster.md")]
