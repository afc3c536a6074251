"""Runs the attack of one cell of a paper's table; its verdict counts as the papers do.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from functools import reduce
from operator import and_
from typing import cast

import torch
from torch import nn

from attacks.algorithms.mixture import fool
from attacks.black_box import BlackBoxAttacker
from attacks.catalog import ATTACKS
from attacks.evaluation import look, observe
from attacks.gradient_view import BATCH, View, limits, stochastic
from attacks.seeding import Draws
from attacks.suites import Suite
from attacks.threat import ThreatModel
from attacks.verdicts import Verdict
from defenses.base import Defended
from search.data import splits
from search.reproduce.cell_setting import Setting
from search.trial.runner import TrialRunner

DRAWS = 2
"""Noise draws per white-box gradient of a stochastic defense."""


class NotRun(Exception):
    """Raised if a cell cannot be run on this machine; the message is one line."""


def threat(setting: Setting) -> ThreatModel:
    """Return the threat model; its eps is 0 for an attack without a bound."""
    return ThreatModel(setting.norm, setting.eps or 0.0, setting.knowledge)


def attacked(runner: TrialRunner, target: nn.Module, setting: Setting, rounds: int) -> Verdict:
    """Return the verdict on only the attacked images; white-box, the worst over the gradient sources per image.

    Where the setting names one gradient source, that attack's images alone count, as in the paper.

    Args:
        target: the bare classifier or the defended one.
        rounds: number of rounds in which a black-box attacker doubles its training images.
    """
    assets, seed = runner.assets, runner.study.seed
    x_NCHW, y_N = assets.evaluator.x_NCHW, assets.evaluator.y_N
    if setting.attack is None:
        with assets.device_lock.working():
            return Verdict.of(look(target, x_NCHW, y_N, seed), limits(target))
    if setting.every_target:
        return _each_target(runner, target, setting)
    attack, knowledge, blind = ATTACKS[setting.attack], setting.knowledge, {}
    if setting.gradient is not None:
        with assets.device_lock.working():
            view = View(target, setting.gradient, DRAWS if stochastic(target) else 1)
            made_NCHW = attack.craft(view, x_NCHW, y_N, threat(setting), seed)
            return Verdict.of(look(target, made_NCHW, y_N, seed), limits(target))
    if knowledge == "oblivious":
        blind = {attack.name: assets.adversarial(attack, x_NCHW, y_N, threat(setting))}
    blind_attacks = () if knowledge == "white-box" else (attack,)
    suite = Suite(name="", oblivious=blind_attacks, white_box=(attack,), draws=DRAWS)
    attacker = _attacker(runner, setting, rounds) if knowledge == "black-box" else None
    with assets.device_lock.working():
        found = observe(suite, target, x_NCHW, y_N, threat(setting), oblivious=blind, attacker=attacker, seed=seed)
    seen = {"oblivious": found.oblivious, "black-box": found.black_box, "white-box": found.white_box}[knowledge]
    return reduce(and_, (Verdict.of(one, found.limits_S) for one in (seen or {}).values()))


def reclassified(runner: TrialRunner, target: nn.Module, setting: Setting) -> Verdict:
    """Return the verdict after reclassification of the images that were rejected before, regardless of thresholds.

    Raises:
        NotRun: no image was rejected.

    Source: GMVAE, section 3.5: without fooling images, nothing is rejected again.
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


def fooled(runner: TrialRunner, target: nn.Module, setting: Setting) -> Verdict:
    """Return the verdict on fooling images, as many for each class as images are attacked; right: accepted as it.

    Source: GMVAE, section 4, Eq. 11.
    """
    assets, seed = runner.assets, runner.study.seed
    images, shape = assets.resolved.eval_images, assets.resolved.task.shape
    aim_N = torch.arange(shape.classes, device=assets.device).repeat_interleave(images)
    draws = Draws(seed, torch.arange(len(aim_N), device=assets.device))
    with assets.device_lock.working():
        made_NCHW = fool(View(target), aim_N, (shape.channels, shape.height, shape.width), draws)
        return Verdict.of(look(target, made_NCHW, aim_N, seed), limits(target))


def _each_target(runner: TrialRunner, target: nn.Module, setting: Setting) -> Verdict:
    """Return the verdicts under an attack that aims at each wrong class in turn, one after another.

    Source: GMVAE, section 4: "by setting each of the 9 other classes as the target class".
    """
    assets, seed = runner.assets, runner.study.seed
    x_NCHW, y_N = assets.evaluator.x_NCHW, assets.evaluator.y_N
    attack, classes = ATTACKS[str(setting.attack)], assets.resolved.task.shape.classes
    strike = attack.family(View(target, setting.gradient or "exact"), **attack.options(threat(setting)))
    strike.set_mode_targeted_by_label(quiet=True)
    verdicts = []
    with assets.device_lock.working():
        for further in range(1, classes):
            made = [
                strike(x, (y + further) % classes) for x, y in zip(x_NCHW.split(BATCH), y_N.split(BATCH), strict=True)
            ]
            verdicts.append(Verdict.of(look(target, torch.cat(made), y_N, seed), limits(target)))
    return Verdict(torch.cat([v.right for v in verdicts], 1), torch.cat([v.wrong for v in verdicts], 1))


def _attacker(runner: TrialRunner, setting: Setting, rounds: int) -> BlackBoxAttacker:
    """Return the black-box attacker, whose substitute is trained on the answers of the oracle."""
    assets, resolved = runner.assets, runner.study.resolved
    held_out_NCHW = splits.load_held_out(resolved.task.dataset, runner.study.data_dir).to(assets.device)
    substitute = setting.substitute or resolved.protected
    return BlackBoxAttacker(
        held_out_NCHW,
        lambda: resolved.task.build(substitute),
        rounds=rounds,
        asked=assets.target if setting.oracle == "bare" else None,
    )
