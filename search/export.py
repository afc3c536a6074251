"""Exports: a winner with its weights and its evidence, in files that need no pickle.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load as from_bytes

import defenses
from attacks.audit import Audit, audit
from attacks.interval import wilson
from attacks.robustness import Robustness
from attacks.suite import SUITES
from defenses.base import Defended, Shape
from search import tasks
from search.architectures import ARCHITECTURES
from search.score import Candidate
from search.store import Store, folder_atomic, to_bytes, write_atomic
from search.study import Study
from search.trial import Bench, silent
from spaces.space import InputError

VERSIONS = ("torch", "torchattacks", "optuna", "ray", "numpy")
REPRODUCED = 0.02
"""How far the search's figure may lie from the same attack run again, a fraction."""


class AlarmError(RuntimeError):
    """A candidate did not pass its audit."""


def export(
    study: Study, candidate: Candidate, store: Store, out: Path, *, refused: int = 0, despite_alarms: bool = False
) -> Path:
    """Audit a candidate and write its export.

    Args:
        out: the folder of exports; the candidate gets a folder of its name in it.
        refused: how many candidates that ranked higher the audit refused before; the evidence says so.
        despite_alarms: write it in spite of alarms, which the evidence then names first.

    Raises:
        InputError: the export exists.
        AlarmError: the audit raised alarms.
    """
    folder = out / candidate.candidate
    if folder.exists():
        raise InputError(f"an export must be a new folder, but {folder} exists")
    bench = Bench.of(study, store)
    if bench.fingerprint(candidate.params) != candidate.fit:
        raise InputError(
            f"an export needs the fit that was scored, {candidate.fit}, but the code, the data or the study's settings "
            f"have changed since; search again under another name"
        )
    _, defense = bench.fit(candidate.params, silent)
    target = Defended(defense, bench.target.network)
    exam = bench.exam
    found = audit(target, exam.x_NCHW, exam.y_N, exam.threat, seed=study.seed + 1)
    evidence = _evidence(bench, candidate, found, exam.observe(target).judge()) | {"refused_before_it": refused}
    if evidence["alarms"] and not despite_alarms:
        raise AlarmError(f"{candidate.candidate} raised {len(evidence['alarms'])} alarm(s): {evidence['alarms'][0]}")
    config = {
        "defense": study.defense,
        "task": study.task,
        "shape": asdict(bench.plan.task.shape),
        "classifier": bench.plan.protected,
        "trained_with": bench.plan.task.classifier,
        "train": dict(candidate.params.train),
        "inference": dict(candidate.params.inference),
        "threat": asdict(exam.threat),
        "study": study.model_dump(exclude={"storage", "data_dir", "address"}),
    }
    files = {
        "weights.safetensors": to_bytes(defense),
        "classifier.safetensors": to_bytes(bench.target.network),
        "config.yaml": yaml.safe_dump(config, sort_keys=False).encode(),
        "card.md": _card(candidate, evidence).encode(),
    }
    evidence["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files["evidence.json"] = json.dumps(evidence, indent=1).encode()
    with folder_atomic(folder) as temporary:
        for name, content in files.items():
            write_atomic(temporary / name, content)
        bench.picture(candidate.params, temporary / "pictures.png")
    return folder


def load(folder: str | Path) -> Defended:
    """Load an export as a plain nn.Module in eval mode: images in [0, 1] in, logits out.

    Raises:
        InputError: a file is missing or is not what was exported.
    """
    folder = Path(folder)
    try:
        evidence = json.loads((folder / "evidence.json").read_text())
        files = {name: (folder / name).read_bytes() for name in evidence["sha256"]}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"an export must be a folder with whole files, but {folder}: {error}") from None
    for name, expected in evidence["sha256"].items():
        digest = hashlib.sha256(files[name]).hexdigest()
        if digest != expected:
            raise InputError(f"{folder / name} must have the SHA-256 {expected}, but has {digest}: export it anew")
    config = yaml.safe_load(files["config.yaml"])
    shape = Shape(**config["shape"])
    defense = defenses.find(config["defense"])(config["train"], config["inference"], shape)
    classifier = ARCHITECTURES[config["classifier"]].build(shape)
    defense.adopt(ARCHITECTURES[config.get("trained_with", config["classifier"])].build(shape))
    defense.load_state_dict(from_bytes(files["weights.safetensors"]))
    classifier.load_state_dict(from_bytes(files["classifier.safetensors"]))
    return Defended(defense, classifier).eval().requires_grad_(False)


