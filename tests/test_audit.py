"""The audit's gates: each alarm is raised by what it is for, and an honest model raises none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attacks.audit import audit, quick_gates
from attacks.threat import ThreatModel
from attacks.view import Gradient
from tests.test_attacks import Digits, Guard, Smooth

WHITE = ThreatModel("Linf", 0.1, "white-box")


class Detached(nn.Module):
    """A model whose gradient is zero everywhere."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x.detach())
        return logits + 0 * x.flatten(1).sum(1, keepdim=True)


class Secretive(Smooth):
    """A purifier that draws noise and does not say so."""

    @property
    def stochastic(self) -> bool:
        return False


def alarms(target: nn.Module, digits: Digits) -> set[str]:
    gates = quick_gates(target.eval(), digits[0][1400:], digits[1][1400:], seed=0)
    return {gate.name for gate in gates if not gate.passed}


def test_an_honest_classifier_raises_no_quick_alarm(digits: Digits, classifier: nn.Module) -> None:
    assert alarms(classifier, digits) == set()
    assert alarms(Guard(Smooth(noise=0.1), classifier), digits) == set()


@pytest.mark.parametrize("gate", ["logits", "gradient", "determinism"])
def test_a_quick_gate_catches_what_it_is_for(gate: str, digits: Digits, classifier: nn.Module) -> None:
    culprits = {
        "logits": nn.Sequential(classifier, nn.Softmax(dim=1)),
        "gradient": Detached(classifier),
        "determinism": Guard(Secretive(noise=0.1), classifier),
    }
    assert gate in alarms(culprits[gate], digits)


def test_the_audit_passes_an_honest_model_and_is_stronger_than_noise(digits: Digits, classifier: nn.Module) -> None:
    found = audit(classifier, digits[0][1400:1500], digits[1][1400:1500], WHITE, seed=1)
    assert found.alarms == () and len(found.gates) == 6
    assert float(found.robustness.survivors.double().mean()) < 0.8


class Doorman(Smooth):
    """A purifier without a gradient behind a detector that lets nothing pass but clean images."""

    gradients: tuple[Gradient, ...] = ("exact",)

    def purify(self, x: Tensor) -> Tensor:
        return x.detach() + 0 * x

    def suspicion(self, x: Tensor) -> Tensor:
        return ((x * 16).round() - x * 16).abs().flatten(1).amax(1, keepdim=True)

    def limits(self) -> Tensor:
        return torch.tensor([1e-4])


def test_a_detector_does_not_excuse_a_hidden_gradient(digits: Digits, classifier: nn.Module) -> None:
    found = audit(Guard(Doorman(), classifier), digits[0][1400:1500], digits[1][1400:1500], WHITE, seed=1)
    assert found.robustness.attacked.error < 0.2 and found.robustness.clean.rejection == 0
    assert {"gradient", "unbounded"} <= {alarm.partition(":")[0] for alarm in found.alarms}


def test_the_audit_refuses_a_model_that_hides_its_gradient(digits: Digits, classifier: nn.Module) -> None:
    found = audit(Detached(classifier), digits[0][1400:1500], digits[1][1400:1500], WHITE, seed=1)
    names = {alarm.partition(":")[0] for alarm in found.alarms}
    assert {"gradient", "unbounded"} <= names
    assert torch.equal(found.robustness.robust, found.robustness.survivors)
