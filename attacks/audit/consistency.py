"""Audit checks that the model that was judged is the model that users get: asked alone, afresh, or about other images.

Source: check 13 of docs/honest-numbers.md. Shapes: D draws, N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.algorithms.base import gradient_of
from attacks.algorithms.regular_pgd import regular
from attacks.audit.gate import SLACK, Gate, at_most, broken, unit
from attacks.catalog import EXTREMES_10, LEVELS_10, REGULAR_10
from attacks.evaluation import look, observe
from attacks.gradient_view import BATCH, View, gradients, limits, stochastic
from attacks.seeding import reproducible
from attacks.suites import SUITES, Suite
from attacks.threat import ThreatModel
from attacks.verdicts import Observation, Robustness, Seen, Verdict
from spaces.exceptions import InputError

FEW = 16
"""Number of images that are also asked about in batches of other sizes."""
SIZES = 1, 2, 7
"""Sizes of batches in which gradients are asked for too; verdicts are taken in batches of up to `BATCH`."""
OTHERS = *range(3, FEW + 1), 128, 2 * BATCH + 2 * FEW
"""Further sizes: all small ones, that of latencies, and one above those of verdicts; images are repeated."""
MOVED = 0.01
"""Largest change of a logit between batches, in units of the logits' own spread."""
ALIKE = 0.9
"""Least cosine between the gradients of an image in two batches."""
LOOKS = 5
"""Noise draws of the verdicts that confirm others; a cheat's differ by far more than those of so few draws."""
REGULAR = Suite(
    name="regular",
    oblivious=(LEVELS_10, EXTREMES_10, REGULAR_10),
    white_box=(REGULAR_10,),
    draws=SUITES["audit"].draws,
    looks=SUITES["audit"].looks,
)


def copied(target: nn.Module) -> nn.Module:
    """Return a copy of a model, with its own state.

    Raises:
        InputError: the model cannot be copied.
    """
    try:
        return copy.deepcopy(target)
    except (RuntimeError, TypeError) as error:
        kind = type(target).__name__
        raise InputError(f"a model must be one that copy.deepcopy can copy, but {kind} is not: {error}") from None


def beyond_chance(one_DN: Tensor, other_DN: Tensor) -> float:
    """Return by how much two verdicts on the same images differ, beyond one image and chance, as a share of the images.

    Without noise it is the share of the images whose verdicts differ. Else draws do not correspond, and it is the
    difference of the mean accuracies; chance is then three standard errors.
    """
    images = one_DN.shape[1]
    if len(one_DN) == len(other_DN) == 1:
        return max(0.0, float((one_DN != other_DN).double().mean()) - 1 / images)
    rates = [verdicts_DN.double().mean(dim=0) for verdicts_DN in (one_DN, other_DN)]
    draws = len(one_DN), len(other_DN)
    variance = sum(float((p_N * (1 - p_N)).sum()) / looks for p_N, looks in zip(rates, draws, strict=True))
    differ = float((rates[0] - rates[1]).mean().abs())
    return max(0.0, differ - (1 + 3 * math.sqrt(variance)) / images)


def replayed(fresh: nn.Module, clean: Seen, kept: Mapping[str, Seen], x_NCHW: Tensor, y_N: Tensor, seed: int) -> Gate:
    """Check 13: a model that has not been asked before, attacked images first and in another order, judges alike.

    Args:
        fresh: a copy of the model, made before anything was asked.
        kept: the outputs on adversarial images, with these images.
    """
    law = "a copy that is asked the attacked images first, in another order, gives the same verdicts"
    figure, limits_S = 0.0, limits(fresh)
    for seen in (*reversed(list(kept.values())), replace(clean, x_NCHW=x_NCHW)):
        assert seen.x_NCHW is not None, "the images were kept"
        again = look(fresh, seen.x_NCHW.flip(0), y_N.flip(0), seed + 1, min(LOOKS, len(seen.right)))
        here, there = Verdict.of(seen, limits_S), Verdict.of(again, limits_S)
        for one_DN, other_DN in ((here.right, there.right), (here.wrong, there.wrong)):
            figure = max(figure, beyond_chance(one_DN, other_DN.flip(1)))
    return at_most(13, "replayed", law, figure, 0.0, len(y_N))


def batch_size(target: nn.Module, versions: Mapping[str, Tensor], y_N: Tensor, seed: int) -> Gate:
    """Check 13: answers and gradients are the same alone, in small batches and in those of the attacks.

    With noise, which differs between batches, only the accuracies are compared, within chance.

    Args:
        versions: clean and attacked images, N or more.
    """
    law = (
        f"images alone, by {SIZES[1]} and by {SIZES[2]} get the answers and gradients that they get in a whole batch, "
        f"and the answers in batches of 3 to {FEW}, {OTHERS[-2]} and {OTHERS[-1]}"
    )
    figure, few = 0.0, min(FEW, len(y_N))
    for x_NCHW in versions.values():
        whole, part = (x_NCHW[:BATCH], y_N[:BATCH]), (x_NCHW[:few], y_N[:few])
        compare = _accuracies if stochastic(target) else _answers
        figure = max(figure, compare(target, whole, part, seed))
    return at_most(13, "batch-size", law, figure, 0.0, few)


