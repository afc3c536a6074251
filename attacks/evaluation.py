"""Accuracy under attack, per sample: runs a suite on a model and records its outputs on every version of each image.

Shapes: N images, C channels, H x W pixels, K classes, S detector scores (0 where nothing can be rejected), D draws of a
stochastic defense's noise (1 where there is none). A version of an image is the clean one or an adversarial example.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from attacks.attack import Attack
from attacks.black_box import BlackBoxAttacker
from attacks.gradient_view import BATCH, Gradient, Guarded, View, bare, gradients, limits, openings, stochastic
from attacks.seeding import KnownNoise, reproducible, seeded
from attacks.suites import Suite, craft_oblivious
from attacks.threat import ThreatModel
from attacks.verdicts import Observation, Robustness, Seen, share
from spaces.exceptions import InputError


def evaluate(
    suite: Suite,
    target: nn.Module,
    x_NCHW: Tensor,
    y_N: Tensor,
    threat: ThreatModel,
    **options: Any,
) -> Robustness:
    """Attack a bare or defended classifier and return the verdict on each sample; `options` are those of `observe`."""
    return observe(suite, target, x_NCHW, y_N, threat, **options).judge()


def observe(
    suite: Suite,
    target: nn.Module,
    x_NCHW: Tensor,
    y_N: Tensor,
    threat: ThreatModel,
    *,
    oblivious: Mapping[str, Tensor] | None = None,
    black_box: Mapping[str, Tensor] | None = None,
    attacker: BlackBoxAttacker | None = None,
    seed: int = 0,
    white_box: bool = False,
    standing_N: Tensor | None = None,
    start: int = 0,
    kept: Collection[str] = (),
    begun: Observation | None = None,
) -> Observation:
    """Attack a bare or defended classifier and return its outputs on every version of the images.

    A white-box attack is run only on images that are still classified correctly (in some draw, if the defense is
    stochastic). Where images can be rejected it is run on all, since another attack may pass a stricter threshold.

    Args:
        target: logits_NK from images in [0, 1], with `accept` where it can reject.
        oblivious: images returned by `craft_oblivious`; None: craft them here.
        black_box: adversarial examples of a substitute, if already crafted.
        attacker: trains a substitute and crafts these examples on it, in place of `black_box`.
        seed: seed of the attacks and of the defense's noise.
        white_box: whether to run the white-box attacks under any threat model.
        standing_N: mask of the images that white-box attacks are run on, bool; None: all.
        start: added to the seed of the white-box attacks, to change their random starts but not the verdicts' noise.
        kept: names of the attacks whose images are kept with the outputs (`Observation.kept`).
        begun: an observation of the same images whose white-box attacks ran on others than `standing_N`: it goes on.

    Raises:
        InputError: the images, the labels or the model's outputs are invalid.
    """
    check(target, x_NCHW, y_N)
    suite = suite.within(threat)
    if begun is None:
        if oblivious is None:
            oblivious = craft_oblivious(suite, bare(target), x_NCHW, y_N, threat, seed)
        queries = 0
        if attacker is not None:
            black_box, queries = attacker.craft(suite, target, x_NCHW, y_N, threat, seed)
        looks = suite.looks if stochastic(target) else 1
        beyond = {attack.name for attack in suite.oblivious if attack.exceeds(threat)}
        view = partial(_seen, target, y_N, seed, looks, beyond, kept)
        begun = Observation(
            threat=threat,
            clean=look(target, x_NCHW, y_N, seed, looks),
            oblivious=view(oblivious),
            black_box=None if black_box is None else view(black_box),
            white_box=None,
            known=None,
            limits_S=limits(target),
            queries=queries,
        )
    if threat.knowledge != "white-box" and not white_box:
        return begun
    earlier = [begun.clean, *begun.oblivious.values(), *(begun.black_box or {}).values()]
    white = _white_box(suite, target, x_NCHW, y_N, threat, earlier, seed, start, standing_N, kept)
    if begun.white_box is not None and standing_N is not None:
        white = {name: seen.where(standing_N, begun.white_box[name]) for name, seen in white.items()}
    known = None
    if suite.known is not None:
        known = under_known_noise(suite.known, target, x_NCHW, y_N, threat, seed) if stochastic(target) else {}
    return replace(begun, white_box=white, known=known)


def _seen(
    target: nn.Module,
    y_N: Tensor,
    seed: int,
    looks: int,
    beyond: Collection[str],
    kept: Collection[str],
    images: Mapping[str, Tensor],
) -> dict[str, Seen]:
    """Return the outputs on the adversarial versions of each attack; those of `beyond` may exceed the bound."""
    seen = {name: look(target, x_NCHW, y_N, seed, looks, bounded=name not in beyond) for name, x_NCHW in images.items()}
    return {name: replace(one, x_NCHW=images[name]) if name in kept else one for name, one in seen.items()}


def _white_box(
    suite: Suite,
    target: nn.Module,
    x_NCHW: Tensor,
    y_N: Tensor,
    threat: ThreatModel,
    earlier: Sequence[Seen],
    seed: int,
    start: int,
    standing_N: Tensor | None,
    kept: Collection[str],
) -> dict[str, Seen]:
    """Return the outputs under each white-box attack, run on images that withstood the earlier ones; see `observe`.

    Args:
        earlier: outputs on the clean images, then on the versions crafted before.
    """
    clean, seen = earlier[0], dict[str, Seen]()
    standing_DN = reduce(torch.logical_and, [one.right for one in earlier if one.bounded])
    rejects = clean.suspicion_DNS.shape[-1] > 0
    for attack, gradient in strikes(suite, target):
        # An attack whose images may exceed the bound is not part of the worst case, so it is run on all images.
        wanted_N = standing_DN.any(dim=0) | (rejects or attack.exceeds(threat))
        chosen = (wanted_N if standing_N is None else wanted_N & standing_N).nonzero().flatten()
        view = View(target, gradient, suite.draws if stochastic(target) else 1)
        stops = not (stochastic(target) or rejects or gradient == "surrogate")
        x, y = x_NCHW[chosen], y_N[chosen]
        with untouched(x):
            made_NCHW = attack.craft(view, x, y, threat, seed + start, ids_N=chosen, stops=stops)
        one = _met(target, made_NCHW, chosen, x_NCHW, y_N, seed, clean, bounded=not attack.exceeds(threat))
        if attack.name in kept:
            one = replace(one, x_NCHW=x_NCHW.index_copy(0, chosen, made_NCHW))
        seen[f"{attack.name} ({gradient})" if attack.through == "each" else attack.name] = one
        standing_DN = standing_DN & one.right if one.bounded else standing_DN
    return seen


def strikes(suite: Suite, target: nn.Module) -> list[tuple[Attack, Gradient]]:
    """Return the white-box attacks that apply to the target, each with a gradient source to run it through."""
    sources = gradients(target)
    once: dict[str, tuple[Gradient, ...]] = {"each": (), "first": sources[:1], "exact": ("exact",)}
    applies = [attack for attack in suite.white_box if attack.aims is None or attack.aims in openings(target)]
    many = [(attack, gradient) for gradient in sources for attack in applies if attack.through == "each"]
    return many + [(attack, gradient) for attack in applies for gradient in once[attack.through]]


@torch.no_grad()
def look(
    target: nn.Module,
    x_NCHW: Tensor,
    y_N: Tensor,
    seed: int,
    looks: int = 1,
    *,
    bounded: bool = True,
    batch: int = BATCH,
) -> Seen:
    """Return the model's outputs on the images, for `looks` successive draws of noise that start from `seed`.

    Args:
        batch: images that it is asked about at once.
    """
    with reproducible(target, seed), untouched(x_NCHW):
        outputs = [
            _answered(target, x, y)
            for _ in range(looks)
            for x, y in zip(x_NCHW.split(batch), y_N.split(batch), strict=True)
        ]
    right, suspicion = (torch.cat(parts).unflatten(0, (looks, -1)) for parts in zip(*outputs, strict=True))
    return Seen(right, suspicion, bounded)


def _answered(target: nn.Module, x_NCHW: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether the classes are right, bool_N, and the detector scores, NS."""
    logits_NK = target(x_NCHW).as_subclass(Tensor)  # a subclass could compare as it likes
    guarded = cast(Guarded, target) if hasattr(target, "defense") else None
    suspicion_NS = guarded.defense.suspicion(x_NCHW) if guarded else x_NCHW.new_zeros((len(x_NCHW), 0))
    return logits_NK.argmax(1) == y_N, suspicion_NS.as_subclass(Tensor)


