"""What a gate passes, and what another attack may break by chance. Shapes: D draws, N images."""

from __future__ import annotations

import torch

from attacks.audit.gate import at_most, broken


def test_another_try_at_noise_breaks_nothing_and_a_stronger_attack_does() -> None:
    rates_N = torch.rand(64, generator=torch.Generator().manual_seed(0))
    alike, weaker = 0, 0
    for seed in range(50):
        draws = torch.Generator().manual_seed(seed + 1)
        one_DN, other_DN, harder_DN = (
            torch.rand(20, 64, generator=draws) < rate_N for rate_N in (rates_N, rates_N, 0.7 * rates_N)
        )
        (again, chance), (lost, allowed) = broken(one_DN, other_DN), broken(one_DN, harder_DN)
        alike, weaker = alike + (again > chance), weaker + (lost > allowed)
    assert alike <= 1 and weaker >= 45
    alone_DN = torch.arange(64)[None] < 60
    assert broken(alone_DN, torch.arange(64)[None] < 58) == (2 / 64, 1 / 64)


def test_a_figure_that_is_nan_does_not_pass() -> None:
    assert at_most(1, "", "", 0.1, 0.1).passed
    assert not at_most(1, "", "", 0.11, 0.1).passed and not at_most(1, "", "", float("nan"), 0.1).passed
