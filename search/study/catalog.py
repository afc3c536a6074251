"""The searches of a storage: list their names and open one."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from search.exceptions import Unreachable
from search.storage.atomic import write_atomic
from search.storage.mirror import Mirror, mirror_of
from search.storage.outage import HeldError
from search.storage.store import Store
from search.storage.uri import check_storage, local_folder, mask_credentials
from search.study.loading import read_study
from search.study.study import Study
from search.study.sync import DRIVER, JOURNAL
from spaces.exceptions import InputError, choose


def search_names(storage: str) -> list[str]:
    """Return the names of the searches in a storage.

    Raises:
        InputError: the storage is invalid, or a URI that does not respond.
    """
    try:
        storage = check_storage(storage)
        elsewhere = mirror_of(storage)
        if elsewhere is not None:
            return elsewhere.holding("*/study.yaml")
        return sorted(path.parent.name for path in Path(storage).glob("*/study.yaml"))
    except Unreachable as error:
        raise InputError(f"a storage must answer, but {error}") from None
    except ValueError as error:
        raise InputError(f"storage {error}, but is {mask_credentials(storage)!r}") from None
    except OSError:
        return []


def absent(storage: str) -> str:
    """Return the message that a storage has no search, and where it was looked for."""
    return f"a search must exist, but there is none in {check_storage(storage)}: name its --storage, or begin one"


def open_search(name: str, storage: str, *, whole: bool = True) -> Study:
    """Return a search of a storage, downloaded to this machine first if the storage is a URI.

    Args:
        whole: include pictures and W&B logs, and check the study; else just what `status` reads.

    Raises:
        InputError: there is no such search, or the storage does not respond.
    """
    known = search_names(storage)
    if not known:
        raise InputError(absent(storage))
    choose("the search", name, known)
    storage = check_storage(storage)
    mirror = mirror_of(storage, name)
    if mirror is not None:
        try:
            store = Store(local_folder(storage) / ".store")
            with store.lock("downloads", name), suppress(HeldError), store.lock("searches", name).acquire(timeout=0):
                bring(mirror, whole=whole)  # if a driver holds the lock, all is here
        except OSError as error:
            raise InputError(f"a storage must answer, but {error}") from None
    path = local_folder(storage) / name / "study.yaml"
    study = read_study(path, {"storage": storage}, stored=True, checked=whole)
    if study.name != name:  # else another search would be read or resumed
        raise InputError(f"a search must lie in a folder of its name, but {path} is of {study.name!r}")
    return study


def bring(mirror: Mirror, *, whole: bool) -> None:
    """Download the files of a search that this machine lacks.

    The journal only grows, so the longer one is newer; so do files in subfolders, but not those beside the journal, nor
    audits, which say when they were made. If another machine resumed from an earlier upload, all its files are taken:
    it repeated the work that it did not have.

    Raises:
        OSError: the storage does not respond.
    """
    there, journal = mirror.sizes(), _length(mirror.folder / JOURNAL)
    if journal > there.get(JOURNAL, 0):
        if _continues(mirror):
            return  # the local journal is ahead: its end is not uploaded yet
        os.replace(mirror.folder / JOURNAL, mirror.folder / f".{JOURNAL}.left")
        journal = -1
    ahead = there.get(JOURNAL, 0) > journal
    # The journal comes last, so that an interrupted download is repeated.
    for name in sorted(there.keys() - {DRIVER}, key=lambda name: name == JOURNAL):
        here = _length(mirror.folder / name)
        if name.startswith("audits/"):
            if here != there[name]:
                _bring_audit(mirror, name)
        elif here < there[name] if "/" in name else ahead or here < 0:
            if whole or "/" not in name:
                mirror.fetch(name)


def _bring_audit(mirror: Mirror, name: str) -> None:
    """Download an audit, unless this machine made a later one of the same candidate, which is not uploaded yet."""
    path, sent = mirror.folder / name, mirror.read(name)
    if not path.exists() or json.loads(path.read_bytes())["written"] <= json.loads(sent)["written"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, sent)


def _continues(mirror: Mirror) -> bool:
    """Return whether the local journal begins with the remote one, ignoring an incomplete line at its end."""
    try:
        sent = mirror.read(JOURNAL)
    except FileNotFoundError:
        return True
    return (mirror.folder / JOURNAL).read_bytes().startswith(sent[: sent.rfind(b"\n") + 1])


def _length(path: Path) -> int:
    return os.stat(path).st_size if path.exists() else -1
