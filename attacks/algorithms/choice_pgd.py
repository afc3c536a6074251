"""Projected gradient descent for a defense that chooses between candidates.

Shapes: N images, K classes.
"""

from __future__ import annotations

from torch import Tensor

from attacks.algorithms.pgd import PGD


class ChoicePGD(PGD):
    """Projected gradient ascent of the cross-entropy and, as long as the label's candidate is chosen, of the strain.

    Mends PGD on a defense that decodes a candidate for each class and keeps the nearest: through the choice no gradient
    flows, and through a soft one none where a candidate is far ahead. Raised further than to where another candidate is
    chosen, the strain outgrows the cross-entropy: of 100 digits behind a PuVAE, at eps 0.1, 31 then stay right and 20
    so; 23 under PGD alone. Behind better fitted ones it finds what PGD does.

    Args: those of `PGD`; the model is a View, through the surrogate, of a classifier behind a defense with `strain`.

    Source: Tramer et al., On Adaptive Attacks to Adversarial Example Defenses, 2020: attack what decides.
    """

    def _gain(self, x_NCHW: Tensor, aim_N: Tensor, logits_NK: Tensor) -> Tensor:
        strain_N = self.model.strain(x_NCHW, aim_N)
        return super()._gain(x_NCHW, aim_N, logits_NK) + (-strain_N if self.targeted else strain_N).clamp(max=0)