def _evidence(bench: Bench, candidate: Candidate, found: Audit, again: Robustness) -> dict[str, Any]:
    """Return what is known of a candidate; its accuracies under attack are what both search and audit left."""
    score, images = candidate.score, candidate.score.images
    attacked = found.robustness.attacked & again.attacked
    alarms = [*found.alarms, *score.alarms]
    drift = abs(again.attacked.accuracy - score.attacked_accuracy)
    if drift > REPRODUCED:
        alarms.append(f"reproduced: the search's attack run again gives the same figure, but differs by {drift:.3f}")
    return {
        "alarms": alarms,
        "candidate": candidate.candidate,
        "threat": asdict(score.threat),
        "attacked_accuracy": attacked.accuracy,
        "attacked_accuracy_interval": wilson(attacked.accuracy, images),
        "attacked_error": attacked.error,
        "attacked_rejection": attacked.rejection,
        "rejects": bench.plan.defense.rejects(),
        "detectors_attacked": False,
        "attacked_accuracy_of_the_search": score.attacked_accuracy,
        "oblivious_accuracy": (found.robustness.oblivious & again.oblivious).accuracy,
        "white_box_accuracy": (found.robustness.strongest & again.strongest).accuracy,
        "clean_accuracy": score.clean_accuracy,
        "clean_rejection": score.clean_rejection,
        "latency_ms_p50": score.latency_ms_p50,
        "latency_ms_p95": score.latency_ms_p95,
        "images": images,
        "gates": [asdict(gate) for gate in found.gates],
        "attacks": {"search": dict(score.attacks), "audit": dict(found.robustness.trail)},
        "budgets": {
            name: {
                "draws": suite.draws,
                "oblivious": [attack.budget(score.threat.eps) for attack in suite.oblivious],
                "white_box": [attack.budget(score.threat.eps) for attack in suite.white_box],
            }
            for name, suite in (("search", bench.plan.suite), ("audit", SUITES["audit"]))
        },
        "split": "validation: kept from the training set by the task's fixed rule (search/datasets.py), never test",
        "data_sha256": tasks.checksum(bench.plan.task.dataset, bench.study.data_dir),
        "train_images": bench.study.train_images or "all",
        "fit": candidate.fit,
        "seeds": {"search": bench.study.seed, "audit": bench.study.seed + 1},
        "device": score.device,
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in VERSIONS}},
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _rejection(evidence: Mapping[str, Any]) -> str:
    """Return what is rejected, in words; nothing where the defense cannot."""
    if not evidence["rejects"]:
        return ""
    error, attacked, clean = (
        f"{100 * evidence[name]:.1f} %" for name in ("attacked_error", "attacked_rejection", "clean_rejection")
    )
    return (
        f"It rejects {clean} of the clean images (`model.accept(x)` says which); of the attacked ones {error} are "
        f"accepted and wrong, {attacked} rejected. The attacks did not aim at its detectors, which flatters it. "
    )


def _card(candidate: Candidate, evidence: Mapping[str, Any]) -> str:
    score = candidate.score
    low, high = evidence["attacked_accuracy_interval"]
    knobs = "\n".join(f"| {name} | {value} |" for name, value in candidate.params.flat().items())
    gates = "\n".join(
        f"| {gate['name']} | {gate['law']} | {gate['figure']:.4g} | {gate['limit']:.4g} "
        f"| {'pass' if gate['passed'] else 'ALARM'} |"
        for gate in evidence["gates"]
    )
    warning = "".join(f"> **ALARM** {alarm}\n\n" for alarm in evidence["alarms"])
    return f"""# {candidate.defense} on {candidate.task}, {candidate.candidate}

{warning}Attacked accuracy **{100 * evidence["attacked_accuracy"]:.1f} %** (95 % interval {100 * low:.1f} to \
{100 * high:.1f}) under {score.threat}; white-box {100 * evidence["white_box_accuracy"]:.1f} %, oblivious \
{100 * evidence["oblivious_accuracy"]:.1f} %, clean {100 * score.clean_accuracy:.1f} %, on {score.images} validation
images. {_rejection(evidence)}Trained on {evidence["train_images"]} images. Chosen on validation images, of which the
choice made the best: the figure is optimistic, and the test split was not opened.

| knob | value |
| --- | --- |
{knobs}

| gate | law | figure | limit | verdict |
| --- | --- | --- | --- | --- |
{gates}

Purifying a batch of 128 takes {score.latency_ms_p50:.1f} ms (p50), {score.latency_ms_p95:.1f} ms (p95) on \
{evidence["device"]}.

```python
from search.export import load
model = load("this folder")  # a plain nn.Module: images in [0, 1] in, logits out
```
"""
