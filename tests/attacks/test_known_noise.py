"""Noise that the attacker knows beside noise that it does not: a toy of which both figures are known in closed form."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from attacks.catalog import PGD_10, PGD_20
from attacks.evaluation import look, observe
from attacks.seeding import KnownNoise, seeded
from attacks.suites import LOOKS, SUITES, Suite
from attacks.threat import ThreatModel
from tests.support.guards import Guard, Smooth

WHITE = ThreatModel("Linf", 0.1, "white-box")
PLAIN = Suite(name="plain", oblivious=(), white_box=(PGD_10,), draws=2)
KNOWING = PLAIN.with_known_noise()
Digits = tuple[Tensor, Tensor]


class Signs(Smooth):
    """Multiplies what each pixel differs from grey by a random sign."""

    stochastic = True
    gradients = ("exact",)

    def purify(self, x: Tensor) -> Tensor:
        return 0.5 + (2 * torch.randint_like(x, 2) - 1) * (x - 0.5)


class Sum(nn.Module):
    """Two classes: the second where the sum of what 8 x 8 pixels differ from grey is above -3."""

    def forward(self, x: Tensor) -> Tensor:
        sum_N = (x - 0.5).flatten(1).sum(1)
        return torch.stack((torch.zeros_like(sum_N), 3 + sum_N), dim=1)


def test_who_knows_the_signs_breaks_every_image_and_who_does_not_hardly_any() -> None:
    """Known signs move the sum by 0.1 x 64 = 6.4; unknown ones by 0.8, a standard deviation, where 3 breaks it."""
    x, y = torch.full((300, 1, 8, 8), 0.5), torch.ones(300, dtype=torch.int64)
    said = observe(KNOWING, Guard(Signs(), Sum()), x, y, WHITE).judge()
    assert said.known is not None and said.known.right.shape == (1, 300) and said.strongest.right.shape == (LOOKS, 300)
    assert said.known.accuracy == 0 and said.strongest.accuracy > 0.99 and said.strongest.worst > 0.97
    assert said.trail["known-noise/pgd-20 (exact)"] == 0


def test_without_noise_there_is_nothing_to_know(digits: Digits, classifier: nn.Module) -> None:
    images = digits[0][1400:1500], digits[1][1400:1500]
    said = observe(KNOWING, classifier, *images, WHITE).judge()
    assert said.known is not None and torch.equal(said.known.right, said.strongest.right)
    assert not any(name.startswith("known-noise") for name in said.trail)


def test_noise_that_decides_nothing_saves_nothing(digits: Digits, classifier: nn.Module) -> None:
    images = digits[0][1400:1500], digits[1][1400:1500]
    said = observe(KNOWING, Guard(Smooth(noise=1e-6), classifier), *images, WHITE).judge()
    assert said.known is not None and 0.2 < said.strongest.accuracy < 0.9
    assert 0 <= said.strongest.accuracy - said.known.accuracy <= 0.03


def test_the_noise_that_is_known_is_that_of_the_first_draw_in_every_batch(
    digits: Digits, classifier: nn.Module
) -> None:
    """An attack of size 0 changes nothing in it, for more images than pass through a model at once."""
    images, guard = (digits[0][1000:1600], digits[1][1000:1600]), Guard(Smooth(noise=0.4), classifier)
    found = observe(KNOWING, guard, *images, replace(WHITE, eps=0), seed=3)
    assert found.known is not None and len(found.known) == 3
    for seen in found.known.values():
        assert torch.equal(seen.right, found.clean.right[:1]) and not torch.equal(seen.right, found.clean.right[1:2])
    assert torch.equal(found.clean.right, look(guard, *images, 3, LOOKS).right)


def test_known_noise_is_what_comes_next_at_every_call_and_moves_no_generator() -> None:
    noisy, x = Smooth(noise=1.0), torch.zeros(2, 1, 8, 8)
    model = Guard(noisy, nn.Identity())
    with seeded(5):
        known = KnownNoise(model)
        state = torch.get_rng_state()
        first, again = known(x), known(x)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first, again) and torch.equal(first, noisy.purify(x))
        assert not torch.equal(first, noisy.purify(x))


def test_only_who_asks_gets_the_figure(digits: Digits, classifier: nn.Module) -> None:
    guard = Guard(Smooth(noise=0.4), classifier)
    assert observe(PLAIN, guard, digits[0][:20], digits[1][:20], WHITE).judge().known is None
    asked, audit = SUITES["search"].with_known_noise(), SUITES["audit"].with_known_noise()
    assert (asked.known, asked.looks) == (PGD_20, LOOKS) and audit == SUITES["audit"]
