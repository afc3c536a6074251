"""The gate `prediction`, against closed forms: a gradient that is a known share of the truth misses the rest of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attacks.audit.gate import Gate
from attacks.audit.prediction import APART, OFF, prediction
from attacks.gradient_view import Gradient
from attacks.threat import Norm, ThreatModel
from benchmarks.broken import DIGITS, NoOp
from defenses.base import Defended

EACH = pytest.mark.parametrize("norm", ["Linf", "L2"])


def told(x_NCHW: Tensor, share: float) -> Tensor:
    """The image, with `share` of its gradient."""
    return share * x_NCHW + ((1 - share) * x_NCHW).detach()


class Linear(nn.Module):
    """Two logits, linear in the pixels; the gradient is told by a share."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share = share
        self.w_K1HW = nn.Parameter(torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return (told(x_NCHW, self.share) * self.w_K1HW[:, 0][:, None, None]).sum((2, 3, 4)).T


class Rounded(Linear):
    """Rounds to sixteenths of the range, and passes the gradient straight through."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return super().forward(x_NCHW + ((16 * x_NCHW).round() / 16 - x_NCHW).detach())


class Standing(NoOp):
    """The defense of a `Linear` whose stand-in tells half of the gradient."""

    differentiable = False

    @property
    def gradients(self) -> tuple[Gradient, ...]:
        return ("surrogate",)

    def surrogate(self, x_NCHW: Tensor) -> Tensor:
        return told(x_NCHW, 0.5)


class Detecting(NoOp):
    """Rejects bright images, and tells a tenth of the gradient of that."""

    openings = ("rejection",)
    share = 0.1

    def suspicion(self, x_NCHW: Tensor) -> Tensor:
        return told(x_NCHW, self.share).flatten(1).mean(1, keepdim=True)

    def limits(self) -> Tensor:
        return torch.full((1,), 0.9)


class Frank(Detecting):
    share = 1.0


def judged(target: nn.Module, norm: Norm, eps: float | None = None, sources: tuple[Gradient, ...] = ("exact",)) -> Gate:
    x_NCHW = 0.5 + 0.1 * torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    eps = (0.1 if norm == "Linf" else 0.8) if eps is None else eps
    y_N = torch.arange(32) % 2
    return prediction(target.requires_grad_(False).eval(), x_NCHW, y_N, ThreatModel(norm, eps, "white-box"), 0, sources)


@EACH
@pytest.mark.parametrize("share", [1.0, 0.8, 0.5, 0.1])
def test_what_a_gradient_leaves_out_of_a_linear_model_is_the_figure(norm: Norm, share: float) -> None:
    gate = judged(Linear(share), norm)
    assert gate.figure == pytest.approx((1 - share) / OFF, abs=1e-3) and gate.passed == (share > 0.7)


@EACH
def test_a_gradient_passed_straight_through_rounding_is_found(norm: Norm) -> None:
    assert not judged(Rounded(), norm).passed


@EACH
def test_a_model_without_a_gradient_is_found_and_none_is_asked_for_without_a_budget(norm: Norm) -> None:
    assert not judged(Linear(0.0), norm).passed and not judged(Linear(), norm, sources=()).passed
    assert judged(Linear(0.0), norm, eps=0.0).figure == 0


@EACH
def test_of_a_stand_in_the_sums_are_compared_and_of_detectors_too(norm: Norm) -> None:
    defended = {kind: Defended(kind({}, {}, DIGITS), Linear()) for kind in (Standing, Detecting, Frank)}
    assert judged(defended[Standing], norm, sources=("surrogate",)).figure == pytest.approx(0.5 / APART, abs=1e-3)
    assert judged(defended[Detecting], norm).figure == pytest.approx(0.9 / APART, abs=1e-3)
    assert judged(defended[Frank], norm).figure == pytest.approx(0, abs=1e-3)


def test_the_best_source_counts() -> None:
    model = Defended(Standing({}, {}, DIGITS), Linear())
    assert judged(model, "Linf", sources=("surrogate", "exact")).figure == pytest.approx(0.5 / APART, abs=1e-3)
    lied = Defended(Standing({}, {}, DIGITS), Linear(0.2))  # the classifier lies as well: the truth is nowhere
    assert not judged(lied, "Linf", sources=("surrogate", "exact")).passed
