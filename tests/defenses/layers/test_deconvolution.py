"""A deconvolution as one convolution: the same sums as torch's own, and the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from defenses.layers.deconvolution import FEW, Doubling

SIZES = [(7, 3), (5, 2), (4, 1), (6, 2), (3, 1), (2, 0), (9, 4)]


@pytest.mark.parametrize(("kernel", "padding"), SIZES)
@pytest.mark.parametrize("outputs", [1, 3, FEW + 1])
def test_it_is_torch_s_deconvolution(kernel: int, padding: int, outputs: int) -> None:
    ours = Doubling(2, outputs, kernel, padding).double()
    theirs = nn.ConvTranspose2d(2, outputs, kernel, 2, padding, output_padding=2 + 2 * padding - kernel).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    found, expected = ours(x), theirs(x)
    assert found.shape == expected.shape == (3, outputs, 10, 8)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    mine = torch.autograd.grad((found * weights).sum(), [x, *ours.parameters()])
    other = torch.autograd.grad((expected * weights).sum(), [x, *theirs.parameters()])
    torch.testing.assert_close(mine, other)


def test_few_maps_take_the_convolution_and_many_torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(nn.ConvTranspose2d, "forward", lambda self, x, size=None: asked.append(self.out_channels))
    x = torch.rand(1, 2, 4, 4)
    for outputs in (1, FEW, FEW + 1):
        Doubling(2, outputs, 7, 3)(x)
    assert asked == [FEW + 1]


def test_it_follows_channels_last_and_bfloat16() -> None:
    layer, x = Doubling(8, 1, 7, 3), torch.rand(2, 8, 7, 7).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x), atol=0.02, rtol=0.02)
