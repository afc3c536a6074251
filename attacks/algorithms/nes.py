"""NES: projected gradient ascent along a gradient estimated from model outputs only.

Shapes: N images, A of them still attacked, P antithetic pairs, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attacks.algorithms.base import Best, CorrectedAttack, Rank, project, steepest, wide
from attacks.threat import Norm

CHUNK = 2048
"""Most perturbed images in one forward pass."""


class NES(CorrectedAttack):
    """Maximise the logit margin, smoothed by a Gaussian, and evaluate every iterate.

    It also attacks models with steps: where votes, look-ups or quantisation decide, the exact gradient is that of the
    smooth remainder. Returns each image's iterate of highest margin; with `stops`, the first misclassified one.

    torchattacks has no such attack; Square changes whole windows, and needs thousands of queries here.

    Args:
        eps: bound of the perturbation, in pixel units of [0, 1].
        pairs: antithetic pairs of samples in each gradient estimate.
        sigma: standard deviation of the Gaussian, in the same units.
        rank: what is maximised; `evading` needs a View of a model that rejects.

    Source: Ilyas et al., Black-box Adversarial Attacks with Limited Queries and Information, 2018, section 2.1.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        steps: int = 30,
        pairs: int = 32,
        sigma: float = 0.1,
        norm: Norm = "Linf",
        rank: Rank = "margin",
    ) -> None:
        super().__init__("NES", model)
        self.rank = rank
        self.eps, self.steps, self.pairs, self.sigma, self.norm = eps, steps, pairs, sigma, norm

    @torch.no_grad()
    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, y_N = self._given(x_NCHW, y_N)
        draws, moved_NCHW = self._random(x_NCHW), x_NCHW.clone()
        best = Best(x_NCHW, self._rank(x_NCHW, y_N))
        for step in range(self.steps):
            going = best.left(self.stops)
            if len(going) == 0:
                break
            u_APCHW = draws.normal(self.pairs, *x_NCHW.shape[1:])[going]
            alpha = self.eps / 4 * (1 - step / self.steps)
            climb_NCHW = alpha * steepest(self._slope(moved_NCHW[going], y_N[going], u_APCHW), self.norm)
            moved_NCHW[going] = project(moved_NCHW[going] + climb_NCHW, x_NCHW[going], self.eps, self.norm)
            best.offer(going, moved_NCHW[going], self._rank(moved_NCHW[going], y_N[going]))
        return best.x_NCHW

    def _slope(self, x_NCHW: Tensor, y_N: Tensor, u_APCHW: Tensor) -> Tensor:
        """Return sum_i (L(x + sigma u_i) - L(x - sigma u_i)) u_i, where L is the rank. Source: section 2.1.

        Samples are clipped to [0, 1]: a model may answer otherwise where no image lies.
        """
        near = torch.cat((x_NCHW[:, None] + self.sigma * u_APCHW, x_NCHW[:, None] - self.sigma * u_APCHW), dim=1)
        near = near.clamp(0, 1)
        asked = zip(near.flatten(0, 1).split(CHUNK), y_N.repeat_interleave(near.shape[1]).split(CHUNK), strict=True)
        leads_A2P = torch.cat([self._rank(x, y) for x, y in asked]).view(len(x_NCHW), -1)
        plus_AP, minus_AP = leads_A2P.chunk(2, dim=1)
        rise_AP = (plus_AP - minus_AP).nan_to_num(0.0, 0.0, 0.0)
        return (wide(rise_AP.flatten()).view(*rise_AP.shape, 1, 1, 1) * u_APCHW).sum(dim=1)
