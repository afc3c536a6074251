"""Adds and removes a user's own classifiers: builds, loads and judges one before it is written.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from search.classifiers import own
from search.classifiers.architectures import ARCHITECTURES
from search.classifiers.judging import check, clean_accuracy
from search.classifiers.user_code import UserCode
from search.classifiers.weights import load_weights
from search.data import splits
from search.data.folders import full
from search.data.registry import find_data_set
from search.storage.store import to_bytes
from spaces.exceptions import InputError, meant


@dataclass(frozen=True)
class Added:
    """A classifier that was added, and how it was judged.

    Args:
        clean_accuracy: on the validation images, a fraction; None: it came without weights.
        images: their number.
    """

    task: str
    parameters: int
    clean_accuracy: float | None
    images: int
    classes: int


def add(
    name: str,
    source: str,
    dataset: str,
    *,
    weights: Path | None = None,
    mean: str | None = None,
    std: str | None = None,
    data_dir: str | None = None,
) -> Added:
    """Add a classifier to a data set; from then on DATASET/NAME is a task like any other.

    Args:
        source: "FILE.py:FUNCTION"; the function takes nothing and returns an nn.Module.
        weights: safetensors, or a state dict that torch.load(weights_only=True) reads; None: it is an architecture,
            which searches train.
        mean, std: of each channel, with commas; None: the network normalises its images itself, or not at all.

    Raises:
        InputError: it is no such classifier; nothing is written.
    """
    shape = find_data_set(dataset, data_dir).shape
    _new(name, dataset, data_dir)
    text, function = _source(source)
    code = UserCode(code=text, function=function, **_scale(mean, std, shape.channels))
    splits.fetch(dataset, data_dir)
    network = code.build(shape)
    if weights is not None:
        load_weights(network, weights)
    x_NCHW, y_N = splits.load(dataset, "validation", data_dir)
    check(network.eval(), x_NCHW, shape, dataset)
    accuracy = None if weights is None else clean_accuracy(network, x_NCHW, y_N)
    given = b"" if weights is None else _bytes(network)
    about = {
        "function": function,
        "mean": code.mean,
        "std": code.std,
        "code_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "weights_sha256": hashlib.sha256(given).hexdigest() if given else "",
        "clean_accuracy": accuracy,
        "source": source,
    }
    files = {own.ABOUT: json.dumps(about, indent=1).encode(), own.CODE: text.encode()}
    own.write(dataset, name, files | ({own.WEIGHTS: given} if given else {}), data_dir)
    parameters = sum(part.numel() for part in network.parameters())
    return Added(f"{dataset}/{name}", parameters, accuracy, len(y_N), shape.classes)


def remove(task: str, data_dir: str | None = None) -> None:
    """Remove a classifier, named DATASET/NAME, from the data folder; fits that were trained with it stay in stores.

    Raises:
        InputError: there is no such classifier.
    """
    there = {f"{dataset}/{name}": (dataset, name) for dataset, name in own.everywhere(data_dir)}
    if task not in there:
        law = "a classifier that is removed must be one that was added"
        raise InputError(f"{law} ({', '.join(there) or 'none is'}), but is {task!r}{meant(task, there)}")
    for folder in own.folders(*there[task], data_dir):
        shutil.rmtree(folder, ignore_errors=True)


def said(added: Mapping[str, Any]) -> str:
    """Return what was added, as text."""
    head = f"{added['task']}: {added['parameters']:,} parameters"
    if added["clean_accuracy"] is None:
        return f"{head}, no weights: the first search that needs it trains it"
    accuracy, chance = added["clean_accuracy"], 1 / added["classes"]
    line = (
        f"{head}, clean accuracy {100 * accuracy:.1f} % on {added['images']} validation images; it is never retrained\n"
        "its training must have seen none of the validation and test images, or every figure is flattered"
    )
    if accuracy > 1.5 * chance:
        return line
    doubt = "are its classes in the order of `data list`, and its images normalised (--mean, --std)?"
    return f"{line}\nwarning: that is about as good as guessing: {doubt}"


def rows(data_dir: str | None = None) -> list[dict[str, Any]]:
    """Return the classifiers that were added, as rows of a table."""
    found = []
    for dataset, name in own.everywhere(data_dir):
        about = own.read_about(dataset, name, data_dir)
        found.append(
            {
                "task": f"{dataset}/{name}",
                "weights": about["weights_sha256"][:12] or "trained by searches",
                "clean_accuracy": about["clean_accuracy"],
                "source": about["source"],
            }
        )
    return found


def _new(name: str, dataset: str, data_dir: str | None) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise InputError(f"a classifier's name must be letters, digits, '.', '_' and '-', but is {name!r}")
    if name.removeprefix("puvae-") in ARCHITECTURES:
        raise InputError(f"a classifier's name must be new, but {name!r} is built in")
    if name in own.names(dataset, data_dir):
        raise own.taken(dataset, name)


def _source(source: str) -> tuple[str, str]:
    """Return the text of the file, and the name of the function."""
    file, _, function = source.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise InputError(f"a classifier must be FILE.py:FUNCTION, but is {source!r}")
    try:
        text = full(file).read_text(encoding="utf-8")
        compile(text, file, "exec")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"a classifier's file must be one that can be read, but {file}: {reason}") from None
    except (SyntaxError, ValueError) as error:
        raise InputError(f"a classifier's file must be Python, but {file}: {error}") from None
    return text, function


def _scale(mean: str | None, std: str | None, channels: int) -> dict[str, tuple[float, ...]]:
    """Return mean and std for each channel, or nothing."""
    if mean is None and std is None:
        return {}
    law = f"mean and std must be given together, one number or {channels} with commas, std above 0"
    found = {}
    for what, text in (("mean", mean), ("std", std)):
        try:
            values = tuple(float(part) for part in (text or "").split(","))
        except ValueError:
            values = ()
        if len(values) not in (1, channels) or (what == "std" and min(values) <= 0):
            raise InputError(f"{law}, but {what} is {text!r}")
        found[what] = values * channels if len(values) == 1 else values
    return found


def _bytes(network: nn.Module) -> bytes:
    try:
        return to_bytes(network)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"no two weights of a classifier may share memory, but: {reason}") from None
