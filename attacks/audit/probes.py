"""Audit checks that attack a winner again.

Source: see attacks/audit/audit.py. Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from attacks.algorithms.base import project, steepest
from attacks.algorithms.pgd import PGD
from attacks.algorithms.selective_pgd import SelectivePGD
from attacks.attack import Attack
from attacks.audit.gate import SLACK, Gate, at_most, broken
from attacks.catalog import FGSM, NES_30, PGD_10, PGD_20, PGD_40, PGD_80, SQUARE
from attacks.evaluation import observe
from attacks.gradient_view import View, gradients, openings, stochastic
from attacks.seeding import Draws, KnownNoise, evaluating, reproducible, seeded
from attacks.suites import SUITES, Suite
from attacks.threat import ThreatModel
from attacks.verdicts import Observation, Robustness

PROBES = 32
"""Number of images attacked by these checks; doubled where a check must detect a few broken images."""
DRAWS, LOOKS = SUITES["audit"].draws, 5
"""Draws of a stochastic defense's noise, in each gradient and for each verdict of these checks."""
TRANSFERRED = 0.1
"""Largest share of images that transferred examples break and a single white-box attack does not."""
MOVING = 0.05
"""Largest relative increase of the loss in the last quarter of the steps."""
LONGEST = 320
"""Most steps of an attack that goes on until the loss stops rising."""
QUERIES = 1000
"""Queries of Square for each image."""
PLANT = 0.9
"""Position of the planted boundary, as a fraction of the step to a known adversarial neighbour."""


