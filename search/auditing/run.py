"""Audits of any model: of a user's file, for the command line, or one that a notebook has.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from attacks.ambient import torch_defaults
from attacks.black_box import BlackBoxAttacker
from attacks.threat import ThreatModel
from defenses.base import Shape
from search.auditing import answer
from search.auditing.audit_report import AuditReport, unused
from search.auditing.examination import Examination
from search.auditing.images import Images, images, labelled
from search.auditing.protocol import methods, wrapped
from search.auditing.source import Source
from search.classifiers.architectures import ARCHITECTURES
from search.data.splits import HELD_OUT
from search.study.resolved import threat_of
from spaces.domain import as_number
from spaces.exceptions import InputError, choose

NOWHERE: dict[str, str | None] = dict.fromkeys(("file", "file_sha256", "function", "weights", "weights_sha256"))


@torch_defaults()
def audit(
    model: nn.Module,
    x: Any,
    y: Any,
    threat: ThreatModel,
    *,
    suite: str | None = None,
    seed: int = 1,
    attacker: BlackBoxAttacker | None = None,
    console: Console | None = None,
) -> AuditReport:
    """Attack a model, check that the attacks can be believed, and say what was found.

    Args:
        model: images in [0, 1] in, logits out; with at most four further methods (search/auditing/protocol.py).
        x: the images to attack, 32 or more, uint8 or float in [0, 1], N x C x H x W, N x H x W x C or N x H x W.
        y: their classes, integers.
        threat: norm, eps and knowledge of the attacker.
        suite: further attacks, whose verdicts count too, such as `standard` (AutoAttack).
        seed: of random starts, targets and noise.
        attacker: required under the black-box threat model, and used under no other.
        console: where progress is shown; default: nowhere.

    Raises:
        InputError: an argument is invalid, or the model does not answer such images with logits.
    """
    device = next((part.device for part in model.parameters()), None)
    x_NCHW, y_N = (part.to(device) for part in labelled(x, y))
    digest = hashlib.sha256(x_NCHW.cpu().numpy().tobytes() + y_N.cpu().numpy().tobytes()).hexdigest()
    where: dict[str, Any] = {"name": "given in Python", "split": "given in Python", "licence": "not known"}
    given = Images(x_NCHW=x_NCHW, y_N=y_N, attackable=len(y_N), sha256=digest, **where)
    x_NCHW, y_N = given.first(len(y_N))
    about = _about(model, type(model).__name__, NOWHERE, given, seed, "search.audit(model, x, y, threat)")
    plan = Examination(threat, suite, seed, attacker if threat.knowledge == "black-box" else None)
    return AuditReport(plan.evidence(model, x_NCHW, y_N, about, console or Console(quiet=True)))


@torch_defaults()
def audit_source(
    source: Source,
    data: str,
    out: Path,
    *,
    norm: str,
    eps: float | str,
    knowledge: str = "white-box",
    number: int | None = None,
    suite: str | None = None,
    substitute: str = "A",
    seed: int = 1,
    data_dir: str | None = None,
    console: Console | None = None,
) -> AuditReport:
    """Audit the model of a user's file, as `audit` does, and have its answers confirmed by one that is built anew.

    Args:
        data: a data set, whose validation images are attacked, or FILE.npz.
        number: number of images that are attacked; default: 200, or as many as there are.
        substitute: the architecture of the black-box attacker's network.
        out: a new folder, into which the report is written.

    Raises:
        InputError: an argument is invalid, or the model does not answer such images with logits.
    """
    unused(out)
    threat: Any = {"norm": norm, "eps": as_number("eps", eps), "knowledge": knowledge}
    plan = Examination(threat_of(**threat), suite, seed)
    given = images(data, knowledge, data_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x_NCHW, y_N = (part.to(device) for part in given.first(number))
    model = source.build().requires_grad_(False).to(device)
    if knowledge == "black-box":
        plan = Examination(plan.threat, suite, seed, _attacker(model, given, substitute, device))
    where = Path(data).resolve() if data.endswith(".npz") else data
    flags = {"weights": source.weights, "data": where, "norm": norm, "eps": eps, "threat": knowledge, "seed": seed}
    flags |= {"images": number, "suite": suite, "data-dir": data_dir}
    flags |= {"substitute": substitute} if knowledge == "black-box" else {}
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    command = f"python launch.py audit {shlex.join([f'{source.file}:{source.function}', *words])}"
    about = _about(model, source.name, source.digests(), given, seed, command)
    how: dict[str, Any] = {"classes": given.classes, "anew": answer.words(source, data)}
    found = AuditReport(plan.evidence(model, x_NCHW, y_N, about, console or Console(quiet=True), **how))
    found.write(out)
    return found


def _attacker(model: nn.Module, given: Images, substitute: str, device: torch.device) -> BlackBoxAttacker:
    """Return a black-box attacker that starts from images that are not attacked.

    Its network has the classes of the model, which may answer with some that no image of a file has.
    """
    architecture = ARCHITECTURES[choose("the substitute", substitute, list(ARCHITECTURES))]
    _, channels, height, width = given.x_NCHW.shape
    shape = Shape(channels, height, width, int(given.y_N.max()) + 1)
    if not architecture.fits(shape):
        raise InputError(f"the substitute must fit the images, but they are too small for {substitute}")
    start_NCHW = given.x_NCHW[given.attackable :][-HELD_OUT:].to(device)

    def build() -> nn.Module:  # when the model was seen to answer
        with torch.no_grad():
            logits_NK = wrapped(model, shape, noisy=False, exact=False)(start_NCHW[:1])
        return architecture.build(replace(shape, classes=logits_NK.shape[1]))

    return BlackBoxAttacker(start_NCHW, build)


def _about(
    model: nn.Module, name: str, source: dict[str, str | None], given: Images, seed: int, command: str
) -> dict[str, Any]:
    """Return the fields of the evidence that do not follow from the measurement."""
    return {
        "model": {
            "name": name,
            **source,
            "methods": list(methods(model)),
            "shape": list(given.x_NCHW.shape[1:]),
            "parameters": sum(part.numel() for part in model.parameters()),
        },
        "data": given.name,
        "data_licence": given.licence,
        "data_sha256": given.sha256,
        "split": given.split,
        "seeds": {"audit": seed},
        "reproduce": command,
    }
