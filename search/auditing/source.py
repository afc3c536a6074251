"""A model in a user's own file: a function without arguments that returns it, and a file of its weights."""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from spaces.exceptions import InputError, choose


@dataclass(frozen=True)
class Source:
    """Where a model comes from; it can be built as often as wanted.

    Args:
        weights: safetensors, or a state dict that torch.load reads with weights_only; None: those that `function` sets.
    """

    file: Path
    function: str
    weights: Path | None = None

    @classmethod
    def of(cls, text: str, weights: Path | None = None) -> Source:
        """Return the source that FILE.py:FUNCTION names.

        Raises:
            InputError: it is not of this form, or a file does not exist.
        """
        file, _, function = text.rpartition(":")
        if not (file.endswith(".py") and function.isidentifier()):
            raise InputError(f"a model must be FILE.py:FUNCTION, a function that returns an nn.Module, but is {text!r}")
        for path in (Path(file), weights):
            if path is not None and not path.is_file():
                raise InputError(f"a model's code and weights must be files, but there is no {path}")
        return cls(Path(file).resolve(), function, weights and weights.resolve())

    @property
    def name(self) -> str:
        return f"{self.file.stem}-{self.function}"

    def build(self) -> nn.Module:
        """Return the model on the CPU, in eval mode.

        Raises:
            InputError: the code or the function raises, does not return an nn.Module, or the weights do not fit it.
        """
        module, law = self._module(), f"{self.file.name}:{self.function}"
        own = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        function = getattr(module, choose(f"the function in {self.file.name}", self.function, own))
        try:
            model = function()
        except Exception as error:
            raise InputError(
                f"{law} must return a model when called without arguments, but raises {one_line(error)}"
            ) from None
        if not isinstance(model, nn.Module):
            raise InputError(f"{law} must return an nn.Module, but returns a {type(model).__name__}")
        if self.weights is not None:
            _put(model, _state(self.weights), self.weights)
        return model.eval()

    def digests(self) -> dict[str, str | None]:
        """Return what the evidence says of it: file, function, weights and the SHA-256 of both files."""
        return {
            "file": self.file.name,
            "file_sha256": sha256(self.file),
            "function": self.function,
            "weights": self.weights.name if self.weights else None,
            "weights_sha256": sha256(self.weights) if self.weights else None,
        }

    def _module(self) -> ModuleType:
        """Return the file as a module; what lies beside it can be imported, after everything that is installed."""
        name = f"audited_{self.file.stem}"
        spec = importlib.util.spec_from_file_location(name, self.file)
        assert spec is not None and spec.loader is not None, "a .py file has a loader"
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        if str(self.file.parent) not in sys.path:
            sys.path.append(str(self.file.parent))
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise InputError(
                f"{self.file.name} must be a file that can be imported, but raises {one_line(error)}"
            ) from None
        return module


def _state(path: Path) -> Mapping[str, Any]:
    """Return the state dict of a file, which may lie in its field `state_dict`; no code of the file is run."""
    law = f"weights must be safetensors, or a state dict of tensors alone, but {path}"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{law} holds other objects, whose pickle could run code") from None
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"{law} cannot be read: {one_line(error)}") from None
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{law} is none")
    return found


def _put(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Load a state dict.

    Raises:
        InputError: it has other names or shapes than the model.
    """
    own = model.state_dict()
    wrong = {
        "lacks": [name for name in own if name not in state],
        "has unknown": [name for name in state if name not in own],
        "has of another shape": [name for name in own if name in state and state[name].shape != own[name].shape],
    }
    if any(wrong.values()):
        told = [f"{what} {', '.join(names[:3])}{' ...' if names[3:] else ''}" for what, names in wrong.items() if names]
        raise InputError(f"weights must fit the model, but {path.name} {'; '.join(told)}")
    model.load_state_dict(state)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def one_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
