"""Renders card.md, the model card of an export, from evidence.json and the template `card.md.j2`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attacks.threat import ThreatModel
from search.export.checks import checks, passed, sizes
from search.formatting import spoken_threat
from search.study.verdict import verdict_of_audit
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
"""Libraries that affect weights and figures; evidence.json lists all that were installed."""


def card(evidence: Mapping[str, Any]) -> str:
    """Return the model card in markdown."""
    threat, found = ThreatModel(**evidence["threat"]), checks(evidence["gates"])
    return render(
        TEMPLATE,
        e=evidence,
        m=evidence["model"],
        given=any(not own["trained"] for role, own in evidence["model"]["own"].items() if role == "classifier"),
        threat=spoken_threat(threat),
        norm=threat.norm,
        checks=found,
        passed=passed(found),
        sizes=sizes(found),
        knows=KNOWS[threat.knowledge],
        verdict=verdict_of_audit(evidence),
        strongest=strongest(evidence["attacks"]["audit"], threat),
        versions={name: evidence["versions"][name] for name in SHAPING if name in evidence["versions"]},
    )


def strongest(trail: Mapping[str, float], threat: ThreatModel) -> tuple[str, float]:
    """Return the attack of the threat model with the least accuracy after it, the first if several tie.

    White-box accuracies are cumulative, so the first with the least is the last one that lowered the accuracy.
    """
    own = {name: left for name, left in trail.items() if name.startswith(threat.knowledge)}
    return min((own or trail).items(), key=lambda item: item[1])
