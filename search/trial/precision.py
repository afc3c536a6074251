"""The precision of trainings: where the hardware computes in bfloat16 natively, networks are trained in it.

Only the networks themselves, which are most of the work: weights, losses, optimisers, and everything between epochs are
float32; so are attacks, gradients, gates and verdicts, always.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from defenses.base import Defense

T = TypeVar("T")
Precision = Literal["float32", "bfloat16"]
DENSE_ROWS = 64
"""With fewer rows than these a CPU rounds a dense layer's weights in more time than bfloat16 saves.

Forward and backward, 16 and 32 rows: 1.3 to 1.7 times as slow as float32; 64: 0.85 to 1.2; 128: 0.75 to 1.02.
"""


def settled(precision: Literal["auto"] | Precision, device: torch.device) -> Precision:
    """Return the precision that `auto` means on a device."""
    return ("bfloat16" if native(device) else "float32") if precision == "auto" else precision


def native(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16 natively: AVX512-BF16, AMX or ARM's; Ampere and later GPUs."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(has is True for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def tensor_float32(use: bool) -> None:
    """Set whether GPUs may round float32 to TF32, which by default they do in convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = use


class Networks:
    """Networks that compute under autocast while they are trained, and return float32.

    Args:
        modules: defenses, whose networks are meant, and networks.
    """

    def __init__(self, precision: Precision, device: torch.device, *modules: nn.Module) -> None:
        self.device, self._lower = device, False
        self._all = [network for module in modules for network in _outermost(module)] * (precision == "bfloat16")

    @contextmanager
    def training(self) -> Iterator[None]:
        """Compute in bfloat16 within."""
        every = (part for network in self._all for part in network.modules())
        dense = [part for part in every if type(part).forward is nn.Linear.forward]
        for layer in dense * (self.device.type == "cpu"):
            layer.forward = self._exact_if_few(layer.forward)
        for network in self._all:
            network.forward = self._lowered(network.forward)
        try:
            with self._set(True):
                yield
        finally:
            for network in (*self._all, *dense):
                network.__dict__.pop("forward", None)

    def epochs(self, fit: Iterator[T]) -> Iterator[T]:
        """Yield what a fit yields; it computes in bfloat16, what happens between does not."""
        while True:
            with self.training():
                found = next(fit, None)
            if found is None:
                return
            yield found

    @contextmanager
    def _set(self, lower: bool) -> Iterator[None]:
        before, self._lower = self._lower, lower and bool(self._all)
        tensor_float32(self._lower)
        try:
            yield
        finally:
            self._lower = before
            tensor_float32(before)

    def exactly(self) -> AbstractContextManager[None]:
        """Return a context in which they compute in float32, within a training."""
        return self._set(False)

    def _lowered(self, forward: Any) -> Any:
        @wraps(forward)
        def lowered(*args: Any, **named: Any) -> Any:
            if not self._lower:
                return forward(*args, **named)
            with torch.autocast(self.device.type, torch.bfloat16):
                return _float32(forward(*args, **named))

        return lowered

    def _exact_if_few(self, forward: Any) -> Any:
        @wraps(forward)
        def dense(x: Tensor) -> Tensor:
            if not self._lower or x.shape[:-1].numel() >= DENSE_ROWS:
                return forward(x)
            with torch.autocast(self.device.type, enabled=False):
                return forward(x.float())

        return dense


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the networks of a module: those with a forward pass, and not those within them."""
    if isinstance(module, Defense) or type(module).forward is nn.Module.forward:  # a list of networks has none
        for part in module.children():
            yield from _outermost(part)
    else:
        yield module


def _float32(output: Any) -> Any:
    if isinstance(output, tuple | list):
        return type(output)(map(_float32, output))
    return output.float() if isinstance(output, Tensor) and output.is_floating_point() else output
