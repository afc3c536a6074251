"""Fields of evidence.json that follow from verdicts, for exports and for models of others: accuracies, budgets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from attacks.audit.audit import TWICE
from attacks.audit.consistency import REGULAR
from attacks.audit.gate import Gate, at_most
from attacks.confidence import wilson
from attacks.suites import SUITES, Suite
from attacks.threat import ThreatModel
from attacks.verdicts import Robustness, Verdict, worse
from search.formatting import spoken_threat


def accuracies(audited: Robustness, again: Robustness, images: int) -> dict[str, Any]:
    """Return the accuracies under the audit's attacks combined with those of another suite.

    Args:
        again: the result of the other suite; for an export that of its search, run again.
    """
    attacked, oblivious, strongest = (
        worse(one, other)
        for one, other in (
            (audited.attacked, again.attacked),
            (audited.oblivious, again.oblivious),
            (audited.strongest, again.strongest),
        )
    )
    return {
        **accuracy("attacked", attacked, images),
        "draws": len(attacked.right),
        "attacked_accuracy_worst_draw": attacked.worst,
        "known_noise_accuracy": audited.known.accuracy if audited.known and len(attacked.right) > 1 else None,
        "attacked_error": attacked.error,
        "attacked_rejection": attacked.rejection,
        **accuracy("oblivious", oblivious, images),
        **accuracy("white_box", strongest, images),
        "black_box_accuracy": attacked.accuracy if audited.black_box else None,
        "black_box_queries": audited.queries,
        **accuracy("clean", audited.clean, images),
        "clean_error": audited.clean.error,
        "clean_rejection": audited.clean.rejection,
    }


def accuracy(name: str, verdict: Verdict, images: int) -> dict[str, Any]:
    """Return an accuracy and its 95 % Wilson interval."""
    return {f"{name}_accuracy": verdict.accuracy, f"{name}_accuracy_interval": wilson(verdict.accuracy, images)}


def baseline(beside: Robustness, images: int) -> dict[str, Any]:
    """Return the accuracies of a model that was attacked beside the audited one."""
    return {
        "clean_accuracy": beside.clean.accuracy,
        **accuracy("attacked", beside.attacked, images),
        "oblivious_accuracy": beside.oblivious.accuracy,
        "white_box_accuracy": beside.strongest.accuracy,
    }


def budgets(further: Mapping[str, Suite], threat: ThreatModel) -> dict[str, Any]:
    """Return the budget of each attack of the audit and of further suites, by suite."""
    suites = {
        **further,
        "audit": SUITES["audit"].within(threat),
        "convergence": TWICE,
        "regular": REGULAR.within(threat),
    }
    return {
        name: {
            "draws": suite.draws,
            "looks": suite.looks,
            "oblivious": [attack.budget(threat) for attack in suite.oblivious],
            "white_box": [attack.budget(threat) for attack in suite.white_box],
            "known_noise": [suite.known.budget(threat)] if suite.known else [],
        }
        for name, suite in suites.items()
    }


def named(attacks: Mapping[str, Mapping[str, float]], budgets: Mapping[str, Any], threat: ThreatModel) -> Gate:
    """Return the gate of check 1: for each attack that ran, the evidence has a budget.

    In a trail an attack's name is followed by ` (gradient source)`, and by `, kept` where its images were snapped.
    """
    groups = "oblivious", "white_box", "known_noise"
    known = {one["attack"] for suite in budgets.values() for group in groups for one in suite[group]}
    ran = {re.split(r" \(|, ", name.partition("/")[2])[0] for trail in attacks.values() for name in trail}
    return at_most(1, "named", f"every attack has a name and a budget ({spoken_threat(threat)})", len(ran - known), 0.0)


def with_gates(known: Mapping[str, Any], gates: Sequence[Gate]) -> dict[str, Any]:
    """Return the evidence with further gates, and their alarms."""
    alarms = [gate.alarm for gate in gates if not gate.passed]
    return {
        **known,
        "alarms": [*known["alarms"], *alarms],
        "gates": [*known["gates"], *(asdict(gate) for gate in gates)],
    }
