"""Trainings of a final run: on train and validation together, with seeds that the searches did not use.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

import defenses
from attacks.black_box import BlackBoxAttacker
from attacks.threat import ThreatModel
from defenses.base import Defended, Metrics
from search.data import splits
from search.engine.jobs import Tell
from search.export.loader import Exported
from search.formatting import spoken_eps
from search.storage.fingerprint import fingerprint
from search.study.resolved import ResolvedStudy
from search.study.study import Study
from search.trial.baseline import ADVERSARIAL, name_of
from search.trial.runner import TrialRunner
from search.trial.training import silent
from spaces.domain import Scalar
from spaces.space import Params

FIRST_SEED = 1000
STEPS = 10
"""Gradient steps of the baseline's adversarial training, each of 2.5 eps / steps. Source: Madry et al. 2017."""
EPOCHS, UPDATES, MOST, WARM_UP = 20, 1000, 100, 10
"""Epochs of the baseline's training: the least; as many as make so many updates, but at most `MOST`; and those in which
its eps grows, without which it stays at chance on digits at eps 0.3. One that has not converged is named so."""


@dataclass(frozen=True, kw_only=True)
class ExportedWinner:
    """An export to retrain and evaluate.

    Args:
        folder: the folder of the export.
        identity: the fingerprint of its weights and setting.
        study: the study of its search, moved to the storage and cluster of this run.
        target: the export as loaded.
        evidence: the content of its evidence.json.
    """

    folder: Path
    identity: str
    study: Study
    params: Params
    threat: ThreatModel
    target: Exported
    evidence: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.evidence["candidate"])

    @cached_property
    def resolved(self) -> ResolvedStudy:
        """The resolved study of the search."""
        return self.study.resolved

    def attacker(self, device: torch.device) -> BlackBoxAttacker:
        """Return the black-box attacker; it starts from the last validation images, as in a search."""
        task, substitute = self.resolved.task, self.resolved.substitute
        x_NCHW = splits.load_held_out(task.dataset, self.study.data_dir)
        return BlackBoxAttacker(x_NCHW.to(device), lambda: task.build(substitute).to(device))

    def trainings(self) -> Iterator[tuple[str, Study, Params]]:
        """Yield the trainings of each seed: the defense, and the adversarially trained classifier as a baseline.

        The baseline starts from the weights of the undefended classifier, because with random weights the loss stays at
        chance level for long at large eps, and its eps grows over the first epochs. It trains against PGD at the norm
        and eps of the export, for at least `EPOCHS` epochs and `UPDATES` updates, and as many epochs as the defense or
        the classifier have. An epoch costs `STEPS` + 1 passes forward and back over all images: beside a small defense
        this is most of the training of a final run.
        """
        yield self.name, self.study, self.params
        beside: dict[str, Any] = {
            "defense": ADVERSARIAL,
            "task": f"{self.resolved.task.dataset}/{self.resolved.protected}",
            "protect": None,
            "partner": None,
            "threat": "white-box",  # of its quick scores, which say whether it has converged
            "space": "default",
            "knobs": {},
            "epochs": None,
            "method": "random",
        }
        yield ADVERSARIAL, self.study.model_copy(update=beside), Params(self._adversarial(), {})

    def _adversarial(self) -> dict[str, Scalar]:
        """Return the knobs of the baseline's adversarial training."""
        knobs: dict[str, Any] = {
            "attack": "pgd",
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "pgd_steps": STEPS,
            "pgd_step_size": max(1e-4, 2.5 * self.threat.eps / STEPS),
            "warm_up": WARM_UP,
            "start": "pretrained",
        }
        usual = asdict(defenses.find(ADVERSARIAL).Train(**knobs))
        sizes = splits.sizes(self.resolved.task.dataset, self.study.data_dir)
        images = min(self.study.train_images or sizes.train, sizes.train) + sizes.validation
        least = min(MOST, math.ceil(UPDATES / math.ceil(images / usual["batch_size"])))
        return {**usual, "epochs": max(EPOCHS, least, epochs(self.params), self.study.classifier_epochs)}

    def runner(self, study: Study, seed: int) -> TrialRunner:
        """Return the trial runner of one seed, which trains on train + validation; rungs use validation images."""
        free = splits.sizes(self.resolved.task.dataset, study.data_dir).attackable("black-box")
        rungs = {"suite": "quick", "eval_images": min(study.cheap_images, free)}
        whole = study.model_copy(update={"seed": seed, "eps": self.threat.eps, "norm": self.threat.norm, **rungs})
        return TrialRunner(whole, whole.store.expected(), with_validation=True)


