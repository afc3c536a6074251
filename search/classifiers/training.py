"""The training recipe of the protected classifiers, and the fingerprint of a trained one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import Batches
from search.classifiers import architectures
from search.storage.fingerprint import code_digests, fingerprint


def classifier_key(architecture: str, *, data: str, images: object, epochs: int, seed: int, **more: object) -> str:
    """Return the fingerprint of a trained classifier, which covers everything that shapes it.

    Args:
        data: the SHA-256 of the data set.
        images: the number of training images, None for all; or other JSON that identifies them.
        more: whatever else shapes it.
    """
    source = code_digests(architectures.__name__, __name__)
    parts = {"architecture": architecture, "data": data, "images": images, "epochs": epochs, "seed": seed}
    return fingerprint(source=source, **parts, **more)


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
