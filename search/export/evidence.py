"""Builds evidence.json, the figures and provenance of an export; card.md is also rendered from it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from torch import nn

from attacks.audit.audit import TWICE, Audit
from attacks.audit.consistency import REGULAR
from attacks.audit.gate import Gate, at_most
from attacks.confidence import wilson
from attacks.suites import SUITES
from attacks.threat import ThreatModel
from attacks.verdicts import Robustness, Verdict, worse
from defenses.base import Defense
from search.data import splits
from search.data.registry import find_data_set
from search.export.loader import ROLES, ran
from search.export.provenance import again as command
from search.export.provenance import code, libraries
from search.study.candidate import Candidate
from search.study.study import ResolvedStudy
from search.trial.runner import TrialRunner

REPRODUCED = 0.02
"""Largest allowed difference between the search's attacked accuracy and that of its attacks run again, a fraction."""


def evidence(runner: TrialRunner, candidate: Candidate, found: Audit, again: Robustness) -> dict[str, Any]:
    """Return the evidence of a candidate, alarms first.

    Args:
        found: the result of the audit.
        again: the result of the search's attacks, run again; its verdicts count too.
    """
    score, study, model = candidate.score, runner.study, _model(runner, candidate)
    attacks = {"search": dict(score.attacks), "audit": dict(found.robustness.trail)}
    budgets = _budgets(runner, score.threat)
    gates = _gates(runner, candidate, found, again, _named(attacks, budgets, score.threat))
    return {
        "alarms": [*(gate.alarm for gate in gates if not gate.passed), *score.alarms],
        "candidate": candidate.candidate,
        "search": study.name,
        "model": model,
        "threat": asdict(score.threat),
        **_accuracies(found.robustness, again, score.images),
        "attacked_accuracy_of_the_search": score.attacked_accuracy,
        "rejects": runner.assets.resolved.defense.rejects(),
        "latency_ms_p50": score.latency_ms_p50,
        "latency_ms_p95": score.latency_ms_p95,
        "latency_images": score.latency_images,
        "images": score.images,
        "baselines": {name: _baseline(beside, score.images) for name, beside in found.baselines.items()},
        "gates": [asdict(gate) for gate in gates],
        "attacks": attacks,
        "budgets": budgets,
        **_data(runner),
        "fit": candidate.fit,
        "training": {
            "classifier_epochs": study.classifier_epochs,
            "precision": runner.assets.precision,
            "last_epoch": _last_epoch(runner, candidate),
        },
        "seeds": {"search": study.seed, "audit": study.seed + 1},
        "device": score.device,
        "code": code() | {"modules": ran(model)},
        "versions": {"python": sys.version.split()[0], **libraries()},
        "reproduce": command(study, candidate.params),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def with_gates(known: Mapping[str, Any], gates: Sequence[Gate]) -> dict[str, Any]:
    """Return the evidence with further gates, and their alarms."""
    alarms = [gate.alarm for gate in gates if not gate.passed]
    return {
        **known,
        "alarms": [*known["alarms"], *alarms],
        "gates": [*known["gates"], *(asdict(gate) for gate in gates)],
    }


def _accuracies(audited: Robustness, again: Robustness, images: int) -> dict[str, Any]:
    """Return the accuracies under the audit's attacks combined with the search's attacks, run again."""
    attacked, oblivious, strongest = (
        worse(one, other)
        for one, other in (
            (audited.attacked, again.attacked),
            (audited.oblivious, again.oblivious),
            (audited.strongest, again.strongest),
        )
    )
    return {
        **figures("attacked", attacked, images),
        "draws": len(attacked.right),
        "attacked_accuracy_worst_draw": attacked.worst,
        "attacked_error": attacked.error,
        "attacked_rejection": attacked.rejection,
        **figures("oblivious", oblivious, images),
        **figures("white_box", strongest, images),
        "black_box_accuracy": attacked.accuracy if audited.black_box else None,
        "black_box_queries": audited.queries,
        **figures("clean", audited.clean, images),
        "clean_error": audited.clean.error,
        "clean_rejection": audited.clean.rejection,
    }


def _gates(runner: TrialRunner, candidate: Candidate, found: Audit, again: Robustness, named: Gate) -> tuple[Gate, ...]:
    """Return the gates of the audit, and three more that check the search."""
    same = float(runner.assets.resolved.suite.name == SUITES["audit"].name)
    drift = abs(again.attacked.accuracy - candidate.score.attacked_accuracy)
    law = "the search's attacks run again give the same figure"
    return (
        named,
        *found.gates,
        at_most(2, "reproduced", law, drift, REPRODUCED, candidate.score.images),
        at_most(12, "separate", "what audits is not what selected", same, 0.0),
    )


def _named(attacks: Mapping[str, Mapping[str, float]], budgets: Mapping[str, Any], threat: ThreatModel) -> Gate:
    """Return the gate of check 1: for each attack that ran, the evidence has a budget.

    In a trail an attack's name is followed by ` (gradient source)`, and by `, kept` where its images were snapped.
    """
    known = {one["attack"] for suite in budgets.values() for one in (*suite["oblivious"], *suite["white_box"])}
    ran = {re.split(r" \(|, ", name.partition("/")[2])[0] for trail in attacks.values() for name in trail}
    return at_most(1, "named", f"every attack has a name and a budget ({threat})", len(ran - known), 0.0)


def _budgets(runner: TrialRunner, threat: ThreatModel) -> dict[str, Any]:
    suites = {
        "search": runner.assets.resolved.suite,
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
        }
        for name, suite in suites.items()
    }


