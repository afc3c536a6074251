"""The searches of a storage: list their names and open one."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from search.exceptions import Unreachable
from search.storage.mirror import mirror_of
from search.storage.outage import HeldError
from search.storage.store import Store
from search.storage.uri import check_storage, local_folder, mask_credentials
from search.study.loading import read_study
from search.study.study import Study
from search.study.sync import bring
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
            lock = Store(local_folder(storage) / ".store").lock("searches", name)
            with suppress(HeldError), lock.acquire(timeout=0):
                bring(mirror, whole=whole)  # if a driver holds the lock, all is here
        except OSError as error:
            raise InputError(f"a storage must answer, but {error}") from None
    path = local_folder(storage) / name / "study.yaml"
    study = read_study(path, {"storage": storage}, stored=True, checked=whole)
    if study.name != name:  # else another search would be read or resumed
        raise InputError(f"a search must lie in a folder of its name, but {path} is of {study.name!r}")
    return study
