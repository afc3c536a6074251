"""Another recipe for the protected classifiers: random crops and flips, and a learning rate that follows held-out loss.

Source: AdvAE (Li et al. 2019), section 4.1, for its base model on CIFAR-10; the crops are those of Madry et al. (2017),
to whom it refers, in their cifar10_challenge. Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.seeding import evaluating
from defenses.advae import HALVE_AFTER, HELD_OUT, STOP_AFTER, Best
from defenses.base import Batches

PAD = 2
"""Zeros around an image before it is cropped to its size again, in pixels."""
BATCH = 128
"""Images a step (the paper does not say)."""


def train_augmented(network: nn.Module, x_NCHW: Tensor, y_N: Tensor, epochs: int, seed: int) -> float:
    """Train by cross-entropy (Adam, 1e-3 at first) and return the last epoch's accuracy on the augmented images.

    A tenth of the images is held out: the rate is halved after 4 epochs without a lower loss on them, the training ends
    after 10, and the weights of the lowest loss are kept.

    Args:
        epochs: passes over the training images at most.
    """
    torch.manual_seed(seed)
    for part in network.modules():
        if isinstance(part, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            part.reset_parameters()
    adam, best = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True), Best(network)
    batches, held_out = Batches(x_NCHW, y_N, epochs=epochs, batch_size=BATCH, seed=seed).split(HELD_OUT)
    right = torch.zeros((), device=x_NCHW.device)
    for epoch in batches:
        if best.waited >= STOP_AFTER:
            break
        network.train()
        right.zero_()
        for x, y in epoch:
            logits_NK = network(augmented(x))
            adam.zero_grad(set_to_none=True)
            F.cross_entropy(logits_NK, y).backward()
            adam.step()
            right += (logits_NK.argmax(1) == y).sum()
        best.see(_loss(network, *held_out))
        if best.waited and best.waited % HALVE_AFTER == 0:
            for group in adam.param_groups:
                group["lr"] *= 0.5
    best.restore()
    return float(right) / len(batches.x_NCHW)


def augmented(x_NCHW: Tensor) -> Tensor:
    """Return each image shifted by up to `PAD` pixels in both directions, and mirrored by a chance of a half."""
    images, _, height, width = x_NCHW.shape
    padded_NCHW, device = F.pad(x_NCHW, 4 * (PAD,)), x_NCHW.device
    down_N, right_N, mirrored_N = torch.randint(2 * PAD + 1, (2, images)).unbind() + (torch.rand(images) < 0.5,)
    columns_NW = torch.arange(width).expand(images, width)
    columns_NW = torch.where(mirrored_N[:, None], columns_NW.flip(1), columns_NW) + right_N[:, None]
    rows_NH = torch.arange(height) + down_N[:, None]
    place_N = torch.arange(images)[:, None, None]
    chosen = (one.to(device) for one in (place_N, rows_NH[:, :, None], columns_NW[:, None, :]))
    return padded_NCHW.movedim(1, -1)[tuple(chosen)].movedim(-1, 1)


@torch.no_grad()
def _loss(network: nn.Module, x_NCHW: Tensor, y_N: Tensor) -> float:
    """Return the mean cross-entropy on held-out images."""
    with evaluating(network):
        parts = zip(x_NCHW.split(BATCH), y_N.split(BATCH), strict=True)
        return sum(float(F.cross_entropy(network(x), y, reduction="sum")) for x, y in parts) / len(y_N)
