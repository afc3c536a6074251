"""What all trials of a study share in one process: data, classifiers and adversarial images.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

import attacks.suites
from attacks.attack import Attack
from attacks.black_box import BlackBoxAttacker
from attacks.gradient_view import View
from attacks.threat import ThreatModel
from defenses.base import Defense
from search.classifiers import training
from search.classifiers.architectures import ARCHITECTURES
from search.classifiers.training import Classifier
from search.data import splits
from search.storage.fingerprint import code_digests, fingerprint
from search.storage.store import Store
from search.study.study import Study
from search.trial.device_lock import DeviceLock
from search.trial.evaluator import Evaluator


class Materials:
    """Data, classifiers and adversarial images of a study, on the device; each made on first use.

    Attributes:
        trained: the study as the fingerprints of what is trained see it; search/final/retraining.py says there
            that it takes the validation images too.
    """

    def __init__(self, study: Study, store: Store) -> None:
        self.study = study
        self.trained = study
        self.store = store
        self.resolved = study.resolved
        uses_gpu = torch.cuda.is_available() and study.gpus_per_trial != 0
        self.device = torch.device("cuda" if uses_gpu else "cpu")
        self.device_lock = DeviceLock(self.device)
        self._classifiers: dict[str, Classifier] = {}
        self._identities: dict[str, str] = {}

    @cached_property
    def training(self) -> tuple[Tensor, Tensor]:
        return self._load("train", self.study.train_images)

    @property
    def target(self) -> Classifier:
        """The classifier that is attacked."""
        return self.classifier(self.resolved.protected)

    def classifier(self, architecture: str) -> Classifier:
        if architecture not in self._classifiers:
            task, store = self.resolved.task, self.store
            found = training.obtain(self.trained, task, architecture, store, lambda: self.training, self.device)
            self._classifiers[architecture] = found
        return self._classifiers[architecture]

    def identity(self, architecture: str) -> str:
        """Return the fingerprint of a classifier, which need not be trained yet."""
        if architecture not in self._identities:
            self._identities[architecture] = training.identity(self.trained, self.resolved.task, architecture)
        return self._identities[architecture]

    def consulted(self, defense: Defense) -> tuple[str, ...]:
        """Return the architectures that the defense's training may consult: one, or its `bases`."""
        task = self.resolved.task
        return defense.bases() or (task.classifier if defense.consults == "target" else task.partner,)

    def needed(self) -> set[str]:
        """Return the architectures whose classifiers the study's usual setting asks for."""
        space = self.resolved.space
        usual = {name: space.usual_of(name, domain) for name, domain in space.train.items()}
        with torch.device("meta"):
            defense = self.resolved.defense(usual, space.usual(), self.resolved.task.shape)
        adopted = {self.resolved.task.classifier} if type(defense).adopt is not Defense.adopt else set()
        return {self.resolved.protected, *self.consulted(defense), *adopted}

    @cached_property
    def evaluator(self) -> Evaluator:
        x_NCHW, y_N = self._load("validation", self.resolved.eval_images)
        images, threat = self._oblivious(x_NCHW, y_N), self.resolved.threat
        attacker = self._attacker() if threat.knowledge == "black-box" else None
        return Evaluator(self.resolved.suite, threat, x_NCHW, y_N, images, self.study.seed, attacker)

    def _attacker(self) -> BlackBoxAttacker:
        """Return the black-box attacker: its images are the last of the validation split, which are not attacked."""
        x_NCHW = splits.load_held_out(self.resolved.task.dataset, self.study.data_dir)
        return BlackBoxAttacker(x_NCHW.to(self.device), lambda: self._substitute().to(self.device))

    def _substitute(self) -> nn.Module:
        return ARCHITECTURES[self.resolved.substitute].build(self.resolved.task.shape)

    def _load(self, split: Literal["train", "validation"], limit: int | None) -> tuple[Tensor, Tensor]:
        x_NCHW, y_N = splits.load(self.resolved.task.dataset, split, self.study.data_dir, limit)
        return x_NCHW.to(self.device), y_N.to(self.device)

    def _oblivious(self, x_NCHW: Tensor, y_N: Tensor) -> Mapping[str, Tensor]:
        """Return the images that depend on the classifier alone."""
        suite, threat = self.resolved.suite.with_rungs(), self.resolved.threat
        return {attack.name: self.adversarial(attack, x_NCHW, y_N, threat) for attack in suite.oblivious}

    def adversarial(self, attack: Attack, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel) -> Tensor:
        """Return the images that an attack makes of the bare classifier, made once for all searches.

        Args:
            x_NCHW: the first images of the validation split, with their labels.
        """
        key = fingerprint(
            source=code_digests(attacks.suites.__name__),
            attack=str(attack),
            norm=threat.norm,
            eps=threat.eps,
            classifier=self.identity(self.resolved.protected),
            images=len(y_N),
            seed=self.study.seed,
        )
        with self.store.lock("oblivious", key):
            entry = self.store.get("oblivious", key)
            if entry is None:
                target = self.target.network  # first: it may wait for a lock
                with self.device_lock.working():
                    made = attack.craft(View(target), x_NCHW, y_N, threat, self.study.seed)
                content = save({"images": made.cpu().contiguous()})
                about = {"task": self.study.task, **attack.budget(threat)}
                entry = self.store.put("oblivious", key, {"images.safetensors": content}, about)
        return load_file(entry / "images.safetensors", device=str(self.device))["images"]
