"""Attacks that were replaced, or what they compute with, are seen; nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attacks.algorithms.pgd
import attacks.audit.audit
import attacks.audit.gate
from attacks.attack import Attack
from attacks.audit.audit import audit
from attacks.audit.unpatched import unpatched
from attacks.threat import ThreatModel

CRAFT = Attack.craft
WHITE = ThreatModel("Linf", 0.1, "white-box")


def gently(
    attack: Attack, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int, **how: Any
) -> Tensor:
    """Attack as everybody may see it, at a tenth of the eps."""
    return CRAFT(attack, model, x, y, ThreatModel(threat.norm, threat.eps / 10, threat.knowledge), seed, **how)


def test_nothing_is_replaced_here() -> None:
    assert unpatched().passed, unpatched().law


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (Attack, "craft", gently),
        (attacks.audit.gate, "SLACK", 1.0),
        (attacks.audit.audit, "observe", lambda *given, **more: None),
        (attacks.algorithms.pgd.PGD, "_start", property(lambda self: None)),
        (torch, "where", lambda *given: given[1]),
        (torch.autograd, "grad", lambda *given, **more: (None,)),
    ],
)
def test_what_is_replaced_is_named(owner: Any, name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, value)
    found = unpatched()
    monkeypatch.undo()
    assert not found.passed and found.figure == 1 and name in found.law


def test_an_audit_by_weaker_attacks_is_no_audit(
    digits: tuple[Tensor, Tensor], classifier: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left 89 of 100 images where 48 are left."""
    monkeypatch.setattr(Attack, "craft", gently)
    found = audit(classifier, digits[0][1400:1450], digits[1][1400:1450], WHITE, seed=1)
    assert "unpatched" in {gate.name for gate in found.gates if not gate.passed}