@contextmanager
def untouched(x_NCHW: Tensor) -> Iterator[None]:
    """Raise an InputError if images change inside: a model could write easier ones in their place to be judged by."""
    before_NCHW = x_NCHW.clone()
    yield
    if not torch.equal(before_NCHW, x_NCHW):
        raise InputError("a model must leave the images that it is given as they are, but it changes them in place")


@torch.no_grad()
def under_known_noise(
    attack: Attack, target: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, seed: int
) -> dict[str, Seen]:
    """Return the outputs in the first draw of `look` where the attacker knows this noise, by attack and gradient.

    All images are attacked, in the batches of `look`: an image's noise depends on the others of its batch.

    Source: Liu et al. 2024 and 2025 report diffusion purification so; Athalye et al. 2018 for randomised defenses.
    """
    outputs = dict[str, list[tuple[Tensor, Tensor]]]()
    with reproducible(target, seed):
        for ids_N in torch.arange(len(y_N), device=y_N.device).split(BATCH):
            x, y = x_NCHW[ids_N], y_N[ids_N]
            for source in gradients(target):
                made_NCHW = attack.craft(KnownNoise(View(target, source)), x, y, threat, seed, ids_N=ids_N)
                with seeded():
                    outputs.setdefault(f"{attack.name} ({source})", []).append(_answered(target, made_NCHW, y))
            _answered(target, x, y)  # the next batch's noise comes after this one's
    joined = {
        name: [torch.cat(parts)[None] for parts in zip(*batches, strict=True)] for name, batches in outputs.items()
    }
    return {name: Seen(right_DN, suspicion_DNS) for name, (right_DN, suspicion_DNS) in joined.items()}


