"""What stands beside an export's number: evidence.json for scripts, card.md for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from attacks.audit import TWICE, Audit
from attacks.interval import wilson
from attacks.probes import Gate, at_most
from attacks.robustness import Robustness, Verdict
from attacks.suite import SUITES
from attacks.threat import ThreatModel
from search import tasks
from search.score import Candidate
from search.trial import Bench

VERSIONS = ("torch", "torchattacks", "optuna", "ray", "numpy")
REPRODUCED = 0.02
"""How far the search's figure may lie from the same attack run again, a fraction."""


def evidence(bench: Bench, candidate: Candidate, found: Audit, again: Robustness) -> dict[str, Any]:
    """Return what is known of a candidate, alarms first.

    Args:
        found: the audit's attacks.
        again: the search's, run again. Its verdicts count too.
    """
    score, images, threat = candidate.score, candidate.score.images, candidate.score.threat
    audited = found.robustness
    separate = at_most(
        12, "separate", "what audits is not what selected", float(bench.plan.suite.name == SUITES["audit"].name), 0.0
    )
    drift = abs(again.attacked.accuracy - score.attacked_accuracy)
    reproduced = at_most(2, "reproduced", "the search's attacks run again give the same figure", drift, REPRODUCED)
    suites = {"search": bench.plan.suite, "audit": SUITES["audit"].within(threat), "convergence": TWICE}
    budgets = {
        name: {
            "draws": suite.draws,
            "looks": suite.looks,
            "oblivious": [attack.budget(threat) for attack in suite.oblivious],
            "white_box": [attack.budget(threat) for attack in suite.white_box],
        }
        for name, suite in suites.items()
    }
    attacks = {"search": dict(score.attacks), "audit": dict(audited.trail)}
    gates = (_named(attacks, budgets, threat), *found.gates, reproduced, separate)
    attacked, oblivious, strongest = (
        _worse(one, other)
        for one, other in (
            (audited.attacked, again.attacked),
            (audited.oblivious, again.oblivious),
            (audited.strongest, again.strongest),
        )
    )
    return {
        "alarms": [*(f"{gate.name}: {gate.law}" for gate in gates if not gate.passed), *score.alarms],
        "candidate": candidate.candidate,
        "threat": asdict(threat),
        **figures("attacked", attacked, images),
        "draws": len(attacked.right),
        "attacked_accuracy_worst_draw": attacked.worst,
        "attacked_error": attacked.error,
        "attacked_rejection": attacked.rejection,
        "rejects": bench.plan.defense.rejects(),
        "attacked_accuracy_of_the_search": score.attacked_accuracy,
        **figures("oblivious", oblivious, images),
        **figures("white_box", strongest, images),
        "black_box_accuracy": attacked.accuracy if audited.black_box else None,
        "black_box_queries": audited.queries,
        **figures("clean", audited.clean, images),
        "clean_error": audited.clean.error,
        "clean_rejection": audited.clean.rejection,
        "latency_ms_p50": score.latency_ms_p50,
        "latency_ms_p95": score.latency_ms_p95,
        "images": images,
        "baselines": {
            name: {
                "clean_accuracy": beside.clean.accuracy,
                "attacked_accuracy": beside.attacked.accuracy,
                "oblivious_accuracy": beside.oblivious.accuracy,
                "white_box_accuracy": beside.strongest.accuracy,
            }
            for name, beside in found.baselines.items()
        },
        "gates": [asdict(gate) for gate in gates],
        "attacks": attacks,
        "budgets": budgets,
        "split": "validation: kept from the training set by the task's fixed rule (search/datasets.py), never test",
        "data_sha256": tasks.checksum(bench.plan.task.dataset, bench.study.data_dir),
        "train_images": bench.study.train_images or "all",
        "fit": candidate.fit,
        "seeds": {"search": bench.study.seed, "audit": bench.study.seed + 1},
        "device": score.device,
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in VERSIONS}},
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _named(attacks: Mapping[str, Mapping[str, float]], budgets: Mapping[str, Any], threat: ThreatModel) -> Gate:
    """Check 1: every figure under an attack has that attack's budget beside it."""
    known = {one["attack"] for suite in budgets.values() for one in (*suite["oblivious"], *suite["white_box"])}
    ran = {name.partition("/")[2].partition(" (")[0] for trail in attacks.values() for name in trail}
    return at_most(1, "named", f"every attack has a name and a budget ({threat})", len(ran - known), 0.0)


