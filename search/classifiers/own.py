"""The classifiers that users added to data sets: `classifiers/DATASET/NAME/` in the data folder.

Each is a folder with `classifier.json`, `classifier.py` (a copy of the user's file) and, if it came with trained
weights, `weights.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from search.classifiers import user_code
from search.classifiers.user_code import UserCode
from search.data.folders import lock, roots
from search.storage.atomic import folder_atomic
from search.storage.fingerprint import code_digests, fingerprint
from spaces.exceptions import InputError

ABOUT, CODE, WEIGHTS = "classifier.json", "classifier.py", "weights.safetensors"
Files = Mapping[str, bytes]
"""The files of one classifier, by name."""


@dataclass(frozen=True, kw_only=True)
class OwnClassifier(UserCode):
    """A user's classifier.

    Args:
        weights: the file of its trained weights, those of the built network; None: the search trains it.
        sha256: of the weights; empty without.
    """

    weights: Path | None = None
    sha256: str = ""

    @property
    def digest(self) -> str:
        """The fingerprint of code and weights."""
        shaping = asdict(self) | {"weights": self.sha256, "sha256": None}
        return fingerprint(source=code_digests(user_code.__name__), **shaping)


def names(dataset: str, data_dir: str | Path | None) -> list[str]:
    """Return the names of the classifiers that were added to a data set."""
    return sorted({path.parent.name for folder in _homes(dataset, data_dir) for path in folder.glob(f"[!.]*/{ABOUT}")})


def everywhere(data_dir: str | Path | None) -> list[tuple[str, str]]:
    """Return each added classifier, as data set and name."""
    datasets = {path.parents[1].name for home in _homes("*", data_dir) for path in home.parent.glob(f"*/[!.]*/{ABOUT}")}
    return [(dataset, name) for dataset in sorted(datasets) for name in names(dataset, data_dir)]


def folders(dataset: str, name: str, data_dir: str | Path | None) -> list[Path]:
    """Return the folders that hold a classifier of this name; the first counts."""
    if Path(name).name != name:
        return []
    return [folder / name for folder in _homes(dataset, data_dir) if (folder / name / ABOUT).is_file()]


def find_own(dataset: str, name: str, data_dir: str | Path | None) -> OwnClassifier | None:
    """Return a classifier that was added to a data set; None if there is none of that name.

    Raises:
        InputError: its files are damaged.
    """
    held = folders(dataset, name, data_dir)
    return _read(held[0]) if held else None


def read_about(dataset: str, name: str, data_dir: str | Path | None) -> dict[str, Any]:
    """Return what is remembered of a classifier."""
    about: dict[str, Any] = json.loads((folders(dataset, name, data_dir)[0] / ABOUT).read_bytes())
    return about


def holds_code(code: str, data_dir: str | Path | None) -> bool:
    """Return whether a user added this very code on this machine, and so trusts it."""
    held = (folders(dataset, name, data_dir)[0] / CODE for dataset, name in everywhere(data_dir))
    return any(path.read_bytes() == code.encode() for path in held)


def taken(dataset: str, name: str) -> InputError:
    """Return the error about a name that is taken."""
    return InputError(
        f"a classifier's name must be new, but {dataset}/{name} was added before: choose another, or "
        f"python launch.py classifier remove {dataset}/{name}"
    )


def home(dataset: str, data_dir: str | Path | None) -> Path:
    """Return the folder in which classifiers of a data set are written."""
    return roots(data_dir)[1] / "classifiers" / dataset


def write(dataset: str, name: str, files: Files, data_dir: str | Path | None) -> Path:
    """Write the files of a classifier, all or none, and return its folder.

    Raises:
        InputError: the name is taken.
    """
    folder = home(dataset, data_dir) / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.parent / f".{name}.lock"):
        if folder.exists():
            raise taken(dataset, name)
        with folder_atomic(folder) as temporary:
            for each, content in files.items():
                (temporary / each).write_bytes(content)
    return folder


def pack(dataset: str, data_dir: str | Path | None) -> dict[str, Files]:
    """Return the files of all classifiers of a data set by name, for a machine that lacks them."""
    return {
        name: {path.name: path.read_bytes() for path in folder.iterdir()}
        for name in names(dataset, data_dir)
        for folder in folders(dataset, name, data_dir)[:1]
    }


def adopt(dataset: str, data_dir: str | Path | None, packed: Mapping[str, Files]) -> None:
    """Write packed classifiers that are missing; only one of several processes does it.

    Raises:
        InputError: another classifier has the name of one of them.
    """
    for name, files in packed.items():
        if find_own(dataset, name, data_dir) is None:
            folder = home(dataset, data_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with lock(folder / f".{name}.adopted.lock"):
                if find_own(dataset, name, data_dir) is None:
                    write(dataset, name, files, data_dir)
        there = folders(dataset, name, data_dir)[0]
        if (there / ABOUT).read_bytes() != files[ABOUT]:
            law = f"a classifier must be that of the search, {dataset}/{name}"
            raise InputError(f"{law}, but {there} is another: take it away, or name another --data-dir")


def _homes(dataset: str, data_dir: str | Path | None) -> list[Path]:
    return [folder / "classifiers" / dataset for folder in dict.fromkeys(roots(data_dir))]


def _read(folder: Path) -> OwnClassifier:
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_bytes())
        code = (folder / CODE).read_bytes()
        whole = hashlib.sha256(code).hexdigest() == about["code_sha256"]
        weights = folder / WEIGHTS if about["weights_sha256"] else None
        found = OwnClassifier(
            code=code.decode(),
            function=about["function"],
            mean=tuple(about["mean"]),
            std=tuple(about["std"]),
            weights=weights,
            sha256=about["weights_sha256"],
        )
    except (OSError, ValueError, LookupError) as error:
        raise InputError(f"{folder} must be as it was written, but {error}; add the classifier again") from None
    if not whole or (weights and not weights.is_file()):
        raise InputError(f"{folder} must be as it was written, but was altered; add the classifier again")
    return found
