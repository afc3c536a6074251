"""What the gates of an export checked, on how many images, and what no gate can see; the same words in every place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attacks.threat import ThreatModel
from search.formatting import percent, points, spoken_threat

AREAS = {
    1: "budgets",
    2: "repeatability",
    3: "gradients",
    4: "weaker attacks",
    5: "convergence",
    6: "larger eps",
    7: "gradient sources",
    8: "noise",
    9: "planted examples",
    10: "baseline",
    11: "tailored attacks",
    12: "batch and images kept aside",
    13: "state and regularities",
}
"""What the checks of docs/honest-numbers.md ask about, by number."""
SHARES = ("noise", "single-step", "transfer", "square", "estimated", "convergence", "regular")
"""Gates that compare attacks: their figure is the share of images that another attack breaks in addition."""
FIGURES = (
    "threat",
    *("attacked_accuracy", "attacked_accuracy_of_the_search", "attacked_error", "attacked_rejection"),
    *("oblivious_accuracy", "black_box_accuracy", "white_box_accuracy"),
    *("clean_accuracy", "clean_rejection", "latency_ms_p50"),
    "alarms",
)
"""The fields of the evidence that are reported for an export."""
UNSEEN = (
    "attacks that nobody has thought of",
    "images of the test split (only `final` opens them)",
    "other norms, corruptions, images from elsewhere",
)
"""What no gate can see. Source: docs/honest-numbers.md, What it does not prove."""


def checks(gates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the gates of an export's evidence checked, as JSON.

    Returns:
        passed, gates: numbers of gates; checked, unseen: in words; images: the fewest and the most images of a gate
        that asks about images; seen_by_one, seen_by_all: the smallest share of images on which a fault raises the alarm
        of some gate that compares attacks, and of each of them (None without such a gate).
    """
    seen = [_smallest(gate) for gate in gates if gate["name"] in SHARES and gate["images"]]
    images = [gate["images"] for gate in gates if gate["images"]]
    areas = [AREAS.get(gate["check"], gate["name"]) for gate in sorted(gates, key=lambda gate: gate["check"])]
    return {
        "passed": sum(gate["passed"] for gate in gates),
        "gates": len(gates),
        "checked": list(dict.fromkeys(areas)),
        "images": [min(images), max(images)] if images else None,
        "seen_by_one": min(seen, default=None),
        "seen_by_all": max(seen, default=None),
        "unseen": list(UNSEEN),
    }


def _smallest(gate: Mapping[str, Any]) -> float:
    """Return the smallest share of images that is beyond the limit of a gate."""
    return (math.floor(gate["limit"] * gate["images"]) + 1) / gate["images"]


def passed(found: Mapping[str, Any]) -> str:
    """Return how many checks passed, and what that says of the figure, in words."""
    if found["passed"] == found["gates"]:
        return f"All {found['gates']} measurement checks passed: the figure can be believed, whatever it is"
    return f"{found['passed']} of {found['gates']} measurement checks passed"


def sizes(found: Mapping[str, Any]) -> str:
    """Return the numbers of images, and the shares of images that the checks can see, in words."""
    low, high = found["images"] or (0, 0)
    said = f"{low} to {high} images" if low < high else f"{low} images"
    if found["seen_by_one"] is None:
        return said
    one, every = (percent(found[name], unit=" %") for name in ("seen_by_one", "seen_by_all"))
    more = f", on fewer than {every} not by every check" if one != every else ""
    return f"{said}: a fault on fewer than {one} of them is not seen{more}"


def spoken(found: Mapping[str, Any]) -> str:
    """Return three lines: how many checks passed, on what they looked, and what was checked and what was not."""
    checked, unseen = ", ".join(found["checked"]), "; ".join(found["unseen"])
    return f"{passed(found)}\nchecked on {sizes(found)}\nchecked: {checked}; not checked: {unseen}"


def audited(found: Mapping[str, Any]) -> str:
    """Return the accuracies under the audit beside that of the search, and what was checked, as text."""
    threat = spoken_threat(ThreatModel(**found["threat"]))
    attacked, searched = points(found["attacked_accuracy"]), points(found["attacked_accuracy_of_the_search"])
    return (
        f"audited: {attacked} % attacked accuracy ({threat}; the search's lighter attacks left "
        f"{searched} %), error {points(found['attacked_error'])} %, "
        f"rejected {points(found['attacked_rejection'])} %, white-box {points(found['white_box_accuracy'])} %\n"
        f"{spoken(checks(found['gates']))}"
    )
