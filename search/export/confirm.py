"""Confirms the verdicts on an export in a new process, which knows nothing of what the model was asked before.

Shapes: D draws, N images, C channels, H x W pixels.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from attacks.audit.consistency import LOOKS, beyond_chance
from attacks.audit.gate import Gate, at_most
from attacks.verdicts import Observation, Verdict
from defenses.base import Defended
from search.export.loader import ran
from search.export.provenance import ROOT
from search.storage.seal import FILES, SEAL, seal
from search.storage.store import to_bytes

CLEAN = "clean"


def confirm(
    folder: Path,
    versions: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    y_N: Tensor,
    *,
    seed: int,
    changed: bool = False,
) -> tuple[Gate, ...]:
    """Load an export in a new process and compare verdicts, as `confirmed_by` does.

    Args:
        changed: the export may run another code than it was judged with.

    Returns:
        The gates `confirmed`, and `code`: the model loaded no code of ours that its evidence does not name.
    """
    return confirmed_by(
        ("search.export.answer", str(folder.resolve())), versions, right, y_N, seed=seed, changed=changed
    )


def confirmed_by(
    module: Sequence[str],
    versions: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    y_N: Tensor,
    *,
    seed: int,
    changed: bool = False,
) -> tuple[Gate, ...]:
    """Ask a model in a new process the adversarial images first, in another order, and compare verdicts.

    Args:
        module: the module that builds the model and answers (search/export/answer.py), and its first arguments.
        versions: images x_NCHW by name, N each; those named `clean` are asked last.
        right: the verdicts to be confirmed: whether the model accepted each image and was correct, bool_DN.
        seed: of the order and of the model's noise.
    """
    order_N = torch.randperm(len(y_N), generator=torch.Generator().manual_seed(seed))
    names = sorted(versions, key=lambda name: name == CLEAN)
    how = {
        "names": names,
        "seed": seed,
        "draws": min(LOOKS, len(right[names[0]])),
        "device": str(y_N.device),
        "threads": torch.get_num_threads(),
        "changed": changed,
    }
    with tempfile.TemporaryDirectory() as room:
        asked, answered = Path(room) / "asked.safetensors", Path(room) / "answered.safetensors"
        images = {name: versions[name].detach().cpu()[order_N].contiguous() for name in names}
        save_file(images, asked, {"how": json.dumps(how)})
        command = [sys.executable, "-m", *module, str(asked), str(answered)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
        if done.returncode != 0:
            why = (done.stderr.strip().splitlines() or ["no message"])[-1]
            law = f"a new process can load it and answer, which ended with {done.returncode}: {why}"
            return (at_most(13, "confirmed", law, 1.0, 0.0, len(y_N)),)
        classes = load_file(answered)
        with safe_open(answered, "pt") as answers:
            further = json.loads(answers.metadata()["further"])
    y_N = y_N.cpu()[order_N]
    fresh = {name: classes[name] == y_N for name in names}
    return (
        _confirmed({name: right[name].cpu()[:, order_N] for name in names}, fresh),
        at_most(13, "code", _code_law(further), len(further), 0.0),
    )


def recorded(seen: Observation, x_NCHW: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the clean images and the versions that an observation kept, and its verdicts on them (see `confirm`)."""
    versions, outputs = {CLEAN: x_NCHW}, {CLEAN: seen.clean, **seen.kept}
    versions |= {name: one.x_NCHW for name, one in seen.kept.items() if one.x_NCHW is not None}
    return versions, {name: Verdict.of(one, seen.limits_S).right for name, one in outputs.items()}


@contextmanager
def written(target: Defended, model: Mapping[str, Any], code: Mapping[str, bytes]) -> Iterator[Path]:
    """Write a defended classifier as what `load` reads of an export, into a folder that is removed afterwards.

    Args:
        model: the part `model` of the evidence of an export with the same defense, knobs and classifier.
        code: the files of its user's own classifiers, by name.
    """
    known = {"model": model, "code": {"modules": ran(model)}}
    files = (
        dict.fromkeys(FILES, b"")
        | dict(code)
        | {
            "evidence.json": json.dumps(known).encode(),
            "weights.safetensors": to_bytes(target.defense),
            "classifier.safetensors": to_bytes(target.classifier),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**files, SEAL: seal(files)}.items():
            (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def _confirmed(right: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> Gate:
    """Check 13: the verdicts of a new process are those of the process that judged, beyond one image and chance."""
    beyond = {name: beyond_chance(right[name], fresh[name]) for name in right}
    worst = max(beyond, key=lambda name: beyond[name])
    images = right[worst].shape[1]
    differ = (right[worst].double().mean(0) - fresh[worst].double().mean(0)).abs()
    mean = ", a mean over draws of its noise" if len(right[worst]) > 1 else ""
    law = (
        "a new process that loads it, and is asked the attacked images first, in another order, gives the same verdicts"
        f" (others on {float(differ.sum()):.3g} of {images} images{mean}, {worst})"
    )
    return at_most(13, "confirmed", law, beyond[worst], 0.0, images)


def _code_law(further: list[str]) -> str:
    said = f", but it loads {', '.join(further)}" if further else ""
    return f"while it answers it loads no code of ours beyond what its evidence names{said}"
