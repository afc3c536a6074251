"""Builds evidence.json, the figures and provenance of an export; card.md is also rendered from it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from torch import nn

from attacks.audit.audit import Audit
from attacks.audit.gate import Gate, at_most
from attacks.suites import SUITES
from attacks.verdicts import Robustness
from defenses.base import Defense
from search.data import splits
from search.data.registry import find_data_set
from search.export import figures
from search.export.loader import ran
from search.export.provenance import again as command
from search.export.provenance import code, libraries
from search.storage.seal import ROLES
from search.study.candidate import Candidate
from search.study.resolved import ResolvedStudy
from search.trial.runner import TrialRunner

REPRODUCED = 0.02
"""Largest allowed difference between the search's attacked accuracy and that of its attacks run again, a fraction."""


def evidence(
    runner: TrialRunner,
    candidate: Candidate,
    found: Audit,
    again: Robustness,
    beside: Mapping[str, tuple[str, nn.Module]],
) -> dict[str, Any]:
    """Return the evidence of a candidate, alarms first.

    Args:
        found: the result of the audit.
        again: the result of the search's attacks, run again; its verdicts count too.
        beside: the baselines that searches trained: fit and model, by name.
    """
    score, study, model = candidate.score, runner.study, _model(runner, candidate)
    attacks = {"search": dict(score.attacks), "audit": dict(found.robustness.trail)}
    budgets = figures.budgets({"search": runner.assets.resolved.suite}, score.threat)
    gates = _gates(runner, candidate, found, again, figures.named(attacks, budgets, score.threat))
    failed = [gate for gate in gates if not gate.passed]
    further = [name for name in score.alarms if name not in {gate.name for gate in failed}]
    return {
        "alarms": [*(gate.alarm for gate in failed), *further],
        "candidate": candidate.candidate,
        "search": study.name,
        "model": model,
        "threat": asdict(score.threat),
        **figures.accuracies(found.robustness, again, score.images),
        "attacked_accuracy_of_the_search": score.attacked_accuracy,
        "rejects": runner.assets.resolved.defense.rejects(),
        "latency_ms_p50": score.latency_ms_p50,
        "latency_ms_p95": score.latency_ms_p95,
        "latency_images": score.latency_images,
        "images": score.images,
        "baselines": _baselines(found, beside, score.images),
        "gates": [asdict(gate) for gate in gates],
        "attacks": attacks,
        "budgets": budgets,
        **_data(runner),
        "fit": candidate.fit,
        "training": _training(runner, candidate),
        "seeds": {"search": study.seed, "audit": study.seed + 1},
        "device": score.device,
        "code": code() | {"modules": ran(model)},
        "versions": {"python": sys.version.split()[0], **libraries()},
        "reproduce": command(study, candidate.params),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _baselines(found: Audit, beside: Mapping[str, tuple[str, nn.Module]], images: int) -> dict[str, Any]:
    """Return the figures of the baselines by name, with the fit of each that a search trained."""
    return {
        name: figures.baseline(one, images) | ({"fit": beside[name][0]} if name in beside else {})
        for name, one in found.baselines.items()
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


def _training(runner: TrialRunner, candidate: Candidate) -> dict[str, Any]:
    """Return how the networks were trained, and what the last epoch of the fit reported."""
    study, curve = runner.study, runner.assets.store.about("fits", candidate.fit)["curve"]
    return {
        "classifier_epochs": study.classifier_epochs,
        "classifier_recipe": study.classifier_recipe,
        "precision": runner.assets.precision,
        "weights": study.weights,
        "last_epoch": dict(curve[-1]) if curve else {},
    }
