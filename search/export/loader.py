"""Loads an export, a folder of files without pickle, as a plain PyTorch module.

This needs only PyTorch, safetensors, NumPy and Optuna (SciPy too for a GMVAE).
Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load as from_bytes
from torch import Tensor

import defenses
from defenses.base import Defended, Shape
from search.classifiers.architectures import ARCHITECTURES
from spaces.exceptions import InputError

FILES = ("card.md", "classifier.safetensors", "config.yaml", "evidence.json", "pictures.png", "weights.safetensors")
SEAL = "SHA256SUMS"
"""The file with the SHA-256 of the other files, in the format of `sha256sum --check`."""
ROUNDING = 1e-3
"""How far pixels may be outside [0, 1], because the arithmetic of attacks rounds."""


class Exported(Defended):
    """An exported winner. It accepts only images of its task, float in [0, 1], and raises an error for other input."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits_NK.

        Raises:
            InputError: the input is not images of the task.
        """
        return super().forward(self._checked(x_NCHW))

    def accept(self, x_NCHW: Tensor) -> Tensor:
        """Return accept_N, bool: False for a rejected image."""
        return super().accept(self._checked(x_NCHW))

    def unchecked(self) -> Defended:
        """Return the same model without input checks: attacks such as NES query images outside [0, 1]."""
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


def load(folder: str | Path) -> Exported:
    """Load an export as a plain nn.Module in eval mode on the CPU: images in [0, 1] in, logits out.

    Raises:
        InputError: a file is missing, or was changed since the export.
    """
    files = opened(folder)
    model = json.loads(files["evidence.json"])["model"]
    shape = Shape(**model["shape"])
    defense = defenses.find(model["defense"])(model["train"], model["inference"], shape)
    defense.adopt(ARCHITECTURES[model["trained_with"]].build(shape))
    defense.load_state_dict(from_bytes(files["weights.safetensors"]))
    classifier = ARCHITECTURES[model["classifier"]].build(shape)
    classifier.load_state_dict(from_bytes(files["classifier.safetensors"]))
    return Exported(defense, classifier).eval().requires_grad_(False)


def opened(folder: str | Path) -> dict[str, bytes]:
    """Return the files of an export, verified by their checksums; later additions, such as attacks/, are ignored.

    Raises:
        InputError: a file is missing, or differs from its checksum.
    """
    folder = Path(folder)
    try:
        files = {name: (folder / name).read_bytes() for name in FILES}
        sealed = (folder / SEAL).read_bytes()
    except OSError as error:
        missing = Path(error.filename).name
        raise InputError(
            f"an export must be a folder with whole files, but {folder}: {missing}: {error.strerror}; export it anew"
        ) from None
    if sealed != seal(files):
        altered = [name for name, line in _sums(files).items() if line not in sealed.splitlines(keepends=True)]
        raise InputError(
            f"an export must be as it was written, but {folder} has another {', '.join(altered) or SEAL} than its "
            f"{SEAL} says: export it anew"
        )
    return files


def seal(files: Mapping[str, bytes]) -> bytes:
    """Return the content of SHA256SUMS for the files of an export."""
    return b"".join(_sums(files).values())


def _sums(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n".encode() for name in FILES}
