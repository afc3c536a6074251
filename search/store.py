"""The store: trained things under the fingerprint of everything that shaped them. The one mechanism of caching,
resuming and recovering.

An entry is a folder `kind/key/` with its files and an `entry.json` that holds their SHA-256. It is written beside its
place and renamed, so it is there in full or not at all; what does not match its checksum is set aside and made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save
from torch import nn


def fingerprint(**parts: object) -> str:
    """Return 16 hex digits that change when any part does. Parts must be JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def to_bytes(module: nn.Module) -> bytes:
    """Return the module's weights as safetensors."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()})


def write_atomic(path: Path, content: bytes) -> Path:
    """Write a file that is there in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@contextmanager
def folder_atomic(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into that takes the name `folder` at the end, and is gone if anything fails."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Store:
    """A folder of entries that all searches of one storage share.

    Args:
        root: the folder; made where it is missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def __repr__(self) -> str:
        return f"Store({self.root})"

    def lock(self, kind: str, key: str) -> FileLock:
        """Return the lock of one entry; a process that dies lets go of it."""
        path = self.root / "locks" / f"{kind}-{key}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def get(self, kind: str, key: str) -> Path | None:
        """Return an entry's folder if it is there and whole; a damaged one is set aside."""
        folder = self.root / kind / key
        if not folder.is_dir():
            return None
        try:
            digests = json.loads((folder / "entry.json").read_text())["sha256"]
            if all(_digest((folder / name).read_bytes()) == digest for name, digest in digests.items()):
                return folder
        except (OSError, ValueError, KeyError):
            pass
        shutil.rmtree(self.root / "damaged" / key, ignore_errors=True)
        (self.root / "damaged").mkdir(exist_ok=True)
        os.replace(folder, self.root / "damaged" / key)
        return None

    def about(self, kind: str, key: str) -> dict[str, Any]:
        """Return what an entry says of itself."""
        entry: dict[str, Any] = json.loads((self.root / kind / key / "entry.json").read_text())
        return dict(entry["about"])

    def keys(self, kind: str) -> list[str]:
        """Return the whole entries of a kind; a damaged one is set aside."""
        found = sorted(path.name for path in (self.root / kind).glob("[!.]*"))
        return [key for key in found if self.get(kind, key) is not None]

    def put(self, kind: str, key: str, files: Mapping[str, bytes], about: Mapping[str, object]) -> Path:
        """Write an entry in full and return its folder; the caller holds its lock and saw that it is not there.

        Args:
            files: name -> content.
            about: what shaped it, for people; JSON.
        """
        folder = self.root / kind / key
        with folder_atomic(folder) as temporary:
            for name, content in files.items():
                write_atomic(temporary / name, content)
            entry = {"about": dict(about), "sha256": {name: _digest(content) for name, content in files.items()}}
            write_atomic(temporary / "entry.json", json.dumps(entry, indent=1).encode())
        return folder

    def save_progress(self, key: str, state: Mapping[str, Any]) -> None:
        """Keep the state of a half-done fit, in place of an earlier one."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        payload = buffer.getvalue()
        write_atomic(self._progress(key), _digest(payload).encode() + payload)

    def load_progress(self, key: str, device: torch.device) -> dict[str, Any] | None:
        """Return the state of a half-done fit, or None where there is none or it is damaged."""
        try:
            content = self._progress(key).read_bytes()
        except FileNotFoundError:
            return None
        if _digest(content[64:]).encode() != content[:64]:
            self.drop_progress(key)
            return None
        state: dict[str, Any] = torch.load(io.BytesIO(content[64:]), map_location=device, weights_only=True)
        return state

    def drop_progress(self, key: str) -> None:
        self._progress(key).unlink(missing_ok=True)

    def _progress(self, key: str) -> Path:
        return self.root / "progress" / key


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