Labelled = tuple[Tensor, Tensor]


def _accuracies(target: nn.Module, whole: Labelled, part: Labelled, seed: int) -> float:
    """Return by how much the accuracies of a model with noise differ beyond chance, at most."""
    accepted_S = limits(target)
    here_DN = Verdict.of(look(target, *whole, seed, LOOKS), accepted_S).right[:, : len(part[1])]
    differ = 0.0
    for size in (*SIZES, *OTHERS):
        there = look(target, *_repeated(part, size), seed + size, LOOKS, batch=size)
        there_DN = Verdict.of(there, accepted_S).right.unflatten(1, (-1, len(part[1]))).flatten(0, 1)
        differ = max(differ, beyond_chance(here_DN, there_DN) - SLACK)
    return differ


def _repeated(labelled: Labelled, size: int) -> Labelled:
    """Return images as often as a batch of this size takes them, or once."""
    times = max(1, round(size / len(labelled[1])))
    return labelled[0].repeat(times, 1, 1, 1), labelled[1].repeat(times)


def _answers(target: nn.Module, whole: Labelled, part: Labelled, seed: int) -> float:
    """Return the share of images with another class, other logits or another gradient, at most; one does not count."""
    few = len(part[1])
    differ_SN = torch.zeros(len(SIZES) + len(OTHERS), few, dtype=torch.bool, device=part[1].device)
    with reproducible(target, seed), torch.no_grad():
        here_NK = target(whole[0])[:few]
        for differ_N, size in zip(differ_SN, (*SIZES, *OTHERS), strict=True):
            there_NK = torch.cat([target(x) for x, _ in _parts(_repeated(part, size), size)])
            moved_TN = (there_NK.unflatten(0, (-1, few)) - here_NK).abs().amax(dim=2)
            differ_N |= (moved_TN > MOVED * unit(here_NK)).any(dim=0)
    for gradient in gradients(target):
        view = View(target, gradient)
        here_ND = _gradient(view, *whole, seed)[:few]
        for differ_N, size in zip(differ_SN, SIZES, strict=False):
            there_ND = torch.cat([_gradient(view, x, y, seed) for x, y in _parts(part, size)])
            # NaN, where a gradient is zero, is the concern of another gate
            differ_N |= F.cosine_similarity(here_ND, there_ND, dim=1, eps=0) < ALIKE
    return max(0.0, float(differ_SN.double().mean(dim=1).max()) - 1 / few)


def _parts(labelled: Labelled, size: int) -> Iterable[Labelled]:
    return zip(labelled[0].split(size), labelled[1].split(size), strict=True)


def _gradient(view: View, x_NCHW: Tensor, y_N: Tensor, seed: int) -> Tensor:
    x_NCHW = x_NCHW.clone().requires_grad_()
    with reproducible(view, seed), torch.enable_grad():
        slope_NCHW = gradient_of(F.cross_entropy(view(x_NCHW), y_N, reduction="none"), x_NCHW)
    return F.normalize(slope_NCHW.flatten(1).double(), dim=1, eps=1e-300)


def regularly(
    target: nn.Module,
    x_NCHW: Tensor,
    y_N: Tensor,
    threat: ThreatModel,
    found: Observation,
    standing_N: Tensor,
    seed: int,
) -> Robustness:
    """Return the verdicts under images that keep regularities of clean ones.

    They are crafted so on the bare and on the defended model, and the kept images of `found` are made regular.
    """
    again = observe(REGULAR, target, x_NCHW, y_N, threat, seed=seed, white_box=True, standing_N=standing_N)
    snapped = {
        f"{name} (regular)": look(target, regular(seen.x_NCHW, x_NCHW, "both"), y_N, seed, len(seen.right))
        for name, seen in found.kept.items()
        if seen.x_NCHW is not None
    }
    blind = {name.partition("/")[2]: seen for name, seen in snapped.items() if name.startswith("oblivious")}
    white = {name.partition("/")[2]: seen for name, seen in snapped.items() if name.startswith("white-box")}
    return replace(
        again, oblivious={**again.oblivious, **blind}, white_box={**(again.white_box or {}), **white}
    ).judge()


def regular_gate(found: Robustness, again: Robustness) -> Gate:
    """Check 13: images on the levels of clean ones, with their zeros and ones, break little that the others left."""
    law = "attacked images with the levels, zeros and ones of clean images break nothing that the others left"
    lost, chance = broken(found.survivors, again.survivors)
    return at_most(13, "regular", law, lost, chance, found.survivors.shape[1])
