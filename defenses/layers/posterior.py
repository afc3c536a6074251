"""When the posterior of a VAE has collapsed to its prior."""

from __future__ import annotations

COLLAPSED = 1.0
"""Nats between the encoder's distribution and the prior below which the latent vector tells nothing of the image."""


def collapse(nats: float, effect: str) -> tuple[str, ...]:
    """Return what users should know of a VAE with this mean KL divergence to its prior; nothing if it did not collapse.

    Args:
        nats: mean over images of the KL divergence to the prior, summed over the latent dimensions.
        effect: what a collapse makes of the purified images.
    """
    return (f"the posterior collapsed ({nats:.2f} nats beside the prior): {effect}",) if nats < COLLAPSED else ()
