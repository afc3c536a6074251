"""Weights of a defense that a user has: kept in the store, and named in the study by their digest."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from torch import nn

from defenses.base import Defense
from search.classifiers.weights import load_weights
from search.data.guard import closed
from search.storage.store import to_bytes
from search.study.study import Study
from spaces.exceptions import InputError


def fitting(study: Study) -> Defense | None:
    """Return the study's defense with the weights of the file that it names; None if it names no file.

    Raises:
        InputError: the file is none, or holds other tensors than the defense, or numbers that are not finite.
    """
    if study.weights is None or _is_digest(study.weights):
        return None
    resolved = study.resolved
    params = resolved.space.setting(resolved.space.usual_of)
    with closed("built"):
        defense = resolved.defense(params.train, params.inference, resolved.task.shape)
        if resolved.defense.adopt is not Defense.adopt:
            defense.adopt(resolved.task.build(resolved.task.classifier))
    load_weights(defense, Path(study.weights))
    _finite(defense, study.weights)
    return defense


def kept(study: Study) -> Study:
    """Return the study with its file of weights in the store, under whose digest it names it from then on.

    Raises:
        InputError: as `fitting`; or the study names a digest that the store does not have.
    """
    defense = fitting(study)
    if defense is None:
        if study.weights is not None and study.store.get("weights", study.weights) is None:
            raise InputError(f"weights must be a file, or a digest in {study.store.root}, but is {study.weights}")
        return study
    content = to_bytes(defense)
    digest = hashlib.sha256(content).hexdigest()
    with study.store.make().lock("weights", digest):
        if study.store.get("weights", digest) is None:
            study.store.put("weights", digest, {"weights.safetensors": content}, {"defense": study.defense})
    return study.model_copy(update={"weights": digest})


def _is_digest(weights: str) -> bool:
    return bool(re.fullmatch(r"[0-9a-f]{64}", weights))


def _finite(defense: nn.Module, file: str) -> None:
    for name, tensor in defense.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"weights must be finite, but {name} of {file} is not")
