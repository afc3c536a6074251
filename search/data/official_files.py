"""How the official files of a data set are found: in the data folder, or brought there from the first source."""

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
    """The official files of a data set, and where they come from.

    Args:
        dataset: its name.
        files: the digest of each file, uncompressed, as `archives.read` takes it.
        unchecked: further files and folders that must be there, of which no digest is known.
        sources: where to look, in order, after the data folder.
        archive: the official archive that holds the files, where there is one.
        folder: the folder of its files in the data folder, where it is not its name.
        closed: why it cannot be downloaded, where it has no sources.
    """

    dataset: str
    files: Mapping[str, str] = field(default_factory=dict)
    unchecked: Sequence[str] = ()
    sources: Sequence[Source] = ()
    archive: str = ""
    folder: str = ""
    closed: str = ""

    @property
    def wanted(self) -> str:
        """What a user may put into the data folder, in words."""
        packed = f" or {self.archive}" if self.archive else ", plain or .gz," if self.files else ""
        return ", ".join((*self.files, *self.unchecked)) + packed

    @property
    def remedy(self) -> str:
        """What to do about an altered file in the data folder."""
        if not self.sources:
            return "put the official file in its place"
        return f"delete it and fetch again: python launch.py data fetch {self.dataset}"

    def raw(self, root: Path) -> Path:
        """Return the folder of a data folder into which the files are brought."""
        return root / "raw" / (self.folder or self.dataset)

    def places(self, root: Path, home: Path) -> list[Path]:
        """Return where in the data folder `root`, and in the folder that is kept for it, the files may lie."""
        return list(dict.fromkeys((self.raw(root), root / (self.folder or self.dataset), self.raw(home))))

    def missing(self, folder: Path) -> list[str]:
        """Return what `folder` lacks.

        Raises:
            AlteredFile: what it has is not what it should be.
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
    """Return a folder that holds the official files: one of `places`, or `raw`, filled from the first source.

    Args:
        places: where they may lie already.
        work: a folder on the disk of `raw` for what is half done.

    Raises:
        NoSource: every source failed; the line says why.
        AlteredFile: a file that lies in one of `places` is not the official one.
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
    """Check every official file in `folder` and bring it into `raw`, each in one step."""
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
