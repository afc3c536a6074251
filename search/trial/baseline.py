"""The baseline `adversarially trained`: which fits deserve that name, and what others are called."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from attacks.threat import ThreatModel
from defenses.base import Metrics
from search.formatting import counted, spoken_eps
from search.study.verdict import TRAINED
from spaces.domain import Scalar

ADVERSARIAL = "adversarial_training"

LEAST_EPOCHS = 6
"""Fewest epochs of a converged fit: of fewer, the last third is one epoch."""
GAIN = 0.02
"""Largest gain in quick score, a fraction, that the last third of the epochs of a converged fit may bring."""
LEARNT = 0.9
"""Largest last loss of a converged fit, as a share of log K, that of chance, where a training may stay for long."""


def name_of(about: Mapping[str, Any], threat: ThreatModel, classes: int) -> str:
    """Return the name of a fit of adversarial training beside a winner: `adversarially trained`, or what it is instead.

    Args:
        about: what the store holds about the fit: its knobs, its curve, and how that was scored.
        threat: the threat model of the study.
    """
    knobs, curve = about["knobs"], about["curve"]
    known = _scored_under(about, threat)
    arrived = known and converged(curve, classes) and 3 * knobs["warm_up"] <= 2 * len(curve)
    if arrived and at_own_budget(knobs, threat):
        return TRAINED
    steps = f" by {knobs['pgd_steps']} steps of {knobs['pgd_step_size']:g}" if _short(knobs) else ""
    doubt = "" if arrived else ", not converged" if known else ", convergence not known"
    budget = f"{knobs['attack']} {knobs['norm']} eps {spoken_eps(knobs['eps'])}{steps}"
    return f"{ADVERSARIAL}, {budget}, {counted(len(curve), 'epoch')}{doubt}"


def ranked(fits: Mapping[str, Mapping[str, Any]], threat: ThreatModel, classes: int) -> list[tuple[str, str]]:
    """Return the key and the name of fits of adversarial training, the best baseline first.

    That is one at the study's own norm and eps that has converged, then one at these, each with the best last score.

    Args:
        fits: what the store holds about each, by its key.
    """
    named = [(key, name_of(about, threat, classes), about) for key, about in fits.items()]
    named.sort(
        key=lambda fit: (fit[1] != TRAINED, not at_own_budget(fit[2]["knobs"], threat), -fit[2]["curve"][-1]["cheap"])
    )
    return [(key, name) for key, name, _ in named]


def at_own_budget(knobs: Mapping[str, Scalar], threat: ThreatModel) -> bool:
    """Return whether a fit was trained against PGD at the norm and eps of a threat model, with steps that span eps."""
    alike = knobs["attack"] == "pgd" and knobs["norm"] == threat.norm and not _short(knobs)
    return alike and math.isclose(float(knobs["eps"]), threat.eps, rel_tol=1e-6)


def converged(curve: Sequence[Metrics], classes: int) -> bool:
    """Return whether further epochs are unlikely to make a fit of adversarial training more robust.

    It has `LEAST_EPOCHS` or more; the best quick score of their last third is at most `GAIN` above the best before; and
    the loss is below that of chance: a fit that learns nothing has a flat curve, too.
    """
    scores = [metrics["cheap"] for metrics in curve]
    late = len(scores) - len(scores) // 3
    return (
        len(scores) >= LEAST_EPOCHS
        and max(scores[late:]) <= max(scores[:late]) + GAIN
        and curve[-1]["loss"] <= LEARNT * math.log(classes)
    )


def _scored_under(about: Mapping[str, Any], threat: ThreatModel) -> bool:
    """Return whether the quick scores are of one kind, at the norm and eps of a threat model."""
    return about["rungs"] != "several" and about.get("threat") in (
        str(threat),
        str(replace(threat, knowledge="white-box")),
    )


def _short(knobs: Mapping[str, Scalar]) -> bool:
    """Return whether all steps together are shorter than eps, so that most of the ball is out of reach."""
    reach = int(knobs["pgd_steps"]) * float(knobs["pgd_step_size"])
    return knobs["attack"] == "pgd" and reach < float(knobs["eps"]) * (1 - 1e-6)
