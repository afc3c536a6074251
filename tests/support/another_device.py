"""A torch device that is not the CPU, in pure Python: what works on it works on a GPU, as far as devices go.

A tensor of the device holds an ordinary CPU tensor. An operation of one with a CPU tensor that is no scalar raises, as
it does under CUDA, and so does a view of it as NumPy. Not covered: transforms of torch.func, random generators on the
device, what a backward pass computes again (checkpoints), for which its thread would have to run Python.
`_setup_privateuseone_for_python_backend` is experimental in the torch that requirements.lock pins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

NAME = "elsewhere"
COPY, MOVE = torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default


class Away(Tensor):
    """A tensor of the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Away:
        like: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        away: Away = cls._make_wrapper_subclass(cls, held.size(), device=torch.device(NAME, 0), **like)
        away.held = held
        return away

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("a tensor of the device has no view as NumPy: copy it to the CPU first")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    def held(value: Any) -> Any:
        if isinstance(value, Away):
            return value.held
        if isinstance(value, Tensor) and value.dim() > 0 and func not in (COPY, MOVE):
            raise RuntimeError(f"all tensors must be on one device, but {func} met one on {value.device}")
        return value

    wanted = kwargs.get("device")
    named = dict(kwargs) | ({} if wanted is None else {"device": torch.device("cpu")})
    out = func(*tree_map(held, args), **tree_map(held, named))
    if func is COPY:
        return args[0]
    if func is MOVE and wanted is not None and torch.device(wanted).type == "cpu":
        return out
    return tree_map(lambda one: Away(one) if isinstance(one, Tensor) else one, out)


class _Made(TorchDispatchMode):
    """Makes tensors on the device, and moves them to it."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        wanted = (kwargs or {}).get("device")
        away = wanted is not None and torch.device(wanted).type == NAME
        return _run(func, args, kwargs or {}) if away else func(*args, **(kwargs or {}))


@contextmanager
def another_device() -> Iterator[torch.device]:
    """Yield the device, which exists within."""
    register()
    with _Made():  # type: ignore[no-untyped-call]
        yield torch.device(NAME, 0)


@cache
def register() -> torch.library.Library:
    """Register the device with torch, once in a process; autograd must not have run before."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")

    def copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        into, out_of = (one.held if isinstance(one, Away) else one for one in (target, source))
        into.copy_(out_of)
        return target

    def strided(size: Any, stride: Any, dtype: Any = None, **rest: Any) -> Tensor:
        return Away(torch.empty_strided(size, stride, dtype=dtype))

    def empty(size: Any, dtype: Any = None, **rest: Any) -> Tensor:
        return Away(torch.empty(size, dtype=dtype))

    library.impl("_copy_from", copied, "PrivateUse1")
    library.impl("empty_strided", strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    return library
