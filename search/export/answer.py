"""Loads an export in a process of its own and answers images: `python -m search.export.answer EXPORT ASKED ANSWERED`.

It imports as little as a user who loads an export, and knows no label. Shapes: D draws, N images, C channels, H x W
pixels.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from attacks.gradient_view import BATCH
from attacks.seeding import reproducible
from defenses.base import Defended
from search.data.guard import closed
from search.export.loader import load
from search.storage.fingerprint import OURS
from search.trial.precision import tensor_float32

REJECTED = -1


def main(folder: str, asked: Path, answered: Path) -> None:
    """Answer the images of a file by an export, as `answer` does."""
    answer(lambda how: load(folder, how["changed"], trust=True), asked, answered)


def answer(build: Callable[[Mapping[str, Any]], Defended], asked: Path, answered: Path) -> None:
    """Answer the images of a file of safetensors in the order that its metadata has, and write the classes.

    Args:
        build: returns the model, given `how`.
        asked: its metadata are `how`, JSON: names (the order), seed and draws of the noise, device, threads, changed.
        answered: gets the class of each image in each draw, int64 DN, `REJECTED` for a rejected one; its metadata are
            `further`, JSON: our modules that the model loaded while it answered.
    """
    with safe_open(asked, "pt") as questions:
        how = json.loads(questions.metadata()["how"])
        images = {name: questions.get_tensor(name) for name in how["names"]}
    torch.set_num_threads(how["threads"])
    tensor_float32(False)  # as where it was judged
    model = build(how).to(how["device"])
    before = set(sys.modules)
    with closed("asked"):
        classes = {
            name: _classes(model, x_NCHW.to(how["device"]), how["seed"], how["draws"])
            for name, x_NCHW in images.items()
        }
    further = sorted(name for name in set(sys.modules) - before if name.partition(".")[0] in OURS)
    save_file(classes, answered, {"further": json.dumps(further)})


@torch.no_grad()
def _classes(model: Defended, x_NCHW: Tensor, seed: int, draws: int) -> Tensor:
    """Return the class of each image in each draw, DN, `REJECTED` for a rejected one."""
    found = []
    with reproducible(model, seed):
        for _ in range(draws):
            for x in x_NCHW.split(BATCH):
                classes_N = model(x).argmax(1)
                found.append(torch.where(model.accept(x), classes_N, REJECTED).cpu())
    return torch.cat(found).unflatten(0, (draws, -1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
