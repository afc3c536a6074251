"""Exports: a winner with its weights and its evidence, in files that need no pickle.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import yaml
from safetensors.torch import load as from_bytes

import defenses
from attacks.audit import audit
from attacks.suite import AttackError
from defenses.base import Defended, Shape
from search.architectures import ARCHITECTURES
from search.evidence import card, evidence
from search.score import Candidate
from search.store import Store, folder_atomic, to_bytes, write_atomic
from search.study import Study
from search.trial import Bench, silent
from spaces.space import InputError


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
    exam, baselines = bench.exam, bench.adversarially_trained()
    try:
        with bench.lane.working():
            found = audit(
                target,
                exam.x_NCHW,
                exam.y_N,
                exam.threat,
                seed=study.seed + 1,
                outsider=exam.outsider,
                baselines=baselines,
            )
    except (AttackError, InputError) as error:
        raise AlarmError(f"{candidate.candidate} cannot be audited: {error}") from None
    aimed = Defended(defense.at(bench.aimed(candidate.params).inference), bench.target.network)
    with bench.lane.working():
        again = exam.observe(aimed).judge(defense.at(candidate.params.inference).limits())
    known = evidence(bench, candidate, found, again) | {"refused_before_it": refused}
    if known["alarms"] and not despite_alarms:
        raise AlarmError(f"{candidate.candidate} raised {len(known['alarms'])} alarm(s): {'; '.join(known['alarms'])}")
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
        "card.md": card(candidate, known).encode(),
    }
    known["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files["evidence.json"] = json.dumps(known, indent=1).encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
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