def _baseline(runner: TrialRunner, key: str) -> str:
    """Return the name of the trained baseline, which says so if it has not converged."""
    threat, shape = runner.assets.resolved.threat, runner.assets.resolved.task.shape
    return name_of(runner.assets.store.about("fits", key), threat, shape.classes)


def epochs(params: Params) -> int:
    return int(params.train.get("epochs", 1))


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model to evaluate on the test split.

    Args:
        export: the name of its export; empty for a baseline.
        name: its name in tables.
        identity: the fingerprint of everything that shaped it.
        threat: the norm and eps of all attacks on it; their knowledge varies.
        classifier: the fingerprint of the bare classifier.
        target: the model to attack.
        substitute: the architecture that the black-box attacker trains.
    """

    export: str
    name: str
    identity: str
    classifier: str
    target: nn.Module
    threat: ThreatModel
    attacker: BlackBoxAttacker
    substitute: str


def train(cases: Sequence[ExportedWinner], seed: int, tell: Tell) -> None:
    """Train the missing fits of a seed; fits in the store are reused, and unfinished ones continue."""
    asked = [(case, *training) for case in cases for training in case.trainings()]
    whole, before = sum(epochs(params) for *_, params in asked), 0
    for case, name, study, params in asked:
        mine = epochs(params)
        tell(f"{name}, and the classifiers that it needs", before / whole)

        def report(epoch: int, metrics: Metrics, name: str = name, mine: int = mine, before: int = before) -> None:
            tell(f"{name}: epoch {epoch}/{mine}", (before + epoch) / whole)

        case.runner(study, seed).trainer.fit(params, report)
        before += mine


def evaluated_models(cases: Sequence[ExportedWinner], seed: int) -> list[EvaluatedModel]:
    """Return the models of one seed, whose fits are in the store; a baseline of several exports appears once."""
    found = dict[str, EvaluatedModel]()
    for case in cases:
        for name, study, params in case.trainings():
            runner = case.runner(study, seed)
            key, defense = runner.trainer.fit(params, silent)
            protected, threat = runner.assets.resolved.protected, replace(case.threat, knowledge="white-box")
            where, own = f"{protected}, {threat.norm} eps {spoken_eps(threat.eps)}", name == case.name
            spoken = case.study.defense if own else _baseline(runner, key)
            made = EvaluatedModel(
                export=name if own else "",
                name=f"{spoken} ({where})",
                identity=fingerprint(fit=key, setting=dict(params.inference)),
                classifier=runner.assets.classifier_key(protected),
                target=Defended(defense, runner.assets.target).eval().requires_grad_(False),
                threat=threat,
                attacker=case.attacker(runner.assets.device),
                substitute=case.resolved.substitute,
            )
            bare = replace(
                made,
                export="",
                name=f"undefended ({where})",
                identity=made.classifier,
                target=runner.assets.target,
            )
            for one in (made, bare):
                mark = fingerprint(export=one.export, model=one.identity, threat=repr(threat), by=one.substitute)
                alike = {(other.export, other.name) for known, other in found.items() if known != mark}
                apart = f" beside {case.name}" if (one.export, one.name) in alike else ""
                found.setdefault(mark, replace(one, name=one.name + apart))
    return list(found.values())
