"""Find the official files of a data set: in the data folder, or copied there from the first source that has them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from search.data.archives import read, unpack
from search.data.downloads import Folder, Progress, Source, Unavailable
from search.exceptions import AlteredFile, NoSource


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The official files of a data set, and their sources.

    Args:
        dataset: its name.
        files: the digest of each uncompressed file, in the form that `archives.read` takes.
        unchecked: further required files and folders, whose digests are not known.
        sources: where to look after the data folder, in order.
        archive: the official archive that holds the files, if there is one.
        folder: the name of its folder in the data folder, if it is not `dataset`.
        closed: why it cannot be downloaded, if it has no sources.
        added: the files from which a user added it; all that is kept of them is the decoded cache.
    """

    dataset: str
    files: Mapping[str, str] = field(default_factory=dict)
    unchecked: Sequence[str] = ()
    sources: Sequence[Source] = ()
    archive: str = ""
    folder: str = ""
    closed: str = ""
    added: Sequence[Path] = ()

    @property
    def wanted(self) -> str:
        """The files that a user may put into the data folder, as text."""
        packed = f" or {self.archive}" if self.archive else ", plain or .gz," if self.files else ""
        return ", ".join((*self.files, *self.unchecked)) + packed

    @property
    def remedy(self) -> str:
        """How to repair an altered file in the data folder, as text."""
        if self.added:
            again = f"data add {self.dataset} {' '.join(map(str, self.added))}"
            return f"add it again: python launch.py data remove {self.dataset}, then {again}"
        if not self.sources:
            return "put the official file in its place"
        return f"delete it and fetch again: python launch.py data fetch {self.dataset}"

    def raw(self, root: Path) -> Path:
        """Return the subfolder of a data folder in which the official files are kept."""
        return root / "raw" / (self.folder or self.dataset)

    def places(self, root: Path, home: Path) -> list[Path]:
        """Return the folders that may hold the files, in the data folder `root` and in `home`, which is kept for it."""
        return list(dict.fromkeys((self.raw(root), root / (self.folder or self.dataset), self.raw(home))))

    def missing(self, folder: Path) -> list[str]:
        """Return the names of the files that `folder` lacks.

        Raises:
            AlteredFile: a file in it does not match its digest.
        """
        lacking = [name for name in self.unchecked if not (folder / name).exists()]
        for name, expected in self.files.items():
            try:
                read(folder, name, expected)
            except FileNotFoundError:
                lacking.append(name)
            except AlteredFile as reason:
                raise AlteredFile(f"{reason}; {self.remedy}") from reason
        return lacking


def gather(origin: Origin, places: Sequence[Path], raw: Path, work: Path, progress: Progress) -> Path:
    """Return a folder with the official files: one of `places`, or `raw`, filled from the first source that has them.

    Args:
        places: folders that may already hold them.
        work: a folder for unfinished files, on the same disk as `raw`.

    Raises:
        NoSource: every source failed; the message says why.
        AlteredFile: a file in one of `places` is not the official one.
    """
    for place in places:
        if not origin.missing(place):
            return place
    own = [Folder("data folder", place) for place in places]
    failures: list[str] = []
    for source in (*own, *origin.sources):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            _keep(origin, source.open(work, progress), raw, work)
            return raw
        except (Unavailable, AlteredFile) as reason:
            if isinstance(reason, AlteredFile) and source in own:
                raise AlteredFile(f"{reason}; {origin.remedy}") from reason
            failures.append(f"{source}: {reason}")
    law = f"no source of {origin.dataset} can be reached"
    if origin.closed:
        law = f"{origin.dataset} cannot be downloaded, {origin.closed}, and must be in the data folder"
    raise NoSource(
        f"{law} ({'; '.join(failures)}); put {origin.wanted} into {places[0]}, "
        "or set $CRUCIBLE_DATA to a folder that has the data"
    )


def _keep(origin: Origin, folder: Path, raw: Path, work: Path) -> None:
    """Verify every official file in `folder` and write it atomically into `raw`."""
    names = (*origin.files, *origin.unchecked)
    missing = [name for name in names if not (folder / name).exists() and not (folder / f"{name}.gz").exists()]
    if missing and origin.archive and (folder / origin.archive).exists():
        folder = unpack(folder / origin.archive, work / "unpacked")
        missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise Unavailable("no files" if len(missing) == len(names) else f"no {', '.join(missing)}")
    raw.mkdir(parents=True, exist_ok=True)
    for name, expected in origin.files.items():
        (work / "half").write_bytes(read(folder, name, expected))
        os.replace(work / "half", raw / name)
