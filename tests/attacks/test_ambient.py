"""What a caller has set of torch's ambient state holds for the caller alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch._C import _len_torch_function_stack

from attacks.ambient import default_arithmetic, torch_defaults

State = tuple[object, ...]


@contextmanager
def hostile(*, inference: bool = False) -> Iterator[None]:
    """Set everything as no search expects it."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode() if inference else torch.no_grad())
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        stack.callback(torch.set_default_device, None)
        torch.set_default_device("meta")
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.callback(torch.use_deterministic_algorithms, False)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield


def state() -> State:
    grad = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    strict = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    return (*grad, *strict, torch.get_default_dtype(), torch.empty(1).device.type)


def test_the_state_is_that_of_a_new_process_and_then_the_callers_again() -> None:
    usual = state()
    for inference in (False, True):
        with hostile(inference=inference):
            before = state()
            with torch_defaults():
                assert state() == usual
                torch.set_default_dtype(torch.float16)  # as a user's file may
                torch.use_deterministic_algorithms(True)
            assert state() == before != usual
    assert state() == usual


def test_a_default_device_costs_a_search_nothing() -> None:
    with hostile(), torch_defaults():
        assert _len_torch_function_stack() == 0
    with torch.device("meta"):
        with torch_defaults():
            assert state() == (True, False, False, False, False, torch.float32, "cpu")
        assert torch.empty(1).is_meta


def test_without_gradients_the_arithmetic_is_still_the_default() -> None:
    with hostile(), default_arithmetic():
        assert not torch.is_grad_enabled() and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
