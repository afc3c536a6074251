"""Pictures of what an attack does to images and of what a defense makes of them: a PNG that says what it shows.

Shapes: N images, C channels, H x W pixels, R rows of a picture.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from defenses.base import Defended

CAPTION = "Description"
"""The keyword that the PNG standard has for it."""


def drawn(target: Defended, x_NCHW: Tensor, attacked_NCHW: Tensor, y_N: Tensor, attack: str) -> bytes:
    """Return a PNG with rows of clean, attacked and purified images, and how far the last are from the first.

    Args:
        attack: what was done to the attacked images, in words.
    """
    purified = target.defense.purify(attacked_NCHW)
    said = target(attacked_NCHW).argmax(1).masked_fill(~target.accept(attacked_NCHW), -1)
    classes = {
        "truth": y_N,
        "undefended, clean": target.classifier(x_NCHW).argmax(1),
        "undefended, attacked": target.classifier(attacked_NCHW).argmax(1),
        "defended, attacked": said,
    }
    lines = [f"{who}: {_listed(found.tolist())}" for who, found in classes.items()]
    shown = f"rows: clean; attacked ({attack}); purified; |purified - clean|"
    rows = torch.stack([x_NCHW, attacked_NCHW, purified, (purified - x_NCHW).abs()])
    return png(rows, caption="\n".join([shown, *lines]))


def _listed(classes: Iterable[int]) -> str:
    return " ".join("rejected" if k < 0 else str(k) for k in classes)


def png(rows_RNCHW: Tensor, zoom: int = 3, caption: str = "") -> bytes:
    """Return images in [0, 1] as a PNG, R rows of N; the caption, in ASCII, travels in it."""
    rows, images, channels, height, width = rows_RNCHW.shape
    grid = rows_RNCHW.permute(0, 3, 1, 4, 2).reshape(rows * height, images * width, channels)
    pixels = (grid.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    about, buffer = PngInfo(), io.BytesIO()
    if caption:
        about.add_text(CAPTION, caption)
    size = zoom * image.width, zoom * image.height
    image.resize(size, Image.Resampling.NEAREST).save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def caption(picture: Path) -> str:
    """Return what a picture says of itself; nothing where it is one of an earlier version.

    Raises:
        OSError: it is no picture, or cannot be read.
    """
    with Image.open(picture) as image:
        return str(image.info.get(CAPTION, ""))
