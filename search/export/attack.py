"""Attacks an exported winner by any suite, under any threat model, on the validation split.

Shapes: N images.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from rich.console import Console
from torch import Tensor, nn

from attacks.algorithms.mixture import fool
from attacks.black_box import BlackBoxAttacker
from attacks.catalog import MIXTURE
from attacks.confidence import wilson
from attacks.evaluation import observe
from attacks.gradient_view import View, bare, openings, stochastic
from attacks.seeding import Draws, reproducible
from attacks.suites import SUITES, Suite, craft_oblivious
from attacks.threat import Norm, ThreatModel
from attacks.verdicts import Observation, Robustness, Verdict
from search.classifiers.task import Task, find_task
from search.data import splits
from search.export.attack_progress import UNDEFENDED, AttackProgress, suite_passes
from search.export.confirm import confirm, recorded
from search.export.loader import load
from search.formatting import percent, spoken_threat
from search.storage.atomic import write_atomic
from search.study.fields import spelt
from search.study.resolved import threat_of
from search.trial.device_lock import DeviceLock
from search.trial.precision import tensor_float32
from spaces.domain import as_number
from spaces.exceptions import InputError, choose

FOOLING = 100
"""Number of fooling images; their target classes are evenly distributed. Source: GMVAE, section 4."""
DRAWS = 20
"""Noise draws per final verdict on a stochastic defense (docs/honest-numbers.md, check 8)."""


def attack(
    folder: Path,
    suite: str,
    *,
    knowledge: str | None = None,
    norm: str | None = None,
    eps: float | str | None = None,
    images: int | None = None,
    substitute: str | None = None,
    data_dir: str | None = None,
    seed: int = 1,
    changed: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run a suite on an export and on its bare classifier, and write the results to the folder of the export.

    Args:
        knowledge, norm, eps: the threat model; default: that of the export. If the norm differs, eps is required.
        images: number of validation images; default: as many as the search attacked.
        substitute: the architecture of the black-box attacker's network; default: that of the study.
        seed: of random starts and targets, which differ from the search's if the seeds differ.
        changed: go on where the code of the export changed; the table says so.
        console: where progress is shown; default: nowhere.

    Returns:
        The table, as JSON; it is also written to FOLDER/attacks.

    Raises:
        InputError: the folder is not an export, or an argument is invalid.
    """
    prepared = _prepared(folder, suite, knowledge, norm, eps, images, substitute, data_dir, seed, changed)
    (folder / "attacks").mkdir(exist_ok=True)  # fail here, not after hours of work
    said = f"attacking {prepared.known['candidate']}, then the bare classifier: suite {suite}, {prepared.images} images"
    start, device_lock = time.monotonic(), DeviceLock(prepared.x_NCHW.device)  # a search may measure here
    progress = AttackProgress(
        console or Console(quiet=True), f"{said}, {spoken_threat(prepared.threat)}", bare(prepared.target)
    )
    stand = float(prepared.known["white_box_accuracy"])
    progress.expected = prepared.images * suite_passes(suite, prepared.target, stand) * (1 + UNDEFENDED)
    with progress.running(), device_lock.working():
        oblivious = prepared.oblivious()
        seen, undefended = prepared.run(prepared.target, oblivious), prepared.run(bare(prepared.target), oblivious)
        alarms = prepared.alarms(folder, seen)
    table = _table(prepared, seen.judge(), undefended.judge(), alarms, time.monotonic() - start)
    threat = prepared.threat
    by = f"-by-{prepared.substitute}" if prepared.blind else ""
    name = f"{suite}-{threat.knowledge}{by}-{threat.norm}-{threat.eps:g}-images-{prepared.images}-seed-{seed}"
    write_atomic(folder / "attacks" / f"{name}.json", json.dumps(table, indent=1).encode())
    write_atomic(folder / "attacks" / f"{name}.md", page(table).encode())
    return table


