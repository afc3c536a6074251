"""What an attacker sees of a defended classifier, against autograd and by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.gradient_view import View, bare, deepened, gradients, limits, openings, stochastic
from tests.support.guards import Guard, Smooth

Digits = tuple[Tensor, Tensor]


def test_bpda_gives_the_classifiers_gradient_at_the_purified_image(digits: Digits, classifier: nn.Module) -> None:
    guard = Guard(Smooth(steps=4), classifier)
    x, y = digits[0][:5].clone().requires_grad_(), digits[1][:5]
    logits = View(guard, "bpda")(x)
    assert torch.allclose(logits, guard(x), atol=1e-6)
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, y), x)
    purified = ((digits[0][:5] * 4).round() / 4).requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(classifier(purified), y), purified)
    assert torch.allclose(slope, expected, atol=1e-6)


def test_draws_average_the_logits_of_one_batch(digits: Digits, classifier: nn.Module) -> None:
    guard = Guard(Smooth(noise=0.3), classifier)
    torch.manual_seed(1)
    averaged = View(guard, "exact", draws=8)(digits[0][:3])
    torch.manual_seed(1)
    by_hand = torch.stack([guard(part) for part in [digits[0][:3].repeat(8, 1, 1, 1)]]).reshape(8, 3, 10).mean(0)
    assert torch.allclose(averaged, by_hand, atol=1e-6)


def test_a_view_averages_suspicion_and_strain_over_its_draws(digits: Digits, classifier: nn.Module) -> None:
    class Strained(Smooth):
        def suspicion(self, x: Tensor) -> Tensor:
            return self.purify(x).flatten(1)[:, :2]

        def strain(self, x: Tensor, y: Tensor) -> Tensor:
            return y * self.purify(x).flatten(1).mean(1)

    view, x, y = View(Guard(Strained(noise=0.3), classifier), draws=50), digits[0][:4], digits[1][:4]
    assert torch.allclose(view.suspicion(x), x.flatten(1)[:, :2], atol=0.2) and view.suspicion(x).shape == (4, 2)
    assert torch.allclose(view.strain(x, y), y * x.flatten(1).mean(1), atol=0.1)
    assert not torch.equal(view.suspicion(x), view.suspicion(x))


def test_a_bare_classifier_has_its_own_gradient_and_nothing_else(classifier: nn.Module) -> None:
    guard = Guard(Smooth(noise=0.1, darkest=0.3), classifier)
    assert bare(guard) is bare(classifier) is classifier
    assert (gradients(guard), gradients(classifier)) == (("surrogate", "bpda", "exact"), ("exact",))
    assert (openings(guard), openings(classifier)) == (("rejection",), ())
    assert (stochastic(guard), stochastic(classifier)) == (True, False)
    assert torch.equal(limits(guard), torch.tensor([-0.3])) and limits(classifier).shape == (0,)


def test_where_nothing_descends_there_is_nothing_to_deepen(classifier: nn.Module) -> None:
    for target in (classifier, Guard(Smooth(), classifier)):
        with deepened(target, 2) as defense:
            assert defense is None
