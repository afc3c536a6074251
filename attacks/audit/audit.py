"""The audit: checks that a winner must pass before its robustness is trusted. Each is a gate with figure and limit.

Source: the check numbers are those of docs/honest-numbers.md; Carlini et al., On Evaluating Adversarial Robustness,
2019; Athalye et al., Obfuscated Gradients, 2018; Croce and Hein, AutoAttack, 2020; Zimmermann et al., Increasing
Confidence in Adversarial Robustness Evaluations, 2022. Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from attacks.audit.consistency import batch_size, copied, regular_gate, regularly, replayed
from attacks.audit.gate import SLACK, Gate, at_most, broken
from attacks.audit.probes import PROBES, Probe
from attacks.audit.quick_gates import noise_gate, noisy, quick_gates
from attacks.audit.unpatched import unpatched
from attacks.audit.usage import as_used
from attacks.black_box import BlackBoxAttacker
from attacks.catalog import APGD_DLR_50, PGD_40, PGD_80
from attacks.evaluation import check, evaluate, observe, untouched
from attacks.gradient_view import bare, gradients, limits, openings, stochastic
from attacks.suites import SUITES, Suite, craft_oblivious
from attacks.threat import ThreatModel
from attacks.verdicts import Observation, Robustness, Seen, Verdict, disagreement

TWICE = Suite(
    name="convergence",
    oblivious=(),
    white_box=(PGD_80,),
    draws=2 * SUITES["audit"].draws,
    looks=SUITES["audit"].looks,
)
KEPT = PGD_40.name, APGD_DLR_50.name
"""Attacks whose images are kept, to be asked about again."""
GAP = 0.15
"""Largest accuracy gain of fresh noise over noise that the attacker knows."""
DISAGREE = 0.1
"""Largest rate at which two draws of a defense's noise may disagree on a clean image."""


@dataclass(frozen=True)
class Audit:
    """The gates, and the verdicts under the strongest attacks run, white-box ones included under any threat model.

    Args:
        baselines: verdicts of the same suite on the baseline models.
        versions: clean images and adversarial ones, by `clean` or `knowledge/attack`: whole batches, N images each.
        right: whether the model accepted each of them and was correct, bool_DN.
    """

    gates: tuple[Gate, ...]
    robustness: Robustness
    baselines: Mapping[str, Robustness]
    versions: Mapping[str, Tensor]
    right: Mapping[str, Tensor]

    @property
    def alarms(self) -> tuple[str, ...]:
        return tuple(gate.alarm for gate in self.gates if not gate.passed)


def audit(
    target: nn.Module,
    x_NCHW: Tensor,
    y_N: Tensor,
    threat: ThreatModel,
    *,
    seed: int,
    attacker: BlackBoxAttacker | None = None,
    baselines: Mapping[str, nn.Module] | None = None,
) -> Audit:
    """Attack a model again, harder than the suite `search` does, and check that the attacks themselves can be trusted.

    Args:
        target: a bare or defended classifier, logits_NK from images in [0, 1].
        seed: different from the search's seed, so that the attacks that select are not those that audit.
        attacker: the black-box attacker; required under the black-box threat model.
        baselines: further models to attack in the same way; the classifier that the target defends is always included.

    Raises:
        InputError: the images, the labels or the model's outputs are invalid.
    """
    suite, images, fresh = SUITES["audit"], (x_NCHW, y_N), copied(target)
    check(target, *images)
    more: dict[str, Any] = {"attacker": attacker, "seed": seed, "white_box": True}
    with untouched(x_NCHW):
        # the baselines' classifier is the same
        more["oblivious"] = craft_oblivious(suite, bare(target), *images, threat, seed)
        seen = observe(suite, target, *images, threat, **more, kept=KEPT)
    found = seen.judge()
    undefended = {} if bare(target) is target else {"undefended": bare(target)}
    beside = {
        name: evaluate(suite, model, *images, threat, **more)
        for name, model in {**undefended, **(baselines or {})}.items()
    }
    again = regularly(target, *images, threat, seen, found.survivors.any(dim=0), seed)
    heavier, lost = _heavier(target, x_NCHW, y_N, threat, _joined(found, again), seed)
    probe = Probe(target, x_NCHW, y_N, replace(threat, knowledge="white-box"), seed)
    versions = {"clean": x_NCHW, **{name: one.x_NCHW for name, one in seen.kept.items() if one.x_NCHW is not None}}
    gates = (
        *quick_gates(target, x_NCHW, y_N, threat, seed=seed),
        noise_gate(noisy(target, *images, threat, seed, len(heavier.clean.right)), heavier, limits(target)),
        *_attack_gates(target, probe, found, heavier, lost),
        *(_baseline(found, beside["undefended"]) for _ in undefended),
        _tailored(target, found),
        regular_gate(found, again),
        *_identity_gates(target, fresh, seen, versions, y_N, seed),
    )
    outputs: dict[str, Seen] = {"clean": seen.clean, **seen.kept}
    right = {name: Verdict.of(one, seen.limits_S).right for name, one in outputs.items()}
    return Audit(gates, heavier, beside, versions, right)


