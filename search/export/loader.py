"""Loads an export, a folder of files without pickle, as a plain PyTorch module.

This needs only PyTorch, safetensors, NumPy and Optuna (SciPy too for a GMVAE).
Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from torch import Tensor, nn

import defenses
from attacks.ambient import default_arithmetic, torch_defaults
from defenses.base import Defended, Shape
from search.classifiers import architectures, own, user_code
from search.classifiers.architectures import ARCHITECTURES
from search.classifiers.user_code import UserCode
from search.data.guard import closed
from search.storage.fingerprint import loaded_digests
from search.storage.seal import ROLES, opened
from spaces.exceptions import InputError

ROUNDING = 1e-3
"""How far pixels may be outside [0, 1], because the arithmetic of attacks rounds."""


class Exported(Defended):
    """An exported winner. It accepts only images of its task, float in [0, 1], and raises an error for other input.

    It computes as it was judged, in inference mode too, whatever the default dtype and device, and without autocast.

    Attributes:
        changed: how its code differs from the code that it was judged with, one line; empty if it does not.
        code: the files of its user's own classifiers, by name; none for a built-in architecture.
    """

    changed = ""
    code: Mapping[str, bytes] = {}

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits_NK.

        Raises:
            InputError: the input is not images of the task.
        """
        return _as_judged(super().forward, self._checked(x_NCHW))

    def accept(self, x_NCHW: Tensor) -> Tensor:
        """Return accept_N, bool: False for a rejected image."""
        return _as_judged(super().accept, self._checked(x_NCHW))

    def unchecked(self) -> Defended:
        """Return the same model without input checks, for attacks, which ask thousands of times and stay in [0, 1]."""
        return Defended(self.defense, self.classifier).eval()

    def _checked(self, x_NCHW: Tensor) -> Tensor:
        shape, dtype = self.defense.shape, next(self.classifier.parameters()).dtype
        law = (
            f"images must be a tensor N x {shape.channels} x {shape.height} x {shape.width}, {dtype}, with pixels in "
            "[0, 1]"
        )
        if not isinstance(x_NCHW, Tensor):
            raise InputError(f"{law}, but are a {type(x_NCHW).__name__}")
        if x_NCHW.shape[1:] != (shape.channels, shape.height, shape.width) or x_NCHW.dtype != dtype:
            raise InputError(f"{law}, but are {' x '.join(map(str, x_NCHW.shape)) or 'a scalar'}, {x_NCHW.dtype}")
        low, high = (float(end) for end in x_NCHW.detach().aminmax()) if len(x_NCHW) else (0.0, 1.0)
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # also true for NaN
            raise InputError(f"{law}, but go from {low:.3g} to {high:.3g}")
        return x_NCHW


def _as_judged(function: Callable[[Tensor], Tensor], x_NCHW: Tensor) -> Tensor:
    """Call a function of the model in the state in which it was judged."""
    with default_arithmetic():
        if not torch.is_inference_mode_enabled():
            return function(x_NCHW)
        with torch.inference_mode(False), torch.no_grad():  # a defense may need gradients, which that mode forbids
            return function(x_NCHW.clone())


@torch_defaults()
def load(
    folder: str | Path, changed: bool = False, *, trust: bool = False, data_dir: str | Path | None = None
) -> Exported:
    """Load an export as a plain nn.Module in eval mode on the CPU: images in [0, 1] in, logits out.

    Args:
        changed: go on where the code differs from the code that the export was judged with; a line on standard error
            says so.
        trust: run the code of a user's own classifier that the export carries, `classifier.py`, even where nobody has
            added this classifier to the data folder.
        data_dir: the data folder; default: $CRUCIBLE_DATA or ~/.cache/crucible.

    Raises:
        InputError: a file is missing, or was changed since the export; or so was the code that it runs (`ran`); or it
            carries code that is not trusted.
    """
    files = opened(folder)
    known = json.loads(files["evidence.json"])
    model, differs = known["model"], _differs(known)
    if differs and not changed:
        raise InputError(
            f"an export must run the code that it was judged with, but {folder} {differs}: take that code"
            f"{_commit(known)}, export it anew, or go on with changed=True (--changed)"
        )
    if differs:
        print(f"{folder} {differs}: it is no longer what was judged", file=sys.stderr)
    shape, code = Shape(**model["shape"]), {name: files[name] for name in files if name.endswith(".py")}
    for name, text in code.items():
        if not trust and not own.holds_code(text.decode(), data_dir):
            raise InputError(
                f"the code of an export must be trusted before it is run, but nobody has added {folder}/{name} as a "
                "classifier on this machine: read it, then load(folder, trust=True), or add it (docs/own-model.md)"
            )
    classifier, adopted = (_network(role, model, code, shape) for role in ROLES)
    with closed("loaded"):
        defense = defenses.find(model["defense"])(model["train"], model["inference"], shape)
        defense.adopt(adopted)
        defense.load_state_dict(from_bytes(files["weights.safetensors"]))
    classifier.load_state_dict(from_bytes(files["classifier.safetensors"]))
    exported = Exported(defense, classifier).eval().requires_grad_(False)
    exported.changed, exported.code = differs, code
    return exported


def _network(role: str, model: Mapping[str, Any], code: Mapping[str, bytes], shape: Shape) -> nn.Module:
    """Return an untrained classifier of an export: a built-in architecture, or what the user's own code builds."""
    role = "classifier" if model[role] == model["classifier"] else role
    if (about := model.get("own", {}).get(role)) is None:
        return ARCHITECTURES[model[role]].build(shape)
    how = {name: tuple(about[name]) for name in ("mean", "std")}
    return UserCode(code=code[f"{role}.py"].decode(), function=about["function"], **how).build(shape)


def ran(model: Mapping[str, Any]) -> dict[str, str]:
    """Return the digest of each module of ours that an export runs, by the name of the module.

    They are the defense's own, the classifiers', and all that is loaded with them (`loaded_digests`). What loads them,
    this file, is not among them; a user's own code is a file of the export.

    Args:
        model: the part `model` of its evidence.
    """
    builders = (architectures.__name__, *((user_code.__name__,) if model.get("own") else ()))
    return loaded_digests(defenses.find(model["defense"]).__module__, *builders)


def _differs(known: Mapping[str, Any]) -> str:
    """Return how the code differs from the code of the evidence; empty if it does not. A moved file is the same."""
    then, now = known["code"].get("modules"), ran(known["model"])
    if then is None:
        return "does not say which code that is (its version of Crucible did not note it)"
    changed = [name for name, digest in then.items() if digest not in now.values()]
    further = [name for name, digest in now.items() if digest not in then.values() and name not in changed]
    return f"was judged with another {', '.join((*changed, *further))}" if changed or further else ""


def _commit(known: Mapping[str, Any]) -> str:
    commit, dirty = known["code"]["commit"], known["code"]["changed_since"]
    return f" (commit {commit[:12]}{', changed since' if dirty else ''})" if commit else ""
