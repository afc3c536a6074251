"""Reads trained weights of a user from safetensors or a state dict; no code of the file is run."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from search.classifiers.user_code import Normalised
from search.data.folders import full
from spaces.exceptions import InputError

NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which checkpoints keep the state dict."""
PREFIXES = ("module.", "network.")
"""What DataParallel, and our own normalisation, put before the name of every weight."""


def load_weights(network: nn.Module, path: Path) -> None:
    """Load trained weights into a network.

    Raises:
        InputError: the file is no state dict, or not that of this network.
    """
    target = network.network if isinstance(network, Normalised) else network
    state = _unwrapped(_read(path))
    expected = target.state_dict()
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in expected):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    faults = [f"it lacks {name}" for name in expected if name not in state]
    faults += [f"it has {name}, which the network has not" for name in state if name not in expected]
    faults += [
        f"{name} is {list(state[name].shape)}, and {list(tensor.shape)} in the network"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise InputError(f"weights must be those of the network, but in {path} {faults[0]}{more}")
    target.load_state_dict(state)


def _read(path: Path) -> Any:
    path = full(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"weights must be a file, but {path} does not exist") from None
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        law = "weights must be safetensors, or a state dict that torch.load(weights_only=True) reads"
        raise InputError(f"{law}, since a pickle may run code, but {path}: {reason}") from None


def _unwrapped(content: Any) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint."""
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        keys = f" with {', '.join(map(str, list(content)[:4]))}" if isinstance(content, Mapping) else ""
        raise InputError(f"weights must be a state dict, name to tensor, but are a {type(content).__name__}{keys}")
    return dict(content)
