"""card.md: an export's model card, for people. What it says stands in evidence.json; its words in `card.md.j2`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from attacks.threat import ThreatModel
from search.formatting import spoken_device

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
    return _template().render(
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


def _template() -> jinja2.Template:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=False,  # it is markdown, and every word in it is the study's
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters["percent"] = lambda share: "not measured" if share is None else f"{100 * share:.1f} %"
    env.filters["device"] = spoken_device
    env.filters["range"] = lambda ends: " to ".join(f"{100 * end:.1f}" for end in ends)
    return env.get_template("card.md.j2")