def _worse(one: Verdict, other: Verdict) -> Verdict:
    """Return what both left; of a defense that draws noise what left less, for a draw of the one is none of the other.

    A search that judged by fewer draws than the audit does not count against it.
    """
    if len(one.right) == 1:
        return one & other
    return min(one, other, key=lambda verdict: verdict.accuracy) if len(other.right) == len(one.right) else one


def figures(name: str, verdict: Verdict, images: int) -> dict[str, Any]:
    """Return an accuracy and its Wilson 95 % interval."""
    return {f"{name}_accuracy": verdict.accuracy, f"{name}_accuracy_interval": wilson(verdict.accuracy, images)}


def _rejection(evidence: Mapping[str, Any]) -> str:
    """Return what is rejected, in words; nothing where the defense cannot."""
    if not evidence["rejects"]:
        return ""
    error, attacked, clean = (
        f"{100 * evidence[name]:.1f} %" for name in ("attacked_error", "attacked_rejection", "clean_rejection")
    )
    return (
        f"It rejects {clean} of the clean images (`model.accept(x)` says which); of the attacked ones {error} are "
        f"accepted and wrong, {attacked} rejected. "
    )


def _spread(evidence: Mapping[str, Any]) -> str:
    """Return what other draws of the noise do, in words; nothing where none is drawn."""
    if evidence["draws"] == 1:
        return ""
    worst = 100 * evidence["attacked_accuracy_worst_draw"]
    return f"It draws noise: the figure is the mean of {evidence['draws']} draws, the worst of them {worst:.1f} %. "


def card(candidate: Candidate, evidence: Mapping[str, Any]) -> str:
    """Return the page for people."""
    score = candidate.score
    low, high = evidence["attacked_accuracy_interval"]
    knobs = "\n".join(f"| {name} | {value} |" for name, value in candidate.params.flat().items())
    gates = "\n".join(
        f"| {gate['check']} | {gate['name']} | {gate['law']} | {gate['figure']:.4g} | {gate['limit']:.4g} "
        f"| {'pass' if gate['passed'] else 'ALARM'} |"
        for gate in evidence["gates"]
    )
    baselines = "\n".join(
        f"| {name} | " + " | ".join(f"{100 * value:.1f} %" for value in beside.values()) + " |"
        for name, beside in evidence["baselines"].items()
    )
    warning = "".join(f"> **ALARM** {alarm}\n\n" for alarm in evidence["alarms"])
    return f"""# {candidate.defense} on {candidate.task}, {candidate.candidate}

{warning}Attacked accuracy **{100 * evidence["attacked_accuracy"]:.1f} %** (95 % interval {100 * low:.1f} to \
{100 * high:.1f}) under {score.threat}; white-box {100 * evidence["white_box_accuracy"]:.1f} %, oblivious \
{100 * evidence["oblivious_accuracy"]:.1f} %, clean {100 * evidence["clean_accuracy"]:.1f} %, on {score.images} \
validation images. {_spread(evidence)}{_rejection(evidence)}Trained on {evidence["train_images"]} images.
Chosen on validation images, of which the choice made the best: the figure is optimistic, and the test split was not
opened.

| beside it, at the same budget | clean | attacked | oblivious | white-box |
| --- | --- | --- | --- | --- |
{baselines}

| knob | value |
| --- | --- |
{knobs}

| check | gate | law | figure | limit | verdict |
| --- | --- | --- | --- | --- | --- |
{gates}

Purifying a batch of 128 takes {score.latency_ms_p50:.1f} ms (p50), {score.latency_ms_p95:.1f} ms (p95) on \
{evidence["device"]}.

```python
from search.export import load
model = load("this folder")  # a plain nn.Module: images in [0, 1] in, logits out
```
"""
