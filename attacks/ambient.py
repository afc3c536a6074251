"""torch's ambient state: what a notebook or a user's file has set for all that is computed after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Compute as in a new process, with gradients, and restore the caller's state.

    The number of threads is left as it is: it changes the time, and rounding alone.
    """
    with torch.inference_mode(False), torch.enable_grad(), default_arithmetic():
        yield


@contextmanager
def default_arithmetic() -> Iterator[None]:
    """Compute float32 on the CPU where no tensor says otherwise, without autocast; restore the caller's state.

    Whether gradients are recorded is left as it is.
    """
    dtype, strict = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as stack:
        if (held := getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)) is not None:
            torch.set_default_device(None)  # another one above it would slow every operation, and so the latencies
            stack.callback(torch.set_default_device, held.device)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        if strict:  # to set it imports torch's compiler, which takes seconds
            stack.callback(torch.use_deterministic_algorithms, strict, warn_only=warns)
            torch.use_deterministic_algorithms(False)
        yield
