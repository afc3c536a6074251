"""card.md: an export's model card, for people. What it says stands in evidence.json; its words in `card.md.j2`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attacks.threat import ThreatModel
from search.templates import render

TEMPLATE = Path(__file__).parent / "templates" / "card.md.j2"
KNOWS = {
    "white-box": "sees the classifier and the defense, differentiates through both (or through stand-ins, BPDA) and "
    "averages over the defense's noise (EOT)",
    "oblivious": "sees the classifier and not the defense, which is what the PuVAE, Defense-VAE and Defense-GAN papers "
    "call white-box",
    "black-box": "sees neither: it asks the defended model for classes, trains a substitute on the answers and attacks "
    "that",
}
SHAPING = ("python", "torch", "torchattacks", "numpy", "scipy", "safetensors", "optuna", "ray")
"""The libraries that shape weights and numbers; evidence.json names all that were installed."""


def card(evidence: Mapping[str, Any]) -> str:
    """Return the page."""
    threat = ThreatModel(**evidence["threat"])
    return render(
        TEMPLATE,
        e=evidence,
        m=evidence["model"],
        threat=threat,
        knows=KNOWS[threat.knowledge],
        strongest=strongest(evidence["attacks"]["audit"], threat),
        versions={name: evidence["versions"][name] for name in SHAPING if name in evidence["versions"]},
    )


def strongest(trail: Mapping[str, float], threat: ThreatModel) -> tuple[str, float]:
    """Return the attack of the threat model's trail that left least, the first of them, and what it left.

    White-box figures are cumulative: the first of the least is the one that took the last image.
    """
    own = {name: left for name, left in trail.items() if name.startswith(threat.knowledge)}
    return min((own or trail).items(), key=lambda item: item[1])
