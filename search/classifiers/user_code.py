"""Builds a classifier from a user's own code: a function without arguments that returns an nn.Module.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from defenses.base import Shape
from spaces.exceptions import InputError


@dataclass(frozen=True, kw_only=True)
class UserCode:
    """A user's classifier without its weights.

    Args:
        code: the text of a Python file that stands alone, but for installed packages.
        function: the name of the function in it.
        mean, std: of each channel, by which images are normalised before the network sees them; empty: it does so
            itself, or needs no such thing.
    """

    code: str
    function: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def build(self, shape: Shape) -> nn.Module:
        """Return the network, which maps x_NCHW in [0, 1] to logits_NK; its initial weights are always the same.

        Raises:
            InputError: the code fails, or returns something else.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self._called()
        if not isinstance(network, nn.Module):
            raise InputError(f"{self.function} must return an nn.Module, but returns a {type(network).__name__}")
        return Normalised(network, self.mean, self.std) if self.mean else network

    def fits(self, shape: Shape) -> bool:
        """Return whether images of this shape can be classified, as was seen when it was added."""
        return True

    def _called(self) -> object:
        try:
            return getattr(_module(self.code), self.function)()
        except ModuleNotFoundError as error:
            law = "a classifier's file may import installed packages alone"
            raise InputError(f"{law}, but {error.name} is not installed here") from None
        except AttributeError as error:
            if hasattr(_module(self.code), self.function):
                raise InputError(f"{self.function}() must build a network, but fails: {_line(error)}") from None
            raise InputError(f"the file must have a function {self.function}, but has none") from None
        except Exception as error:  # whatever a user's code raises
            raise InputError(f"{self.function}() must build a network, but fails: {_line(error)}") from None


class Normalised(nn.Module):
    """A network before which each channel is normalised."""

    mean_1C11: Tensor
    std_1C11: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean_1C11", mean), ("std_1C11", std)):
            self.register_buffer(name, torch.tensor(values)[None, :, None, None], persistent=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits_NK: Tensor = self.network((x_NCHW - self.mean_1C11) / self.std_1C11)
        return logits_NK


@cache
def _module(code: str) -> ModuleType:
    """Run a user's file once. Ray sends what it defines by value, as the module cannot be imported by its name."""
    name = f"classifier_{hashlib.sha256(code.encode()).hexdigest()[:12]}"
    module = ModuleType(name)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(code, f"{name}.py", "exec"), module.__dict__)
    finally:
        del sys.modules[name]
    return module


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