@torch.no_grad()
def check(target: nn.Module, x_NCHW: Tensor, y_N: Tensor) -> None:
    """Raise InputError if the images, the labels or the model's outputs on the first images are invalid."""
    if x_NCHW.ndim != 4 or len(x_NCHW) != len(y_N) or len(y_N) == 0:
        raise InputError(
            f"images must be N x C x H x W with N labels, N at least 1, but are {_shape(x_NCHW)} with {_shape(y_N)}"
        )
    low, high = (float(edge) for edge in x_NCHW.aminmax())
    if not (low >= 0 and high <= 1):
        raise InputError(f"images must lie in [0, 1], but lie in [{low:g}, {high:g}]")
    x = x_NCHW[:32]
    with reproducible(target, 0), untouched(x):
        logits_NK = target(x)
    classes = int(y_N.max()) + 1
    if logits_NK.ndim != 2 or len(logits_NK) != len(x) or logits_NK.shape[1] < classes:
        raise InputError(f"a model must return logits, {len(x)} x at least {classes}, but {_shape(logits_NK)}")
    if not bool(logits_NK.isfinite().all()):
        raise InputError("a model must return finite logits, but some are NaN or infinite")
    if probabilities(logits_NK) > 0.5:
        raise InputError("a model must return logits, but returns probabilities: leave the softmax out")


def probabilities(logits_NK: Tensor) -> float:
    """Return the share of rows that are a probability distribution, or of differing rows the same multiple of one."""
    sums_N = logits_NK.sum(1)
    whole = sums_N.median()
    differ = len(sums_N) >= 8 and bool((logits_NK.amax(0) - logits_NK.amin(0)).max() > 0.1 * whole)
    alike_N = ((sums_N - 1).abs() < 1e-3) | (differ & ((sums_N - whole).abs() < 1e-3 * whole))
    return share((logits_NK >= 0).all(1) & alike_N)


def _met(
    target: nn.Module,
    made_NCHW: Tensor,
    chosen: Tensor,
    x_NCHW: Tensor,
    y_N: Tensor,
    seed: int,
    clean: Seen,
    *,
    bounded: bool,
) -> Seen:
    """Return the model's outputs with the chosen images replaced by adversarial examples and the others left clean.

    A stochastic defense gets the whole batch, so that in each draw all versions of an image share the same noise;
    otherwise each further version would be another chance of an error.
    """
    if len(chosen) == 0:
        return replace(clean, bounded=bounded)
    if stochastic(target):
        return look(target, x_NCHW.index_copy(0, chosen, made_NCHW), y_N, seed, len(clean.right), bounded=bounded)
    right, suspicion_DNS = clean.right.clone(), clean.suspicion_DNS.clone()
    one = look(target, made_NCHW, y_N[chosen], seed)
    right[:, chosen], suspicion_DNS[:, chosen] = one.right, one.suspicion_DNS
    return Seen(right, suspicion_DNS, bounded)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a scalar"
