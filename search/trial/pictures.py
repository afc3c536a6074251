"""Pictures of clean, attacked and purified images, as a PNG whose caption describes its content.

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
"""The keyword of the PNG standard for a caption."""


def drawn(target: Defended, x_NCHW: Tensor, attacked_NCHW: Tensor, y_N: Tensor, attack: str) -> bytes:
    """Return a PNG with rows of clean, attacked and purified images, and of the difference of the last and the first.

    Args:
        attack: a description of the attack, for the caption.
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
    """Return images in [0, 1] as a PNG, R rows of N; the ASCII caption is stored in the file."""
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
    """Return a picture's caption; empty for a picture of an earlier version.

    Raises:
        OSError: the file is not a picture, or cannot be read.
    """
    with Image.open(picture) as image:
        return str(image.info.get(CAPTION, ""))