@dataclass(frozen=True, kw_only=True)
class _Preparation:
    """An export, the attacks on it and the images.

    Args:
        changed: how its code changed since it was judged; empty if it did not.
        known: the content of its evidence.json.
        substitute: the architecture of the black-box attacker's network.
    """

    target: nn.Module
    changed: str
    known: Mapping[str, Any]
    task: Task
    attacks: Suite
    threat: ThreatModel
    x_NCHW: Tensor
    y_N: Tensor
    attacker: BlackBoxAttacker
    substitute: str
    seed: int

    @property
    def images(self) -> int:
        return len(self.y_N)

    @property
    def blind(self) -> bool:
        return self.threat.knowledge == "black-box"

    def run(self, model: nn.Module, oblivious: Mapping[str, Tensor]) -> Observation:
        """Attack a model; `oblivious` has the adversarial examples of the oblivious attacks."""
        attacker, suite = self.attacker if self.blind else None, self.attacks
        options: dict[str, Any] = {"oblivious": oblivious, "attacker": attacker, "seed": self.seed}
        options["kept"] = {one.name for one in (*suite.oblivious, *suite.transfer, *suite.white_box)}
        return observe(self.attacks, model, self.x_NCHW, self.y_N, self.threat, **options)

    def alarms(self, folder: Path, seen: Observation) -> list[str]:
        """Return the alarms of the export, and those that a new process raises which is asked the same images."""
        gates = confirm(folder, *recorded(seen, self.x_NCHW), self.y_N, seed=self.seed, changed=bool(self.changed))
        return [*self.known["alarms"], *(gate.alarm for gate in gates if not gate.passed)]

    def oblivious(self) -> dict[str, Tensor]:
        """Return the adversarial examples against the bare classifier, by attack."""
        images = (self.x_NCHW, self.y_N)
        return {} if self.blind else craft_oblivious(self.attacks, bare(self.target), *images, self.threat, self.seed)


