"""Draws figures of the papers from our cells: Fig. 7 and 9 of PuVAE, Fig. 3 and 5 of GMVAE.

Shapes: N images, K classes, C channels, H x W pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from attacks.catalog import ATTACKS
from attacks.seeding import reproducible
from defenses.base import Defended
from defenses.puvae import PuVAE
from search.reproduce.attack_cell import threat
from search.reproduce.cells import Cells
from search.reproduce.paper_tables import Table
from search.reproduce.results import TableResult
from search.storage.atomic import write_atomic
from search.templates import render

Draw = Callable[[TableResult, Table, Cells, Path], list[Path]]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Colours of Okabe and Ito, distinguishable with red-green colour blindness."""
TEMPLATE = Path(__file__).parent / "templates" / "chart.svg.j2"
SIDE, EDGE = 56, 4
"""Side of an image and gap between images, in pixels."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Args:
        points: pairs of x and y; y is a fraction.
        dash: the SVG stroke-dasharray; empty for a solid line.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dash: str = ""


def classes(found: TableResult, table: Table, cells: Cells, out: Path) -> list[Path]:
    """Draw PuVAE's Fig. 7: the projections of one attacked image on all classes, one row per set of weights."""
    rows = []
    for cell, row in zip(table.cells, found["cells"], strict=True):
        if row["ours"] is not None:
            runner, setting = cells.runner(cell.setting), cell.setting
            target = cast(Defended, cells.target(runner, cells.params(setting), setting))
            x_NCHW, y_N = runner.assets.evaluator.x_NCHW, runner.assets.evaluator.y_N
            if setting.attack is not None:
                x_NCHW = runner.assets.adversarial(ATTACKS[setting.attack], x_NCHW, y_N, threat(setting))
            with torch.no_grad(), reproducible(target.defense, cells.seed):
                made_KCHW = cast(PuVAE, target.defense).candidates(x_NCHW[:1])[0]
            label = f"{cell.labels[0]}\nacc {100 * row['ours']:.1f} %"
            rows.append((torch.cat((x_NCHW[:1], made_KCHW)).cpu(), label))
    return [write_atomic(out / "classes.png", _strips(rows))] if rows else []


def over_time(found: TableResult, table: Table, cells: Cells, out: Path) -> list[Path]:
    """Draw PuVAE's Fig. 9: accuracy against the time to purify a batch, in seconds, measured here."""
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for cell, row in zip(table.cells, found["cells"], strict=True):
        if row["ours"] is not None:
            named = cell.setting.defense, row["labels"]["attack"]
            params = cells.params(cell.setting)
            row["batch_s"] = cells.batch_s(cell.setting, params)
            row["extrapolated"] = cells.extrapolates(cell.setting, params)
            curves.setdefault(named, []).append((row["batch_s"], row["ours"]))
    last = max((x for points in curves.values() for x, _ in points), default=1.0)
    dashes = {"puvae": "", "magnet": "2 4", "defense_gan": "8 5"}
    colours = dict(zip(table.labels["attack"], COLOURS, strict=False))
    drawn = [
        Curve(
            f"{defense}, {attack}",
            sorted(points) if len(points) > 1 else [points[0], (last, points[0][1])],
            colours[attack],
            dashes.get(defense, "1 2"),
        )
        for (defense, attack), points in curves.items()
    ]
    return [_charted(out / "time.svg", drawn, "seconds to purify a batch of 128 images", log=True)] if drawn else []


def by_eps(found: TableResult, table: Table, cells: Cells, out: Path) -> list[Path]:
    """Draw GMVAE's Fig. 3 or 5: accuracy, error and rejection against the eps of FGSM."""
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for cell, row in zip(table.cells, found["cells"], strict=True):
        if row["ours"] is not None and cell.setting.eps is not None:
            named = row["labels"]["model"], row["labels"]["figure"]
            curves.setdefault(named, []).append((cell.setting.eps, row["ours"]))
    colours = dict(zip(table.labels["figure"], COLOURS, strict=False))
    dashes = dict(zip(table.labels["model"], ("", "8 5"), strict=False))
    drawn = [
        Curve(f"{figure}, {model.lower()}", sorted(points), colours[figure], dashes[model])
        for (model, figure), points in curves.items()
    ]
    return [_charted(out / "eps.svg", drawn, "eps of FGSM (L-infinity)")] if drawn else []


PICTURES: Mapping[str, Draw] = {
    "puvae/fig7": classes,
    "puvae/fig9": over_time,
    "gmvae/fig3": by_eps,
    "gmvae/fig5": by_eps,
}


def _strips(rows: Sequence[tuple[Tensor, str]]) -> bytes:
    """Return rows of images with their labels as a PNG; the first image of each row is framed."""
    step, font = SIDE + EDGE, ImageFont.load_default(14)
    picture = Image.new("RGB", (step * len(rows[0][0]) + 3 * EDGE + 150, step * len(rows) + EDGE), "white")
    pen = ImageDraw.Draw(picture)
    for i, (x_NCHW, label) in enumerate(rows):
        for j, x_CHW in enumerate(x_NCHW):
            pixels = (x_CHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
            left, top = EDGE + j * step + (2 * EDGE if j else 0), EDGE + i * step
            picture.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
            if j == 0:
                pen.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=COLOURS[2], width=3)
        pen.text((step * len(x_NCHW) + 4 * EDGE, EDGE + i * step + 10), label, fill="black", font=font)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _charted(path: Path, curves: Sequence[Curve], x: str, *, log: bool = False) -> Path:
    """Write a chart as SVG; the x axis spans the points, the y axis 0 to 100 %."""
    scaled = math.log10 if log else float
    xs = [scaled(max(at, 1e-9)) for curve in curves for at, _ in curve.points]
    low, high = min(xs), max(max(xs), min(xs) + 1e-9)
    ticks = range(math.floor(low), math.ceil(high) + 1) if log else [low + i * (high - low) / 4 for i in range(5)]
    if log:
        low, high = float(ticks[0]), float(ticks[-1])

    def place(at: float) -> float:
        return 60 + 480 * (scaled(max(at, 1e-9)) - low) / (high - low)

    lines = [
        (curve, " ".join(f"{place(at):.1f},{330 - 300 * share:.1f}" for at, share in curve.points)) for curve in curves
    ]
    marks = [(60 + 480 * (tick - low) / (high - low), f"{10**tick if log else tick:.3g}") for tick in ticks]
    return write_atomic(path, render(TEMPLATE, lines=lines, ticks=marks, x=x).encode())
