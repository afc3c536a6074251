"""The store: trained objects under the fingerprint of everything that shaped them. The only mechanism for caching,
resuming and recovering.

An entry is a folder `kind/key/` with its files and an `entry.json` with their SHA-256. It is written to a temporary
folder and renamed, so it is complete or missing; one that does not match its checksums is set aside and made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from search.exceptions import Unreachable
from search.storage.atomic import folder_atomic, write_atomic
from search.storage.mirror import Mirror
from search.storage.outage import MARKER, MEANING, WaitedFolder, WaitingLock, patiently

if TYPE_CHECKING:
    import torch  # `status` must not wait for it
    from torch import nn

FINGERPRINTS = b"Fingerprints are of syntax trees.\n"
"""Marks a store whose keys are made from syntax trees; until 2026-11 they were made from source texts."""
Content = tuple[Mapping[str, bytes], Mapping[str, object]]
"""An entry's files by name, and a description of what shaped it, for people; JSON."""


def to_bytes(module: nn.Module) -> bytes:
    """Return the module's weights as safetensors."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()})


class Store(WaitedFolder):
    """A folder of entries that all searches of one storage share.

    Args:
        root: the folder; created with the first entry, or by `make`.
        mirror: the remote storage that keeps the entries, if there is one.
    """

    marker_text = MEANING + FINGERPRINTS

    def __init__(self, root: Path, mirror: Mirror | None = None) -> None:
        super().__init__(root)
        self.mirror = mirror

    def __repr__(self) -> str:
        return f"Store({self.root})"

    def outdated_fits(self) -> int:
        """Return how many fits have keys of an earlier version; 0 from the second call on, which the marker records."""
        marker = self.root / MARKER
        if not marker.exists() or FINGERPRINTS in marker.read_bytes():
            return 0
        write_atomic(marker, self.marker_text)
        return len(self.held("fits"))

    def expected(self) -> Self:
        """Treat the store as existing; with a mirror, create it, as each node then has its own folder."""
        return super().expected() if self.mirror is None else self.make()

    def lock(self, kind: str, key: str) -> WaitingLock:
        """Return the lock of one entry; it is released if its process dies."""
        self.make().wait()
        return WaitingLock(self.root / "locks" / f"{kind}-{key}")

    @patiently
    def get(self, kind: str, key: str) -> Path | None:
        """Return an entry's folder if it exists and is whole; a damaged one is set aside and fetched again."""
        folder = self.root / kind / key
        if not folder.is_dir():
            return self._fetched(kind, key)
        try:
            if _whole(folder):
                return folder
        except (FileNotFoundError, ValueError, KeyError):
            if self.away:
                return None
        shutil.rmtree(self.root / "damaged" / key, ignore_errors=True)
        (self.root / "damaged").mkdir(exist_ok=True)
        os.replace(folder, self.root / "damaged" / key)
        return self._fetched(kind, key)

    def _fetched(self, kind: str, key: str) -> Path | None:
        """Download an entry from the mirror if it is there and whole; otherwise it will be made and uploaded again."""
        if self.mirror is None:
            return None
        folder = self.make().root / kind / key
        folder.parent.mkdir(exist_ok=True)
        try:
            with folder_atomic(folder) as temporary:
                self.mirror.fetch_entry(f"{kind}/{key}", temporary)
                if not _whole(temporary):
                    raise ValueError("damaged")
        except (OSError, ValueError, KeyError):
            return folder if folder.is_dir() else None  # another process of this node was faster
        return folder

    @patiently
    def about(self, kind: str, key: str) -> dict[str, Any]:
        """Return an entry's description of what shaped it."""
        path = self.root / kind / key / "entry.json"
        if self.mirror is None or path.exists():
            return dict(json.loads(path.read_bytes())["about"])
        return dict(json.loads(self.mirror.read(f"{kind}/{key}/entry.json"))["about"])

    def keys(self, kind: str) -> list[str]:
        """Return the keys of whole entries of a kind; damaged ones are set aside, remote ones are not checked."""
        here = {path.name for path in (self.root / kind).glob("[!.]*")}
        return sorted(key for key in self.held(kind) if key not in here or self.get(kind, key) is not None)

    def held(self, kind: str) -> set[str]:
        """Return the keys of all entries of a kind, local or remote, whole or not; nothing is checked or changed."""
        keys = {path.name for path in (self.root / kind).glob("[!.]*")}
        if self.mirror is not None:
            with suppress(OSError):
                keys.update(self.mirror.holding(f"{kind}/*/entry.json"))
        return keys

    def cached(
        self, kind: str, key: str, make: Callable[[], Content], waiting: AbstractContextManager[object] | None = None
    ) -> Path:
        """Return an entry's folder; a missing entry is made first, by one process while the others wait.

        Args:
            make: returns what `put` writes; called only if the entry is missing.
            waiting: a context that is active while this process waits for the entry's lock.
        """
        lock = self.lock(kind, key)
        with waiting or nullcontext():
            lock.acquire()
        try:
            return self.get(kind, key) or self.put(kind, key, *make())
        finally:
            lock.release()

    @patiently
    def put(self, kind: str, key: str, files: Mapping[str, bytes], about: Mapping[str, object]) -> Path:
        """Write an entry atomically and return its folder; the caller holds its lock and found it missing.

        Args:
            files: name -> content.
            about: what shaped it, for people; JSON.
        """
        folder = self.make().root / kind / key
        if self.get(kind, key) is not None:
            return folder  # by another process, which got the lock while this storage, or its locks, were unavailable
        folder.parent.mkdir(exist_ok=True)
        with folder_atomic(folder) as temporary:
            for name, content in files.items():
                write_atomic(temporary / name, content)
            entry = {"about": dict(about), "sha256": {name: _digest(content) for name, content in files.items()}}
            write_atomic(temporary / "entry.json", json.dumps(entry, indent=1).encode())
        if self.mirror is not None:
            self.mirror.send_entry(f"{kind}/{key}")
        return folder

    def save_progress(self, key: str, state: Mapping[str, Any]) -> None:
        """Save the state of an unfinished fit, in place of an earlier one.

        It only serves recovery, so a failed write is a warning and not an error.
        """
        import torch

        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        payload = buffer.getvalue()
        try:
            self.make().wait()
            self._progress(key).parent.mkdir(exist_ok=True)
            write_atomic(self._progress(key), _digest(payload).encode() + payload)
            if self.mirror is not None:
                with suppress(Unreachable):  # the next epoch tries again
                    self.mirror.send(f"progress/{key}")
        except OSError as error:
            warnings.warn(f"a half-done fit could not be kept ({error}): if it dies, it starts anew", stacklevel=2)

    @patiently
    def load_progress(self, key: str, device: torch.device) -> dict[str, Any] | None:
        """Return the state of an unfinished fit, or None if there is none or it is damaged.

        Of a local state and one that another node uploaded, the one with more epochs is returned.
        """
        import torch

        kept = []
        with suppress(FileNotFoundError):
            kept.append(self._progress(key).read_bytes())
        if self.mirror is not None:
            with suppress(OSError):
                kept.append(self.mirror.read(f"progress/{key}"))
        whole = [content[64:] for content in kept if _digest(content[64:]).encode() == content[:64]]
        if kept and not whole:
            self.drop_progress(key)
        states = [torch.load(io.BytesIO(payload), map_location=device, weights_only=True) for payload in whole]
        return max(states, key=lambda state: len(state.get("curve", ())), default=None)

    def drop_progress(self, key: str) -> None:
        with suppress(OSError):
            self._progress(key).unlink()
        if self.mirror is not None:
            self.mirror.drop(f"progress/{key}")

    def _progress(self, key: str) -> Path:
        return self.root / "progress" / key


def _whole(folder: Path) -> bool:
    digests = json.loads((folder / "entry.json").read_bytes())["sha256"]
    return all(_digest((folder / name).read_bytes()) == digest for name, digest in digests.items())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
