"""A model in a user's own file: a function without arguments that returns it, and a file of its weights."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import nn

from attacks.ambient import torch_defaults
from search.classifiers.weights import load_weights
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
            law = "a model must be FILE.py:FUNCTION, a function that returns an nn.Module"
            export = "; an export is attacked by python launch.py attack" if Path(text).is_dir() else ""
            raise InputError(f"{law}, but is {text!r}{export}")
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
            with torch_defaults():
                model = function()
        except Exception as error:
            raise InputError(
                f"{law} must return a model when called without arguments, but raises {one_line(error)}"
            ) from None
        if not isinstance(model, nn.Module):
            raise InputError(f"{law} must return an nn.Module, but returns a {type(model).__name__}")
        if self.weights is not None:
            load_weights(model, self.weights)
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
            with torch_defaults():  # the file may set what would hold for us too
                spec.loader.exec_module(module)
        except Exception as error:
            raise InputError(
                f"{self.file.name} must be a file that can be imported, but raises {one_line(error)}"
            ) from None
        return module


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def one_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
