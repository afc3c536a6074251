"""What is left of the images that one cell of a paper's table attacks, counted as the papers count.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from functools import reduce
from operator import and_
from typing import cast

import torch
from torch import Tensor, nn

from attacks.attack import BATCH
from attacks.black_box import STEP, train_substitute
from attacks.catalog import ATTACKS
from attacks.evaluation import look, observe
from attacks.gradient_view import View, limits
from attacks.suites import Suite
from attacks.threat import ThreatModel
from attacks.verdicts import Verdict
from defenses.base import Defended
from search.classifiers.architectures import ARCHITECTURES
from search.data import splits
from search.reproduce.cell_setting import Setting
from search.trial.runner import TrialRunner

DRAWS = 2
"""Of a stochastic defense's noise in a white-box gradient."""


class NotRun(Exception):
    """A cell cannot be found here, and says why in one line."""


def threat(setting: Setting) -> ThreatModel:
    """Return the threat model; an attack that keeps to no eps has one of 0."""
    return ThreatModel(setting.norm, setting.eps or 0.0, setting.knowledge)


def struck(runner: TrialRunner, target: nn.Module, setting: Setting, rounds: int) -> Verdict:
    """Return the verdict on the attacked images alone; white-box, the worst of the gradient sources for each image.

    Args:
        target: bare or defended.
        rounds: in which a black-box attacker doubles its images.
    """
    (x_NCHW, y_N), seed = (runner.assets.evaluator.x_NCHW, runner.assets.evaluator.y_N), runner.study.seed
    if setting.attack is not None and setting.knowledge == "white-box":
        suite = Suite(name="", oblivious=(), white_box=(ATTACKS[setting.attack],), draws=DRAWS)
        with runner.assets.device_lock.working():
            found = observe(suite, target, x_NCHW, y_N, threat(setting), oblivious={}, seed=seed)
        return reduce(and_, (Verdict.of(seen, found.limits_S) for seen in (found.white_box or {}).values()))
    if setting.attack is not None and setting.knowledge == "oblivious":
        x_NCHW = runner.assets.adversarial(ATTACKS[setting.attack], x_NCHW, y_N, threat(setting))
    with runner.assets.device_lock.working():
        if setting.attack is not None and setting.knowledge == "black-box":
            x_NCHW = _outside(runner, target, setting, rounds)
        return Verdict.of(look(target, x_NCHW, y_N, seed), limits(target))


def searched(runner: TrialRunner, target: nn.Module, setting: Setting) -> Verdict:
    """Return the verdict, whatever the thresholds say then, on the images that were rejected before the search.

    Raises:
        NotRun: none was.

    Source: GMVAE, section 3.5: where no fooling images are expected, nothing is rejected again.
    """
    defense, seed = cast(Defended, target).defense, runner.study.seed
    searching, (x_NCHW, y_N) = defense.params.inference, (runner.assets.evaluator.x_NCHW, runner.assets.evaluator.y_N)
    with runner.assets.device_lock.working():
        defense.at({**searching, "reclassify": False})
        if setting.attack is not None:
            x_NCHW = ATTACKS[setting.attack].craft(View(target), x_NCHW, y_N, threat(setting), seed)
        with torch.no_grad():
            rejected_N = ~torch.cat([defense.accept(part) for part in x_NCHW.split(BATCH)])
        defense.at(searching)
        if not rejected_N.any():
            raise NotRun("no image was rejected, so none was searched")
        right = look(target, x_NCHW[rejected_N], y_N[rejected_N], seed).right
    return Verdict(right, ~right)


def _outside(runner: TrialRunner, target: nn.Module, setting: Setting, rounds: int) -> Tensor:
    """Return the images that an attack makes of a substitute, trained on what its oracle answers."""
    assert setting.attack is not None
    x_NCHW, y_N, seed = runner.assets.evaluator.x_NCHW, runner.assets.evaluator.y_N, runner.study.seed
    architecture = ARCHITECTURES[setting.substitute or runner.assets.resolved.protected]
    substitute = train_substitute(
        runner.assets.target if setting.oracle == "bare" else target,
        splits.load_held_out(runner.assets.resolved.task.dataset, runner.study.data_dir).to(x_NCHW),
        lambda: architecture.build(runner.assets.resolved.task.shape),
        rounds=rounds,
        step=-STEP,
        seed=seed,
    )
    return ATTACKS[setting.attack].craft(View(substitute.network), x_NCHW, y_N, threat(setting), seed)
