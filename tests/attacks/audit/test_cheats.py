"""Defenses built against the audit: each raises its own alarm, and no attack asks where no image lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from attacks.attack import Attack
from attacks.audit.audit import audit
from attacks.audit.quick_gates import quick_gates
from attacks.catalog import ATTACKS
from attacks.evaluation import look
from attacks.gradient_view import View, within_spread
from attacks.threat import ThreatModel
from benchmarks.broken import Member
from benchmarks.cheats import CHEATS, Overwriting
from defenses.base import Defended
from spaces.exceptions import InputError

WHITE = ThreatModel("Linf", 0.1, "white-box")
Digits = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def made(digits: Digits, classifier: nn.Module) -> Callable[[str], Defended]:
    """Return a cheat by its name, made once."""
    found: dict[str, Defended] = {}

    def cheat(name: str) -> Defended:
        if name not in found:
            found[name] = CHEATS[name].before(classifier, digits[0][:1400], digits[1][:1400])
        return found[name]

    return cheat


@pytest.mark.parametrize("name", CHEATS)
def test_each_cheat_raises_its_own_alarm(name: str, digits: Digits, classifier: nn.Module) -> None:
    """Each is made anew: some of them keep what they were asked."""
    target = CHEATS[name].before(classifier, digits[0][:1400], digits[1][:1400])
    found = audit(target, digits[0][1400:1500], digits[1][1400:1500], WHITE, seed=1)
    assert CHEATS[name].alarm in {gate.name for gate in found.gates if not gate.passed}


@pytest.mark.parametrize("name", [name for name, cheat in CHEATS.items() if cheat.quick])
def test_a_search_raises_the_alarms_that_need_no_attack(
    name: str, digits: Digits, made: Callable[[str], Defended]
) -> None:
    gates = quick_gates(made(name), digits[0][1400:1500], digits[1][1400:1500], WHITE, seed=0)
    assert CHEATS[name].alarm in {gate.name for gate in gates if not gate.passed}


def test_a_model_that_changes_the_images_it_is_given_is_refused(digits: Digits, classifier: nn.Module) -> None:
    """It was judged by the images that it wrote: it kept 90 % where the bare classifier keeps 48."""
    target = Member(kind=Overwriting).before(classifier, digits[0][:1400], digits[1][:1400])
    given = digits[0][1400:1500].clone(), digits[1][1400:1500]
    with pytest.raises(InputError, match="leave the images that it is given as they are"):
        audit(target, *given, WHITE, seed=1)


def test_classes_that_compare_as_they_like_are_compared_as_numbers(digits: Digits, classifier: nn.Module) -> None:
    class Agrees(Tensor):
        def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
            return torch.ones(len(self), dtype=torch.bool)

    class Liar(nn.Module):
        def forward(self, x_NCHW: Tensor) -> Tensor:
            return classifier(x_NCHW).as_subclass(Agrees)

    assert not look(Liar(), digits[0][:50], (digits[1][:50] + 1) % 10, 0).right[0].all()


@contextmanager
def _asked(model: nn.Module) -> Iterator[list[float]]:
    """Yield the least and the greatest pixels that a model is asked about."""
    ends: list[float] = []
    handle = model.register_forward_pre_hook(lambda _, given: ends.extend(map(float, given[0].detach().aminmax())))
    try:
        yield ends
    finally:
        handle.remove()


@pytest.mark.parametrize("attack", [one for one in ATTACKS.values() if one.aims is None], ids=lambda one: one.name)
def test_no_attack_asks_outside_the_range_of_pixels(attack: Attack, digits: Digits, classifier: nn.Module) -> None:
    threat = ThreatModel(attack.norms[0], 0.3 if attack.norms[0] == "Linf" else 2.0, "white-box")
    with _asked(classifier) as ends:
        attack.craft(View(classifier), digits[0][1400:1404], digits[1][1400:1404], threat, seed=1)
    assert ends and min(ends) >= 0 and max(ends) <= 1


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1.0, 1e6])
def test_logits_of_any_scale_are_attacked_in_a_range_that_keeps_their_ranks(scale: float) -> None:
    logits_NK = torch.randn(8, 10)
    found_NK = within_spread(scale * logits_NK)
    assert torch.equal(found_NK.argsort(1), logits_NK.argsort(1))
    assert 0.49 < float(found_NK.std(dim=1, correction=0).min()) < 21
