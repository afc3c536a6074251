"""The doctor: each piece that is missing is named with its remedy, and nothing that is there is blamed."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb

from search.cli import doctor
from search.cli.doctor import GIB, Finding, examine
from search.data import adding
from tests.support import own


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine without a GPU, a driver or a key for W&B."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    (tmp_path / "dev").mkdir()
    wandb.teardown()
    yield
    wandb.teardown()


def found(what: str, tmp_path: Path, storage: str | None = None) -> Finding:
    """Return the one finding of a name."""
    summary = examine(storage or str(tmp_path / "runs"), str(tmp_path / "data"))
    (finding,) = [each for each in summary if each.what == what]
    return finding


def room(gib: float) -> Callable[[Path], Any]:
    """Return a disk_usage of disks that have so much."""
    return lambda path: SimpleNamespace(total=gib * GIB, used=0, free=gib * GIB)


def test_a_machine_that_lacks_nothing_is_not_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", room(100))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 65536))
    summary = examine(str(tmp_path / "runs"), str(tmp_path / "data"))
    assert [finding for finding in summary if not finding.well] == []
    named = {"python", "torch", "ray", "packages", "device", "shared memory", "open files", "storage", "data folder"}
    assert named | {"Ray's scratch", "mnist", "celeba", "W&B"} <= {finding.what for finding in summary}
    assert len({finding.what for finding in summary}) == len(summary)
    assert list(tmp_path.glob("runs")) == []  # it only looks


def test_packages_that_differ_from_the_lock_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("ray==2.59.0\ntorch==2.13.0\nbottle==0.1\nno-such-thing==1.0\noptuna==5.0.0\nwandb==0.31.0\n")
    monkeypatch.setattr(doctor, "LOCK", lock)
    assert found("torch", tmp_path).well  # whatever its build is
    assert found("ray", tmp_path) == Finding("ray", False, "2.60.0, not 2.59.0", "make clean setup")
    rest = found("packages", tmp_path)
    assert not rest.well and "bottle 0.13.4, not 0.1" in rest.found and "no-such-thing not installed, not" in rest.found


@pytest.mark.parametrize(
    ("cuda", "hidden", "said", "remedy"),
    [
        (None, None, "2 GPUs, driver 550.54.15, but a CPU build of torch", "install a CUDA build of torch 2.13.0"),
        ("13.0", None, "2 GPUs, driver 550.54.15, but torch built for CUDA 13.0: ", "update the driver, or install a"),
        ("13.0", "", "CUDA_VISIBLE_DEVICES hides them", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_torch_cannot_use_says_why(
    cuda: str | None, hidden: str | None, said: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5 2024\nGCC\n"
    )
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("the driver is too old\nmore")))
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    finding = found("device", tmp_path)
    assert not finding.well and said in finding.found and remedy in finding.remedy and "\n" not in finding.found


def test_a_gpu_that_torch_sees_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla of old")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch, "ones", lambda *size, device: (_ for _ in ()).throw(RuntimeError("no kernel image")))
    finding = found("device", tmp_path)
    assert not finding.well and finding.found.startswith("Tesla of old, ") and "no kernel image" in finding.found
    assert finding.remedy == "install a torch built for it: this one was built for sm_80, sm_90"
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    assert found("device", tmp_path).well


def test_shared_memory_and_open_files_that_are_few_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", room(1 / 16))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 1024))
    memory, files, disk = (found(what, tmp_path) for what in ("shared memory", "open files", "data folder"))
    assert not memory.well and "0.1 of 0.1 GiB free in /dev/shm" in memory.found and "--shm-size" in memory.remedy
    assert not files.well and files.found == "at most 1024 in a process; Ray wants 8192" and "ulimit" in files.remedy
    assert not disk.well and disk.remedy == "choose another --data-dir, or set $CRUCIBLE_DATA"
    monkeypatch.setattr(doctor, "SHARED", tmp_path / "none")
    assert not found("shared memory", tmp_path).well
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, resource.RLIM_INFINITY))
    assert found("open files", tmp_path).well


def test_a_storage_that_cannot_be_written_or_reached_is_named(tmp_path: Path) -> None:
    assert found("storage", tmp_path, "/proc/nowhere").remedy == "choose another --storage"
    unknown = found("storage", tmp_path, "nosuch://bucket/runs")
    assert not unknown.well and "fsspec knows" in unknown.remedy


def test_data_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    mnist, celeba = found("mnist", tmp_path), found("celeba", tmp_path)
    assert mnist.remedy == "python launch.py data fetch mnist" and mnist.found.startswith("absent: not in ")
    assert celeba.remedy.startswith("put img_align_celeba") and "its licence forbids" in celeba.found


def test_a_key_for_the_server_in_use_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.lab")
    wandb.teardown()
    missing = found("W&B", tmp_path)
    assert missing.well and missing.remedy == "wandb login" and "no key for http://wandb.lab" in missing.found
    (tmp_path / "netrc").write_text(f"machine elsewhere.lab login user password {'0' * 40}\n")
    assert found("W&B", tmp_path).remedy == "wandb login"  # a key for another server is none for this one
    (tmp_path / "netrc").write_text(f"machine wandb.lab login user password {'0' * 40}\n")
    there = found("W&B", tmp_path)
    assert there.remedy == "" and there.found == "a key for http://wandb.lab; searches log online unless told otherwise"
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # wandb reads its variables once
    assert "searches log offline" in found("W&B", tmp_path).found


def test_places_that_may_not_be_used_are_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")
    ray = found("Ray's scratch", tmp_path)
    assert not ray.well and "/proc/none/ray" in ray.found and ray.remedy.startswith("set RAY_TMPDIR to a folder with")

    stat = Path.stat

    def refuse(path: Path, **more: Any) -> Any:
        if path.name in ("data", "netrc"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **more)

    monkeypatch.setattr(Path, "stat", refuse)
    data, key = found("data folder", tmp_path), found("W&B", tmp_path)
    assert not data.well and data.found.endswith("data: Permission denied; set $CRUCIBLE_DATA to another")
    assert key.remedy == "wandb login"


@pytest.mark.parametrize(
    ("variable", "value"), [("WANDB_MODE", "Offline"), ("WANDB_BASE_URL", "localhost:8080"), ("WANDB_SILENT", "maybe")]
)
def test_a_variable_that_wandb_refuses_is_a_finding(
    variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    wandb.teardown()
    finding = found("W&B", tmp_path)
    assert not finding.well and finding.remedy == "set it to what wandb takes, or unset it"
    assert finding.found.startswith(f"wandb refuses {variable}={value}: ") and "\n" not in finding.found


def test_data_of_a_user_that_are_damaged_are_added_again_and_not_fetched(tmp_path: Path) -> None:
    adding.add("leaves", [own.folder_of(tmp_path / "pictures")], data_dir=tmp_path / "data")
    assert found("leaves", tmp_path).well
    (tmp_path / "data" / "decoded" / "leaves" / "y_test.npy").write_bytes(b"")
    damaged = found("leaves", tmp_path)
    assert not damaged.well and "y_test.npy is cut short or altered: it must have" in damaged.found
    again = f"data add leaves {tmp_path / 'pictures'}"
    assert damaged.remedy == f"add it again: python launch.py data remove leaves, then {again}"