def _model(runner: TrialRunner, candidate: Candidate) -> dict[str, Any]:
    """Return what is needed to build the model again, and its description."""
    resolved = runner.assets.resolved
    about, source = described(resolved.defense)
    built = runner.trainer.build(candidate.params)
    return {
        "defense": runner.study.defense,
        "about": about,
        "source": source,
        "task": runner.study.task,
        "shape": asdict(resolved.task.shape),
        "classifier": resolved.protected,
        "trained_with": resolved.task.classifier,
        "own": _own(resolved),
        "consulted": list(runner.assets.consulted(built)),
        "parameters": {"defense": _size(built), "classifier": _size(runner.assets.target)},
        "train": dict(candidate.params.train),
        "inference": dict(candidate.params.inference),
    }


def _own(resolved: ResolvedStudy) -> dict[str, Any]:
    """Return how a user's own classifiers are built from their code, by their role; empty for built-in ones."""
    names = dict.fromkeys((resolved.protected, resolved.task.classifier))
    added = {role: resolved.task.added(name) for role, name in zip(ROLES, names, strict=False)}
    return {
        role: {
            "function": found.function,
            "mean": list(found.mean),
            "std": list(found.std),
            "trained": found.weights is None,
            "digest": found.digest,
        }
        for role, found in added.items()
        if found is not None
    }


def described(kind: type[Defense]) -> tuple[str, str]:
    """Return the description of a defense and its source, from the docstring of its module."""
    text = inspect.getdoc(sys.modules[kind.__module__]) or ""
    source = re.search(r"Sources?: (.*?)(?:\sShapes: |$)", text.replace("\n", " "))
    return text.partition("\n\n")[0].replace("\n", " "), source.group(1).strip() if source else ""


def _size(network: nn.Module) -> int:
    return sum(part.numel() for part in network.parameters())


def _data(runner: TrialRunner) -> dict[str, Any]:
    dataset = runner.assets.resolved.task.dataset
    data = find_data_set(dataset, runner.study.data_dir)
    return {
        "data": dataset,
        "data_licence": data.licence,
        "classes": list(data.classes),
        "data_sha256": splits.checksum(dataset, runner.study.data_dir),
        "split": f"validation: {data.split}, never test",
        "train_images": runner.study.train_images or "all",
    }


def _last_epoch(runner: TrialRunner, candidate: Candidate) -> dict[str, float]:
    """Return the metrics of the last epoch of the fit."""
    curve = runner.assets.store.about("fits", candidate.fit)["curve"]
    return dict(curve[-1]) if curve else {}


def _baseline(beside: Robustness, images: int) -> dict[str, Any]:
    return {
        "clean_accuracy": beside.clean.accuracy,
        **figures("attacked", beside.attacked, images),
        "oblivious_accuracy": beside.oblivious.accuracy,
        "white_box_accuracy": beside.strongest.accuracy,
    }


def figures(name: str, verdict: Verdict, images: int) -> dict[str, Any]:
    """Return an accuracy and its 95 % Wilson interval."""
    return {f"{name}_accuracy": verdict.accuracy, f"{name}_accuracy_interval": wilson(verdict.accuracy, images)}
