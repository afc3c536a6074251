"""evidence.json of an audited model, with the fields of an export's where both have them (docs/audit.schema.json)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from attacks.audit.audit import Audit
from attacks.audit.gate import Gate
from attacks.suites import SUITES
from attacks.threat import ThreatModel
from attacks.verdicts import Robustness
from defenses.base import Defended
from search.auditing.words import UNSEEN, verdict
from search.export import figures
from search.export.provenance import code, libraries
from search.study.candidate import Latency
from search.trial.latency import device_name


def evidence(
    target: Defended,
    x_NCHW: Tensor,
    threat: ThreatModel,
    found: Audit,
    further: Mapping[str, Robustness],
    confirmed: Sequence[Gate],
    latency: Latency | None,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the evidence of an audited model, verdict and alarms first.

    Args:
        found: the result of the audit.
        further: the results of further suites, by name; their verdicts count too.
        confirmed: the gates of a new process; none if the model cannot be built anew.
        latency: None if the model has no purifier.
        about: the fields that do not follow from the measurement: the model's source, the data, the seed, the command.
    """
    attacks = {"audit": dict(found.robustness.trail), **{name: dict(one.trail) for name, one in further.items()}}
    budgets = figures.budgets({name: SUITES[name].within(threat) for name in further}, threat)
    gates = [figures.named(attacks, budgets, threat), *_asked(target, found), *confirmed]
    known: dict[str, Any] = {
        "threat": asdict(threat),
        **figures.accuracies(found.robustness, next(iter(further.values()), found.robustness), len(x_NCHW)),
        "rejects": target.defense.rejects(),
        "latency_ms_p50": latency and latency.ms_p50,
        "latency_ms_p95": latency and latency.ms_p95,
        "latency_images": latency and latency.images,
        "images": len(x_NCHW),
        "baselines": {name: figures.baseline(beside, len(x_NCHW)) for name, beside in found.baselines.items()},
        "gates": [asdict(gate) for gate in gates],
        "unseen": list(UNSEEN),
        "attacks": attacks,
        "budgets": budgets,
        **about,
        "device": device_name(x_NCHW.device),
        "code": code(),
        "versions": {"python": sys.version.split()[0], **libraries()},
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    alarms = [gate.alarm for gate in gates if not gate.passed]
    return {"verdict": verdict(known), "alarms": alarms, **known}


def _asked(target: Defended, found: Audit) -> list[Gate]:
    """Return the gates of the audit that asked about the model: nobody knows the steps of a foreign purifier."""
    known = target.defense.descends is not None
    return [gate for gate in found.gates if known or gate.name != "inner-loop"]
