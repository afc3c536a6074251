"""Defenses, attacks, audit, latency and classifiers on a device that is not the CPU, where a stray CPU tensor raises.

The device computes with the CPU's own kernels, so what draws no noise must say the same there, to a digit or two.
`test_another_device.py` runs this file in a process of its own, since torch's autograd must not have run before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import attacks.catalog
import defenses
import spaces
from attacks.attack import Attack
from attacks.audit.audit import audit
from attacks.black_box import BlackBoxAttacker
from attacks.evaluation import evaluate
from attacks.gradient_view import View
from attacks.suites import SUITES
from attacks.threat import ThreatModel
from defenses import diffusion
from defenses.base import Batches, Defended, Defense, Shape
from search.classifiers.training import train
from search.trial.device_lock import DeviceLock
from search.trial.latency import measure
from search.trial.precision import Networks
from spaces.domain import Scalar
from spaces.space import SearchSpace
from tests.support.another_device import Away, another_device, register

register()
DIGITS = Shape(1, 8, 8, 10)
WHITE = ThreatModel("Linf", 0.1, "white-box")
ATTACKS = sorted({a.name: a for a in vars(attacks.catalog).values() if isinstance(a, Attack)}.items())
Digits = tuple[Tensor, Tensor]


@pytest.fixture
def there() -> Iterator[torch.device]:
    with another_device() as device:
        yield device


def moved(digits: Digits, first: int, last: int, device: torch.device) -> Digits:
    return digits[0][first:last].to(device), digits[1][first:last].to(device)


def built(name: str, classifier: nn.Module, **train: Scalar) -> Defense:
    kind = defenses.find(name)
    space = SearchSpace.of(kind).narrow(spaces.named(name, "smoke") if spaces.names(name) else {})
    params = space.setting(space.usual_of)
    torch.manual_seed(0)
    defense = kind({**params.train, **train}, params.inference, DIGITS)
    defense.adopt(copy.deepcopy(classifier))
    return defense


def test_a_stray_tensor_of_the_cpu_raises(there: torch.device) -> None:
    with pytest.raises(RuntimeError, match="all tensors must be on one device"):
        torch.rand(3).to(there) + torch.rand(3)
    with pytest.raises(TypeError, match="copy it to the CPU first"):
        torch.rand(3).to(there).numpy()


def test_a_classifier_is_trained(there: torch.device, digits: Digits) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).to(there)
    assert train(network, *moved(digits, 0, 400, there), epochs=8, seed=0) > 0.5
    assert {parameter.device.type for parameter in network.parameters()} == {there.type}


@pytest.mark.parametrize("name", defenses.names())
def test_a_defense_is_fitted_and_purifies(
    there: torch.device, name: str, digits: Digits, classifier: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusion, "checkpoint", lambda step, *args, **how: step(*args))
    one = {"epochs": 1} if "epochs" in SearchSpace.of(defenses.find(name)).train else {}
    here, target = built(name, classifier, **one), copy.deepcopy(classifier).to(there)
    away = copy.deepcopy(here).to(there)
    bases = nn.ModuleList([copy.deepcopy(target) for _ in here.bases()])
    batches = Batches(*moved(digits, 0, 96, there), epochs=1, batch_size=32)
    for metrics in Networks("float32", there, away, bases, target).epochs(
        away.fit(batches, bases if len(bases) else target)
    ):
        assert all(torch.tensor(list(metrics.values())).isfinite())
    here.load_state_dict({key: weight.cpu() for key, weight in away.state_dict().items()})
    pairs = (here, classifier), (away, target)
    models = [Defended(defense.eval().requires_grad_(False), network) for defense, network in pairs]
    with torch.no_grad():
        x_NCHW, y_N = moved(digits, 1400, 1416, there)
        purified = models[1].defense.purify(x_NCHW)
        assert isinstance(purified, Away) and isinstance(models[1].accept(x_NCHW), Away)
        if not here.stochastic and here.descends is None:
            apart = models[0](x_NCHW.cpu()) - models[1](x_NCHW).cpu()
            assert float(apart.abs().max()) < 1e-3
    if name == "defense_gan":
        return  # its surrogate is made of transforms of torch.func, which this device cannot follow
    found = evaluate(SUITES["quick"], models[1], x_NCHW, y_N, WHITE)
    assert 0 <= found.attacked.accuracy <= found.clean.accuracy <= 1


@pytest.mark.parametrize(("name", "attack"), ATTACKS, ids=[name for name, _ in ATTACKS])
def test_an_attack_finds_the_same_images(
    there: torch.device, name: str, attack: Attack, digits: Digits, classifier: nn.Module
) -> None:
    if attack.aims is not None:
        pytest.skip("it attacks a defense of its own kind, which the suites of the defenses above run")
    x_NCHW, y_N = digits[0][1400:1404], digits[1][1400:1404]
    few = {name: min(value, 40) if name == "queries" else value for name, value in attack.settings}
    attack = replace(attack, steps=attack.steps and min(attack.steps, 10), settings=tuple(few.items()))
    here = attack.craft(View(classifier), x_NCHW, y_N, WHITE, 0)
    away = attack.craft(View(copy.deepcopy(classifier).to(there)), x_NCHW.to(there), y_N.to(there), WHITE, 0)
    assert isinstance(away, Away) and torch.allclose(here, away.cpu(), atol=1e-4)


def test_the_audit_finds_the_same(there: torch.device, digits: Digits, classifier: nn.Module) -> None:
    x_NCHW, y_N = digits[0][1400:1432], digits[1][1400:1432]
    here = audit(classifier, x_NCHW, y_N, WHITE, seed=1)
    away = audit(copy.deepcopy(classifier).to(there), x_NCHW.to(there), y_N.to(there), WHITE, seed=1)
    assert [gate.name for gate in here.gates if not gate.passed] == [g.name for g in away.gates if not g.passed]
    assert here.robustness.trail == pytest.approx(away.robustness.trail, abs=0.04)


def test_latency_is_measured(there: torch.device, digits: Digits, classifier: nn.Module, own_lane: None) -> None:
    model = Defended(built("magnet", classifier).to(there), copy.deepcopy(classifier).to(there)).eval()
    x_NCHW, _ = moved(digits, 1400, 1432, there)
    found = measure(model, {"clean": x_NCHW, "attacked": x_NCHW}, DeviceLock(there))
    assert found.ms_p50 >= 0 and found.single_ms_p50 >= 0


def test_a_black_box_attacker_trains_a_substitute(there: torch.device, digits: Digits, classifier: nn.Module) -> None:
    def substitute() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).to(there)

    attacker = BlackBoxAttacker(digits[0][:40].to(there), substitute)
    threat = ThreatModel("Linf", 0.1, "black-box")
    found, queries = attacker.craft(
        SUITES["quick"], copy.deepcopy(classifier).to(there), *moved(digits, 1400, 1416, there), threat, 0
    )
    assert queries > 0 and all(isinstance(x_NCHW, Away) for x_NCHW in found.values())