def _joined(found: Robustness, again: Robustness) -> Robustness:
    """Return the verdicts under the images of both; accuracies after each attack of `again` follow in the trail."""
    return replace(
        found,
        oblivious=found.oblivious & again.oblivious,
        black_box=found.black_box,
        white_box=found.strongest & again.strongest,
        trail={**found.trail, **again.trail},
    )


def _attack_gates(
    target: nn.Module, probe: Probe, found: Robustness, heavier: Robustness, lost: float
) -> tuple[Gate, ...]:
    """Return the gates that compare the attacks with others: weaker, blind, longer, transferred ones."""
    standing_DN, law = heavier.survivors, "twice the steps and draws from another start find no more"
    return (
        probe.single_step(standing_DN),
        probe.transfer(found),
        probe.square(heavier),
        probe.estimated(heavier),
        at_most(5, "convergence", law, lost, SLACK, min(2 * PROBES, standing_DN.shape[1])),
        probe.trajectory(standing_DN),
        *probe.budget(),
        _sources(target, found),
        _draws(heavier),
        _randomness(target, heavier),
        probe.planted(),
    )


def _identity_gates(
    target: nn.Module, fresh: nn.Module, seen: Observation, versions: Mapping[str, Tensor], y_N: Tensor, seed: int
) -> tuple[Gate, ...]:
    """Return the gates that ask whether users get what was judged, by what says that it judged."""
    return (
        batch_size(target, {name: versions[name] for name in ("clean", list(versions)[-1])}, y_N, seed),
        as_used(target, versions["clean"], seed),
        replayed(fresh, seen.clean, seen.kept, versions["clean"], y_N, seed),
        unpatched(),
    )


def _heavier(
    target: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, found: Robustness, seed: int
) -> tuple[Robustness, float]:
    """Check 5: attack surviving images again, with twice the steps and draws and another random start.

    Return the updated verdicts, and the newly broken share of the first `2 * PROBES` images, the only ones attacked.
    """
    standing_N = found.survivors.any(dim=0)
    standing_N[2 * PROBES :] = False
    again = evaluate(
        TWICE, target, x_NCHW, y_N, threat, oblivious={}, seed=seed, white_box=True, standing_N=standing_N, start=1
    )
    white_box = found.strongest & again.strongest
    lost, _ = broken(found.survivors[:, : 2 * PROBES], again.survivors[:, : 2 * PROBES])
    trail = {**found.trail, "white-box/pgd-80 (all)": white_box.accuracy}
    return replace(found, white_box=white_box, trail=trail), lost


def _sources(target: nn.Module, found: Robustness) -> Gate:
    """Check 7: the verdict is the worst over all gradient sources."""
    untried = sum(f"white-box/{PGD_40.name} ({source})" not in found.trail for source in gradients(target))
    return at_most(7, "sources", "every gradient source was tried, and the worst kept of each image", untried, 0.0)


def _draws(found: Robustness) -> Gate:
    """Check 8: two draws of the noise agree on a clean image."""
    law, differ = "two draws of the noise seldom disagree on a clean image", disagreement(found.clean.right)
    return at_most(8, "draws", law, differ, DISAGREE, found.clean.right.shape[1])


def _randomness(target: nn.Module, heavier: Robustness) -> Gate:
    """Check 8: noise unknown to the attacker gives little more accuracy than known noise."""
    if not stochastic(target) or heavier.known is None:
        return at_most(8, "randomness", "the defense draws no noise", 0.0, GAP)
    saved, images = heavier.strongest.accuracy - heavier.known.accuracy, heavier.known.right.shape[1]
    return at_most(8, "randomness", "noise that the attacker does not know saves few", saved, GAP, images)


def _baseline(found: Robustness, undefended: Robustness) -> Gate:
    """Check 10: with the same attack budget, the defense errs on fewer images than the classifier that it defends."""
    more = found.attacked.error - undefended.attacked.error
    return at_most(10, "baseline", "it errs on fewer attacked images than the undefended classifier", more, -SLACK)


def _tailored(target: nn.Module, found: Robustness) -> Gate:
    """Check 11: an adaptive attack was run for each attack surface of the defense."""
    ran = {name.partition("/")[2] for name in found.trail}
    aimed = {attack.aims for attack in SUITES["audit"].white_box if attack.aims and any(attack.name in r for r in ran)}
    return at_most(11, "tailored", "attacks made for this defense were run", len(set(openings(target)) - aimed), 0.0)
