"""The U-Net of diffusion models: sizes, the time, and what it begins as."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from defenses.layers.unet import Attention, TimeEmbedding, TimeUNet
from spaces.exceptions import InputError


def build(channels: int = 1, side: int = 8, **wishes: int) -> TimeUNet:
    sizes = {"maps": 4, "levels": 2, "blocks": 1, "attention": 4, "embedding": 6} | wishes
    torch.manual_seed(0)
    network = TimeUNet(channels, side, **sizes, dropout=0.0).eval()
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.2)
    return network


@pytest.mark.parametrize("size", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 9, 13), (3, 128, 128)])
@pytest.mark.parametrize(("levels", "blocks", "maps"), [(1, 1, 5), (4, 2, 6)])
def test_it_returns_an_image_of_the_same_size(size: tuple[int, int, int], levels: int, blocks: int, maps: int) -> None:
    with torch.device("meta"):
        network = TimeUNet(
            size[0], min(size[1:]), maps=maps, levels=levels, blocks=blocks, attention=16, embedding=7, dropout=0.1
        )
        assert network(torch.rand(2, *size), torch.ones(2)).shape == (2, *size)


def test_it_begins_as_zero() -> None:
    network = TimeUNet(1, 8, maps=4, levels=2, blocks=1, attention=4, embedding=6, dropout=0.0)
    assert float(network(torch.randn(2, 1, 8, 8), torch.tensor([1, 500])).detach().abs().max()) == 0


def test_each_image_has_its_own_time() -> None:
    network, x = build(), torch.randn(3, 1, 8, 8)
    times = torch.tensor([1, 40, 900])
    together = network(x, times)
    alone = torch.cat([network(x[i : i + 1], times[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together, network(x, times.flip(0)))


def test_times_that_are_near_have_near_embeddings() -> None:
    angles = TimeEmbedding(32)
    angles.dense = nn.Sequential()
    one, next_to, far = angles(torch.tensor([500, 501, 900]), torch.float32)
    assert one.shape == (32,) and (one - next_to).norm() < (one - far).norm()
    odd, least = TimeEmbedding(7), TimeEmbedding(2)
    assert (
        odd(torch.tensor([3]), torch.float32).shape == (1, 7)
        and least(torch.tensor([3]), torch.float32).isfinite().all()
    )


@pytest.mark.parametrize(("attention", "expected"), [(0, 0), (1, 1), (4, 4), (8, 8)])
def test_maps_up_to_a_side_have_attention(attention: int, expected: int) -> None:
    """Of 8 and 4 pixels with one block down and two up, and in the middle."""
    network = build(attention=attention)
    assert sum(isinstance(part, Attention) for part in network.modules()) == expected - (attention == 8)


def test_attention_is_softmax_of_the_products() -> None:
    torch.manual_seed(0)
    layer = Attention(4).double()
    nn.init.eye_(layer.last.weight.view(4, 4))
    x = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    q, k, v = layer.queries(layer.norm(x))[0].flatten(1).chunk(3)
    seen = torch.stack([sum(w * v[:, j] for j, w in enumerate((q[:, i] @ k / 2).softmax(0))) for i in range(6)], dim=1)
    torch.testing.assert_close(layer(x), x + seen.view(1, 4, 2, 3))


def test_more_levels_than_the_side_has_are_refused_in_one_line() -> None:
    TimeUNet.check(4, 8, 9)
    with pytest.raises(InputError, match="of 5 levels needs images of at least 16 pixels a side, but they have 8"):
        TimeUNet.check(5, 8, 9)