def _prepared(
    folder: Path,
    suite: str,
    knowledge: str | None,
    norm: str | None,
    eps: float | str | None,
    images: int | None,
    substitute: str | None,
    data_dir: str | None,
    seed: int,
    changed: bool,
) -> _Preparation:
    """Check the arguments of `attack` and load what it needs."""
    attacks = replace(SUITES[choose("the suite", suite, list(SUITES))], looks=DRAWS)
    exported = load(folder, changed, data_dir=data_dir)
    config = yaml.safe_load((folder / "config.yaml").read_bytes())
    known = json.loads((folder / "evidence.json").read_bytes())
    threat = _threat(ThreatModel(**config["threat"]), knowledge, norm, eps)
    if not any((attacks.within(threat).oblivious, attacks.within(threat).white_box)):
        raise InputError(f"the suite {suite} has no attack in {threat.norm}")
    task = find_task(config["task"], data_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensor_float32(False)
    splits.expect(task.dataset, data_dir, known["data_sha256"])
    x_NCHW, y_N = (t.to(device) for t in splits.load(task.dataset, "validation", data_dir, None))
    partner = task.beside(config["classifier"]).partner
    own = task.beside(substitute or config["study"].get("substitute") or partner).classifier
    free = splits.sizes(task.dataset, data_dir).attackable(threat.knowledge)
    wanted = min(known["images"], free) if images is None else images
    if not 1 <= wanted <= free:
        raise InputError(f"images must be from 1 to {free} of {task.dataset}'s validation split, but is {wanted}")
    held_out_NCHW = splits.load_held_out(task.dataset, data_dir)
    return _Preparation(
        target=exported.unchecked().to(device),
        changed=exported.changed,
        known=known,
        task=task,
        attacks=attacks,
        threat=threat,
        x_NCHW=x_NCHW[:wanted],
        y_N=y_N[:wanted],
        attacker=BlackBoxAttacker(held_out_NCHW.to(device), lambda: task.build(own)),
        substitute=own,
        seed=seed,
    )


def _table(
    prepared: _Preparation, found: Robustness, undefended: Robustness, alarms: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Return the table of results, as JSON."""
    attacks, noisy = prepared.attacks, stochastic(prepared.target)
    return {
        "export": prepared.known["candidate"],
        "changed": prepared.changed,
        "alarms": list(alarms),
        "suite": attacks.name,
        "threat": asdict(prepared.threat),
        "images": prepared.images,
        "split": "validation",
        "draws": DRAWS if noisy else 1,
        "draws_in_a_gradient": attacks.draws if noisy else 1,
        "seed": prepared.seed,
        "seconds": round(seconds, 1),
        "clean": _figures(found.clean, prepared.images),
        "attacked": _figures(found.attacked, prepared.images),
        "undefended": _figures(undefended.attacked, prepared.images),
        "black_box_queries": found.queries,
        "substitute": prepared.substitute if prepared.blind else None,
        "fooling_images_accepted": _fooled(prepared),
        "trail": dict(found.trail),
        "undefended_trail": dict(undefended.trail),
        "budgets": _budgets(attacks, prepared.threat),
    }


_percent = partial(percent, unit=" %", absent="-")


def page(table: Mapping[str, Any]) -> str:
    """Return the table in markdown."""
    threat, attacked, clean = ThreatModel(**table["threat"]), table["attacked"], table["clean"]
    warning = f"> **CHANGED** {table['export']} {table['changed']}: these figures are of the code as it is now.\n\n"
    warning = warning if table["changed"] else ""
    warning += "".join(f"> **FAILED CHECK** {alarm}\n\n" for alarm in table["alarms"])
    low, high = attacked["interval"]
    rows = "\n".join(
        f"| {name} | {_percent(left)} | {_percent(table['undefended_trail'].get(name))} |"
        for name, left in table["trail"].items()
    )
    worst = f", worst {_percent(attacked['worst'])}" if table["draws"] > 1 else ""
    asked = f" The black-box attacker trained a {table['substitute']} on {table['black_box_queries']} answers."
    asked = asked if table["substitute"] else ""
    accepted = table["fooling_images_accepted"]
    fooling = "" if accepted is None else f"{_percent(accepted)} of {FOOLING} fooling images (Eq. 11) are accepted.\n\n"
    return f"""# {table["export"]} under the suite {table["suite"]}

{warning}{spoken_threat(threat)}: **{_percent(attacked["accuracy"])}** of {table["images"]} validation images \
withstand all (95 % interval {_percent(low)} to {_percent(high)}{worst}); error {_percent(attacked["error"])}, \
rejected {_percent(attacked["rejection"])}; clean {_percent(clean["accuracy"])}, \
rejected {_percent(clean["rejection"])}; \
undefended {_percent(table["undefended"]["accuracy"])}. Mean of {table["draws"]} draw(s).{asked}

| after | accuracy left | undefended |
| --- | --- | --- |
{rows}

{fooling}White-box rows are cumulative. Budgets: the JSON beside this page.
"""


def _threat(own: ThreatModel, knowledge: str | None, norm: str | None, eps: float | str | None) -> ThreatModel:
    norm = norm if norm is None else choose("the norm", spelt(norm), get_args(Norm))
    if eps is None and norm not in (None, own.norm):
        raise InputError(f"eps must be given where the norm is not the export's, {own.norm}, but is not")
    bound = None if eps is None else as_number("eps", eps)
    given: dict[str, Any] = {"knowledge": knowledge, "norm": norm, "eps": bound}
    return threat_of(**{**vars(own), **{name: value for name, value in given.items() if value is not None}})


def _fooled(prepared: _Preparation) -> float | None:
    """Return the fraction of fooling images that is accepted; None if the suite does not attack a mixture."""
    target = prepared.target
    if MIXTURE not in prepared.attacks.white_box or "mixture" not in openings(target):
        return None
    ids = torch.arange(FOOLING, device=prepared.x_NCHW.device)
    _, channels, height, width = prepared.x_NCHW.shape
    images_NCHW = fool(
        View(target), ids % prepared.task.shape.classes, (channels, height, width), Draws(prepared.seed, ids)
    )
    with torch.no_grad(), reproducible(target, prepared.seed):
        return float(target.accept(images_NCHW).double().mean())  # type: ignore[operator]


def _budgets(suite: Suite, threat: ThreatModel) -> list[dict[str, Any]]:
    """Return the budget of each attack that the suite runs under the threat model."""
    suite = suite.within(threat)
    groups = suite.white_box if threat.knowledge == "white-box" else ()
    return [attack.budget(threat) for attack in dict.fromkeys((*suite.oblivious, *groups))]


def _figures(verdict: Verdict, images: int) -> dict[str, Any]:
    return {
        "accuracy": verdict.accuracy,
        "interval": wilson(verdict.accuracy, images),
        "worst": verdict.worst,
        "error": verdict.error,
        "rejection": verdict.rejection,
    }
