"""The classifiers that are protected: one trained and frozen network for each data set, architecture and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import Batches
from search.classifiers import architectures
from search.classifiers.architectures import ARCHITECTURES
from search.classifiers.task import Task
from search.data.splits import checksum
from search.storage.fingerprint import code_digests, fingerprint
from search.storage.store import Store, to_bytes
from search.study.study import Study
from search.trial.device_lock import DeviceLock


@dataclass(frozen=True)
class Classifier:
    """A frozen network of the store."""

    fingerprint: str
    network: nn.Module


def identity(study: Study, task: Task, architecture: str) -> str:
    """Return the fingerprint of a classifier: everything that shapes it."""
    return fingerprint(
        source=code_digests(architectures.__name__, __name__),
        architecture=architecture,
        data=checksum(task.dataset, study.data_dir),
        images=study.train_images,
        epochs=study.classifier_epochs,
        seed=study.seed,
    )


def obtain(
    study: Study,
    task: Task,
    architecture: str,
    store: Store,
    training: Callable[[], tuple[Tensor, Tensor]],
    device: torch.device,
) -> Classifier:
    """Load a classifier from the store, or train it there first; whoever comes second waits.

    Args:
        training: gives x_NCHW and y_N on `device`; called only where the training has to be done.
    """
    key = identity(study, task, architecture)
    network = ARCHITECTURES[architecture].build(task.shape).to(device)
    with store.lock("classifiers", key):
        entry = store.get("classifiers", key)
        if entry is None:
            x_NCHW, y_N = training()
            with DeviceLock(device).working():
                accuracy = train(network, x_NCHW, y_N, study.classifier_epochs, study.seed)
            about = {"task": task.dataset, "architecture": architecture, "training_accuracy": accuracy}
            entry = store.put("classifiers", key, {"weights.safetensors": to_bytes(network)}, about)
    network.load_state_dict(load_file(entry / "weights.safetensors", device=str(device)))
    return Classifier(key, network.eval().requires_grad_(False))


def train(network: nn.Module, x_NCHW: Tensor, y_N: Tensor, epochs: int, seed: int) -> float:
    """Train by cross-entropy (Adam 1e-3, batch 128) and return the last epoch's accuracy on the training images."""
    torch.manual_seed(seed)
    for part in network.modules():
        if isinstance(part, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            part.reset_parameters()
    adam = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    network.train()
    right = torch.zeros((), device=x_NCHW.device)
    for epoch in Batches(x_NCHW, y_N, epochs=epochs, batch_size=128, seed=seed):
        right.zero_()
        for x, y in epoch:
            logits_NK = network(x)
            adam.zero_grad(set_to_none=True)
            F.cross_entropy(logits_NK, y).backward()
            adam.step()
            right += (logits_NK.argmax(1) == y).sum()
    return float(right) / len(x_NCHW)
