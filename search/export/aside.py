"""Compares a winner's accuracy on the images that it was judged by with that on images that its search never judged.

A defense that stored the judged images, or was fitted to them, does worse on the others. Shapes: N images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from scipy.stats import fisher_exact
from torch import Tensor

from attacks.audit.gate import Gate, at_most
from attacks.suites import craft_oblivious
from attacks.verdicts import Robustness, Verdict
from defenses.base import Defended, Defense
from search.data import splits
from search.study.candidate import Candidate
from search.trial.evaluator import Evaluator
from search.trial.runner import TrialRunner

SURE = 0.9999
"""How sure a gap must be for an alarm: the best of many does a little better on the images that chose it."""


@dataclass(frozen=True)
class Aside:
    """The figures on the images kept aside, and the gate.

    Args:
        images: their number.
        attacked_accuracy: under the search's attacks; white-box where the threat model is black-box.
    """

    gate: Gate
    images: int
    clean_accuracy: float
    attacked_accuracy: float

    def figures(self) -> dict[str, float | int]:
        """Return them as the field `aside` of evidence.json."""
        return {
            "images": self.images,
            "clean_accuracy": self.clean_accuracy,
            "attacked_accuracy": self.attacked_accuracy,
        }


def compare(runner: TrialRunner, candidate: Candidate, defense: Defense, again: Robustness) -> Aside:
    """Attack a winner on the validation images kept aside, as its search did on others, and compare.

    Args:
        again: the result of the search's attacks on the images that it judged by.
    """
    assets, limits_S = runner.assets, defense.at(candidate.params.inference).limits()
    resolved, bare, seed = assets.resolved, assets.target, runner.study.seed
    apart = splits.load_aside(resolved.task.dataset, runner.study.data_dir)
    few = len(assets.evaluator.y_N)  # more images than it was judged by would cost more than they tell
    x_NCHW, y_N = (t[:few].to(assets.device) for t in apart)
    threat = resolved.threat
    if threat.knowledge == "black-box":  # another substitute would cost as much as the whole audit
        threat = replace(threat, knowledge="white-box")
    aimed = Defended(defense.at(runner.scorer.aimed(candidate.params).inference), bare)
    with assets.device_lock.working():
        blind = craft_oblivious(resolved.suite, bare, x_NCHW, y_N, threat, seed)
        evaluator = Evaluator(resolved.suite, threat, x_NCHW, y_N, blind, seed)
        aside = evaluator.observe(aimed).judge(limits_S)
    defense.at(candidate.params.inference)
    return Aside(gap(replace(again, threat=threat), aside), len(y_N), aside.clean.accuracy, aside.attacked.accuracy)


def gap(judged: Robustness, aside: Robustness) -> Gate:
    """Check 12: on images that a search never judged, a winner is as often right, and as seldom wrong, beyond chance.

    The figure is how sure the largest gap is, by Fisher's exact test: 1 minus the chance of such a gap, or a larger
    one, where both sets of images are alike.
    """
    sure = max(
        _sure(share(one), share(other))
        for one, other in ((judged.clean, aside.clean), (judged.attacked, aside.attacked))
        for share in (_right, _not_wrong)
    )
    images = aside.clean.right.shape[1]
    law = (
        f"it does as well on {images} images that the search never judged, beyond chance (clean "
        f"{100 * judged.clean.accuracy:.1f} % judged, {100 * aside.clean.accuracy:.1f} % never; attacked "
        f"{100 * judged.attacked.accuracy:.1f} %, {100 * aside.attacked.accuracy:.1f} %)"
    )
    return at_most(12, "aside", law, sure, SURE, images)


def _right(verdict: Verdict) -> Tensor:
    return verdict.right


def _not_wrong(verdict: Verdict) -> Tensor:
    return ~verdict.wrong


def _sure(judged_DN: Tensor, aside_DN: Tensor) -> float:
    """Return 1 minus the one-sided p of Fisher's exact test. Noise is averaged over its draws, and then rounded."""
    rows = [(round(float(good.double().mean(dim=0).sum())), good.shape[1]) for good in (judged_DN, aside_DN)]
    return 1.0 - float(fisher_exact([[good, images - good] for good, images in rows], alternative="greater").pvalue)