@dataclass(frozen=True)
class Probe:
    """The images that the checks attack again: the first `images`, under the white-box threat model.

    The rest of the batch is kept, so that the defense's noise is the same as in the verdicts compared with.
    """

    target: nn.Module
    x_NCHW: Tensor
    y_N: Tensor
    threat: ThreatModel
    seed: int
    images: int = PROBES

    @property
    def few_N(self) -> Tensor:
        return torch.arange(len(self.y_N), device=self.y_N.device) < self.images

    def _share(self, verdicts_DN: Tensor) -> float:
        return float(verdicts_DN[:, self.few_N].double().mean())

    def _more(self, attack: Attack, standing_DN: Tensor, draws: int = DRAWS) -> tuple[float, float]:
        """Return the share of the images that the attack breaks although they survived, and that by chance."""
        found = self._alone(attack, self.threat, standing_DN.any(dim=0), draws, len(standing_DN)).judge()
        return broken(standing_DN[:, self.few_N], found.survivors[:, self.few_N])

    def _alone(
        self,
        attack: Attack,
        threat: ThreatModel,
        standing_N: Tensor | None = None,
        draws: int = DRAWS,
        looks: int = LOOKS,
    ) -> Observation:
        suite = Suite(name=attack.name, oblivious=(), white_box=(attack,), draws=draws, looks=looks)
        few_N = self.few_N if standing_N is None else self.few_N & standing_N
        return observe(
            suite, self.target, self.x_NCHW, self.y_N, threat, oblivious={}, seed=self.seed, standing_N=few_N
        )

    def _aimed(self, attack: Attack) -> Attack:
        """Return the attack, which ignores detectors, in the form that evades them if the target has any."""
        return replace(attack, family=SelectivePGD) if "rejection" in openings(self.target) else attack

    def single_step(self, standing_DN: Tensor) -> Gate:
        """Check 4: per image, many steps are at least as strong as one."""
        law = "one step breaks nothing that withstood many"
        return at_most(4, "single-step", law, self._more(FGSM, standing_DN)[0], SLACK)

    def square(self, heavier: Robustness) -> Gate:
        """Check 4: a gradient-free search breaks no image that survived the gradient attacks."""
        law = f"Square ({QUERIES} queries) finds nothing that the gradient attacks left"
        rank = "margin" if stochastic(self.target) else "lead"
        return self._blind("square", law, replace(SQUARE, settings=(("queries", QUERIES), ("rank", rank))), heavier)

    def estimated(self, heavier: Robustness) -> Gate:
        """Check 4: a gradient estimated from model outputs breaks no image that survived the model's own gradients."""
        law = "an estimated gradient finds nothing that the model's own gradients left"
        return self._blind("estimated", law, NES_30, heavier)

    def _blind(self, name: str, law: str, attack: Attack, heavier: Robustness) -> Gate:
        """Return the gate of an attack that uses no gradient."""
        more = replace(self, images=2 * PROBES)
        if "rejection" in openings(self.target):
            attack = replace(attack, settings=tuple({**dict(attack.settings), "rank": "evading"}.items()))
        lost, chance = more._more(attack, heavier.survivors, draws=1)
        return at_most(4, name, law, lost, chance, int(more.few_N.sum()))

    def transfer(self, found: Robustness) -> Gate:
        """Check 4: a white-box attack breaks at least what examples transferred from the bare classifier break."""
        fell_DN = found.clean.right & found.oblivious.wrong
        alone = self._alone(self._aimed(PGD_40), self.threat, fell_DN.any(dim=0)).judge()
        missed = self._share(fell_DN[: len(alone.survivors)] & alone.survivors)
        return at_most(4, "transfer", "white-box attacks break what transferred images break", missed, TRANSFERRED)

    def trajectory(self, standing_DN: Tensor) -> Gate:
        """Check 5: the loss of surviving images stops rising, relative to it or, if larger, to a tie's loss.

        Where it still rises, more steps are taken; if they then break images, that counts as well.
        """
        law = f"the loss of what stands stops rising within {LONGEST} steps, and then few more are broken"
        left, attack = (standing_DN.any(dim=0) & self.few_N).nonzero().flatten(), self._aimed(PGD_80)
        rise = self._rise(attack, left) if len(left) else 0.0
        while rise > MOVING and (attack.steps or LONGEST) < LONGEST:
            attack = replace(attack, steps=2 * (attack.steps or LONGEST))
            rise = max(self._rise(attack, left), self._more(attack, standing_DN)[0])
        return at_most(5, "trajectory", law, rise, MOVING, self.images)

    def _rise(self, attack: Attack, left: Tensor) -> float:
        """Return how much the loss of the images `left` rises in the last quarter of the steps; the best gradient's."""
        best_S = []
        for gradient in gradients(self.target):
            view = View(self.target, gradient, DRAWS if stochastic(self.target) else 1)
            climb = attack.family(view, **attack.options(self.threat))
            with reproducible(view, self.seed):
                climb(self.x_NCHW[left], self.y_N[left])
            best_S.append(torch.stack(climb.gains).cummax(dim=0).values)
        best = max(best_S, key=lambda gains: float(gains[-1]))
        return float((best[-1] - best[-1 - len(best) // 4]) / best[-1].clamp(min=math.log(2)))

    def budget(self) -> tuple[Gate, Gate]:
        """Check 6: a larger eps never leaves a higher accuracy, and an unbounded attack leaves at most chance.

        The unbounded attack ignores rejection, since a detector does not justify a masked gradient.
        """
        left = [
            self._at(replace(self.threat, eps=share * self.threat.eps), self._aimed(PGD_10))
            for share in (0.25, 0.5, 1.0)
        ]
        rise = max(after - before for before, after in pairwise(left))
        farthest = 1.0 if self.threat.norm == "Linf" else math.sqrt(self.x_NCHW[0].numel())
        free = self._at(replace(self.threat, eps=farthest), PGD_20, limited=False)
        with torch.no_grad(), reproducible(self.target, self.seed):
            chance = 1 / self.target(self.x_NCHW[:1]).shape[1]
        return (
            at_most(6, "budget", "a larger eps leaves no more", rise, SLACK),
            at_most(6, "unbounded", "an unbounded attack leaves at most chance", free, chance + SLACK),
        )

    def _at(self, threat: ThreatModel, attack: Attack, *, limited: bool = True) -> float:
        """Return the share of images that survive an attack under another bound."""
        seen = self._alone(attack, threat, draws=1, looks=1)
        found = seen.judge(None if limited else torch.full_like(seen.limits_S, torch.inf))
        return self._share(found.survivors)

    def planted(self) -> Gate:
        """Check 9: the attack finds an adversarial neighbour that is known to exist.

        The neighbour x* is a random corner of the ball. The model's logits z are projected on z(x*) - z(x): beyond
        `PLANT` of the value of x* they count as another class. Source: Zimmermann et al. 2022, section 4: a readout of
        the model's own features that has an adversarial example inside the ball.
        """
        law = "attacks find what was planted where an adversarial neighbour is known"
        x_NCHW = self.x_NCHW[self.few_N]
        places_N = torch.arange(len(x_NCHW), device=x_NCHW.device)
        sign_NCHW = Draws(self.seed, places_N).sign(*x_NCHW.shape[1:])
        corner_NCHW = x_NCHW + self.threat.eps * steepest(sign_NCHW, self.threat.norm)
        with seeded(self.seed):
            known = KnownNoise(self.target)
            views = [KnownNoise(View(self.target, gradient)) for gradient in gradients(self.target)]
        with torch.no_grad(), evaluating(self.target):
            z_NK = known(x_NCHW)
            w_NK = known(project(corner_NCHW, x_NCHW, self.threat.eps, self.threat.norm)) - z_NK
        found_N = torch.zeros_like(places_N, dtype=torch.bool)
        for view in views:
            adversarial_NCHW = PGD(_Planted(view, z_NK, w_NK), **PGD_20.options(self.threat))(
                x_NCHW, torch.zeros_like(places_N)
            )
            with torch.no_grad(), evaluating(self.target):
                found_N |= _Planted(known, z_NK, w_NK)(adversarial_NCHW).argmax(1) == 1
        there_N = w_NK.norm(dim=1) > 1e-4
        missed = float((there_N & ~found_N).sum() / there_N.sum().clamp(min=1))
        return at_most(9, "planted", law, missed, SLACK)


class _Planted(nn.Module):
    """Two logits read out of a model's logits: the second is larger beyond `PLANT` of the way from z to z + w."""

    def __init__(self, model: nn.Module, z_NK: Tensor, w_NK: Tensor) -> None:
        super().__init__()
        self.model, self.z_NK, self.w_NK = model, z_NK, w_NK

    def forward(self, x_NCHW: Tensor) -> Tensor:
        way_N = ((self.model(x_NCHW) - self.z_NK) * self.w_NK).sum(1) / self.w_NK.square().sum(1).clamp(min=1e-12)
        return torch.stack((torch.full_like(way_N, PLANT), way_N), dim=1)
