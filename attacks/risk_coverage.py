"""Exact threshold sweep over stored model outputs: the whole risk-coverage curve, without a forward pass.

Source: GMVAE, section 3.4: the thresholds "determine the risk to coverage trade-off for this selective classifier";
El-Yaniv and Wiener, On the Foundations of Noise-free Selective Classification, 2010.
Shapes: N images (each draw of a stochastic defense's noise counts as one), S detector scores, V versions of each image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attacks.verdicts import Observation

Floats = NDArray[np.float64]
GRID = 1000
"""Most combinations of thresholds tried on all scores but the last; on the last, every value is tried."""


@dataclass(frozen=True)
class Point:
    """One setting of the thresholds with its cost and error, as fractions of all images.

    Args:
        clean_rejection: clean images that are rejected.
        attacked_error: images with some version that is accepted and misclassified.
        limits: the thresholds, in the order of the scores.
    """

    clean_rejection: float
    attacked_error: float
    limits: tuple[float, ...]


def risk_coverage(found: Observation) -> list[Point]:
    """Return the Pareto-optimal settings, by increasing clean rejection.

    Only scores of clean images are tried as thresholds: any other rejects as many of them, at no lower error. Exact for
    one score, and for two with up to `GRID` images; otherwise the values of all scores but the last are thinned.
    """
    clean_NS = found.clean.suspicion_DNS.flatten(0, 1).double().cpu().numpy()
    images, columns = clean_NS.shape
    if not images or not columns:
        return []
    versions_NVS = np.stack(
        [seen.suspicion_DNS.flatten(0, 1).double().cpu().numpy() for seen in found.versions], axis=1
    )
    wrong_NV = np.stack([~seen.right.flatten().cpu().numpy() for seen in found.versions], axis=1)
    best: dict[int, Point] = {}
    for outer in itertools.product(*(_values(column, columns - 1) for column in clean_NS[:, :-1].T)):
        for point in _sweep(clean_NS, versions_NVS, wrong_NV, outer):
            rejected = round(point.clean_rejection * images)
            if rejected not in best or point.attacked_error < best[rejected].attacked_error:
                best[rejected] = point
    front: list[Point] = []
    for _, point in sorted(best.items()):
        if not front or point.attacked_error < front[-1].attacked_error:
            front.append(point)
    return front


def pick(front: Sequence[Point], budget: float) -> Point | None:
    """Return the setting with the lowest attacked error that rejects at most `budget` of the clean images."""
    return next((point for point in reversed(front) if point.clean_rejection <= budget), None)


def _values(column_N: Floats, outer: int) -> Floats:
    """Return the thresholds to try on one score: its values, thinned so that all combinations stay within `GRID`."""
    values: Floats = np.unique(column_N[np.isfinite(column_N)])
    most = max(1, int(GRID ** (1 / outer)))
    return values if len(values) <= most else np.quantile(values, np.linspace(0, 1, most), method="nearest")


def _sweep(clean_NS: Floats, versions_NVS: Floats, wrong_NV: NDArray[np.bool_], outer: Sequence[float]) -> list[Point]:
    """Return every setting of the last threshold with the other ones fixed."""
    images = len(clean_NS)
    passes_N = (clean_NS[:, :-1] <= outer).all(axis=1) & np.isfinite(clean_NS[:, -1])
    wrong_NV = wrong_NV & (versions_NVS[:, :, :-1] <= outer).all(axis=2)
    # The lowest threshold at which some misclassified version of an image is accepted.
    last_NV = versions_NVS[:, :, -1]
    falls_N = np.where(wrong_NV & ~np.isnan(last_NV), last_NV, np.inf).min(axis=1)
    limits = np.unique(clean_NS[passes_N, -1])
    accepted = np.searchsorted(np.sort(clean_NS[passes_N, -1]), limits, side="right")
    errors = np.searchsorted(np.sort(falls_N), limits, side="right")
    return [
        Point((images - int(a)) / images, int(e) / images, (*map(float, outer), float(limit)))
        for a, e, limit in zip(accepted, errors, limits, strict=True)
    ]
