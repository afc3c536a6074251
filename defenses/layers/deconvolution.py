"""Deconvolutions that double the size, computed as one convolution where that is faster.

Source: Shi et al., Is the deconvolution layer the same as a convolutional layer?, 2016.
Shapes: N images, I maps in, O maps out, H x W pixels, K x K kernel, T x T taps of each output pixel.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

FEW = 8
"""Up to so many maps out, one convolution is faster: CPU, 7 x 7 of 16 maps to one, 28 pixels: 32 ms in place of 95."""


class Doubling(nn.ConvTranspose2d):
    """A deconvolution of stride 2, of twice the height and width: a drop-in for `nn.ConvTranspose2d`.

    Each of the four output pixels of an input pixel is a convolution with every other row and column of the kernel. All
    four are computed as one convolution of `4 * O` maps, which are then interleaved: the same sums in another order.

    Args:
        kernel: its size K.
        padding: K // 2, or (K - 1) // 2 for an even K; the output padding follows from both.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, padding: int) -> None:
        super().__init__(inputs, outputs, kernel, 2, padding, output_padding=2 + 2 * padding - kernel)
        # Pixel m of the output's rows of one parity reads pixels m + first to m + last of the input.
        self.first, self.last = -((kernel - 1 - padding) // 2), (padding + 1) // 2
        self.taps = self.last - self.first + 1
        before = 2 * self.last - padding
        self.margins = (before, 2 * self.taps - kernel - before) * 2

    def forward(self, x_NIHW: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the maps of twice the height and width, x_NOHW."""
        if self.out_channels > FEW or output_size is not None:
            return super().forward(x_NIHW, output_size)
        margin = max(-self.first, self.last)
        start, bias_O = margin + self.first, self.bias if self.bias is None else self.bias.repeat_interleave(4)
        maps = F.conv2d(x_NIHW, self._kernel(), bias_O, padding=margin)
        height, width = x_NIHW.shape[-2:]
        return F.pixel_shuffle(maps[..., start : start + height, start : start + width], 2)

    def _kernel(self) -> Tensor:
        """Return the kernel of all four: tap t of a row's parity p is row 2 (T - 1 - t) + p of the padded kernel."""
        weight_IOKK = F.pad(self.weight, self.margins)
        parts = weight_IOKK.unflatten(3, (self.taps, 2)).unflatten(2, (self.taps, 2)).flip(2, 4)
        return parts.permute(1, 3, 5, 0, 2, 4).flatten(0, 2)
