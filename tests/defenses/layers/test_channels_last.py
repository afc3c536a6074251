"""Convolutions lie channels last, also those of one channel, where torch cannot tell the formats apart."""

from __future__ import annotations

import torch
from torch import nn

import defenses
from defenses.base import Shape
from defenses.layers.channels_last import channels_last
from search.classifiers.architectures import ARCHITECTURES

GREY = Shape(1, 28, 28, 10)


def test_nothing_changes_but_the_memory_format_of_every_map() -> None:
    torch.manual_seed(0)
    network, x, seen = (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3)),
        torch.rand(2, 1, 8, 8),
        [],
    )
    plain = network(x)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert channels_last(network) is network
    for part in network:
        part.register_forward_hook(lambda part, given, maps: seen.append(maps.stride(1)))
    assert torch.allclose(network(x), plain, atol=1e-6) and seen == [1, 1, 1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_every_classifier_and_defense_has_it() -> None:
    classifiers = {name: architecture.build(GREY) for name, architecture in ARCHITECTURES.items()}
    every: dict[str, nn.Module] = {
        **classifiers,
        **{name: defenses.find(name)({}, {}, GREY) for name in defenses.names()},
    }
    for name, network in every.items():
        convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)]
        assert all(part.weight.stride(1) == 1 for part in convolutions), name
