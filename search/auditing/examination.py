"""The measurement of an audit: attacks, checks, confirmation by a model that is built anew, latency of a purifier.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from attacks.attack import AttackError
from attacks.audit.audit import Audit
from attacks.audit.audit import audit as audit_model
from attacks.black_box import BlackBoxAttacker
from attacks.evaluation import check, evaluate, untouched
from attacks.gradient_view import bare
from attacks.seeding import evaluating
from attacks.suites import SUITES
from attacks.threat import ThreatModel
from attacks.verdicts import Robustness
from defenses.base import Defended
from search.auditing.evidence import evidence
from search.auditing.protocol import Classifier, adapted
from search.exceptions import TrialError
from search.export.attack_progress import AttackProgress, audit_passes, standing, suite_passes
from search.export.confirm import confirmed_by
from search.formatting import spoken_threat
from search.study.candidate import Images as KindOfImages
from search.study.candidate import Latency
from search.trial.device_lock import DeviceLock
from search.trial.latency import measure
from search.trial.precision import tensor_float32
from spaces.exceptions import InputError, choose


@dataclass(frozen=True)
class Examination:
    """What is done to a model.

    Args:
        threat: norm, eps and knowledge of the attacker.
        suite: further attacks, whose verdicts count too; None: none.
        seed: of random starts, targets and noise.
        attacker: the black-box attacker; required under that threat model.

    Raises:
        InputError: eps is 0, there is no such suite, it has no attack in the norm, or the attacker is missing.
    """

    threat: ThreatModel
    suite: str | None = None
    seed: int = 1
    attacker: BlackBoxAttacker | None = None

    def __post_init__(self) -> None:
        if self.threat.eps <= 0:
            raise InputError(f"eps must be above 0, but is {self.threat.eps:g}")
        if self.suite is not None:
            within = SUITES[choose("the suite", self.suite, list(SUITES))].within(self.threat)
            if not (within.oblivious or within.white_box):
                raise InputError(f"the suite {self.suite} has no attack in {self.threat.norm}")

    def evidence(
        self,
        model: nn.Module,
        x_NCHW: Tensor,
        y_N: Tensor,
        about: Mapping[str, Any],
        console: Console,
        *,
        classes: int | None = None,
        anew: tuple[str, str] | None = None,
    ) -> dict[str, Any]:
        """Return the evidence of a model.

        Args:
            about: the fields of the evidence that do not follow from the measurement.
            classes: number of classes of the data, if known.
            anew: the module that builds the model in a new process, and its argument; None: it cannot be built anew.

        Raises:
            InputError: the model does not answer such images with logits, or cannot be attacked.
        """
        tensor_float32(False)
        with untouched(x_NCHW):
            target, lock = adapted(model, x_NCHW, y_N, classes), DeviceLock(x_NCHW.device)
            check(target, x_NCHW, y_N)
        if self.threat.knowledge == "black-box" and self.attacker is None:
            raise InputError("the black-box threat model needs an attacker (attacks.black_box.BlackBoxAttacker)")
        doing = f"auditing {about['model']['name']} on {len(y_N)} images, {spoken_threat(self.threat)}"
        progress = AttackProgress(console, doing, Classifier)
        try:
            with evaluating(model), progress.running():
                with lock.working("audited"):
                    stand = standing(target, x_NCHW, y_N, self.threat, self.seed)
                    more = suite_passes(self.suite, target, stand) if self.suite not in (None, "audit") else 0.0
                    progress.expected = len(y_N) * (audit_passes(target, stand) + more)
                    found = audit_model(target, x_NCHW, y_N, self.threat, seed=self.seed, attacker=self.attacker)
                    further = self._further(target, x_NCHW, y_N)
                    how: Any = {"versions": found.versions, "right": found.right, "y_N": y_N, "seed": self.seed}
                    confirmed = confirmed_by(anew, **how)[:1] if anew else ()
                latency = _latency(target, found, lock)
        except (AttackError, TrialError) as error:
            raise InputError(f"a model must be one that can be attacked, but: {error}") from None
        return evidence(target, x_NCHW, self.threat, found, further, confirmed, latency, about)

    def _further(self, target: Defended, x_NCHW: Tensor, y_N: Tensor) -> dict[str, Robustness]:
        """Return the results of the further suite, by its name; none if it is the audit's own."""
        if self.suite is None or self.suite == "audit":
            return {}
        suite = replace(SUITES[self.suite], looks=SUITES["audit"].looks)
        how: dict[str, Any] = {"attacker": self.attacker, "seed": self.seed, "white_box": True}
        return {self.suite: evaluate(suite, target, x_NCHW, y_N, self.threat, **how)}


class Purifying(Defended):
    """The purifier of a model alone, before nothing."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.defense.purify(x_NCHW)


def _latency(target: Defended, found: Audit, lock: DeviceLock) -> Latency | None:
    """Return the latency of purifier and detector; None for a model that has neither.

    A model's own `classify` may take longer alone than behind its purifier: so that is timed alone as well.
    """
    if bare(target) is target:
        return None
    images: dict[KindOfImages, Tensor] = {
        "clean": found.versions["clean"],
        "attacked": list(found.versions.values())[-1],
    }
    timed = [measure(target, images, lock)]
    if "bpda" in target.defense.gradients:
        timed.append(measure(Purifying(target.defense, nn.Identity()), images, lock))
    return max(timed, key=lambda latency: latency.ms_p50)
