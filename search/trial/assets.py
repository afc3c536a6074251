"""The assets that all trials of a study share in one process: data, classifiers and adversarial images.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

import attacks.suites
from attacks.attack import Attack
from attacks.black_box import BlackBoxAttacker
from attacks.gradient_view import View
from attacks.suites import Suite
from attacks.threat import ThreatModel
from defenses.base import Defense
from search.classifiers import augmented
from search.classifiers.training import classifier_key, train
from search.data import splits
from search.data.guard import closed
from search.storage.fingerprint import code_digests, fingerprint
from search.storage.store import Content, Store, to_bytes
from search.study.study import Study
from search.trial.device_lock import DeviceLock
from search.trial.evaluator import Evaluator
from search.trial.precision import Networks, settled, tensor_float32


class Assets:
    """Data, classifiers and adversarial images of a study, on the device; each is made or loaded on first use.

    Args:
        with_validation: train on the validation images too, as a final run does.
    """

    def __init__(self, study: Study, store: Store, *, with_validation: bool = False) -> None:
        self.study = study
        self.resolved = study.resolved
        self.store = store
        self.with_validation = with_validation
        uses_gpu = torch.cuda.is_available() and study.gpus_per_trial != 0
        self.device = torch.device("cuda" if uses_gpu else "cpu")
        self.precision = settled(study.precision, self.device)
        tensor_float32(False)
        self.device_lock = DeviceLock(self.device)
        self._classifiers: dict[str, nn.Module] = {}
        self._keys: dict[str, str] = {}

    # Training data.

    @property
    def training_key(self) -> object:
        """The identity of the training images in fingerprints; that of a final run differs from that of any search."""
        return ["train and validation", self.study.train_images] if self.with_validation else self.study.train_images

    @property
    def precision_key(self) -> dict[str, object]:
        """The precision of trainings as a part of fingerprints; float32 has none, as before there was another."""
        return {} if self.precision == "float32" else {"precision": self.precision}

    @property
    def recipe_key(self) -> dict[str, object]:
        """The classifiers' recipe as a part of fingerprints; the plain one has none, as before there was another."""
        return {} if self.study.classifier_recipe == "plain" else {"recipe": code_digests(augmented.__name__)}

    def networks(self, *modules: nn.Module) -> Networks:
        """Return networks, and those of defenses, to be trained in the study's precision."""
        return Networks(self.precision, self.device, *modules)

    @cached_property
    def training_set(self) -> tuple[Tensor, Tensor]:
        """The training images x_NCHW and their labels y_N, on the device."""
        task, study = self.resolved.task, self.study
        if self.with_validation:
            return _whole(task.dataset, study.data_dir, study.train_images, self.device)
        x_NCHW, y_N = self._load("train", study.train_images)
        return x_NCHW.to(self.device), y_N.to(self.device)

    @cached_property
    def data_sha256(self) -> str:
        return splits.checksum(self.resolved.task.dataset, self.study.data_dir)

    def _load(self, split: splits.Split, limit: int | None) -> tuple[Tensor, Tensor]:
        return splits.load(self.resolved.task.dataset, split, self.study.data_dir, limit)

    # Classifiers.

    @property
    def target(self) -> nn.Module:
        """The classifier that is attacked."""
        return self.classifier(self.resolved.protected)

    def classifier(self, architecture: str) -> nn.Module:
        """Return a frozen classifier from the store; one process trains it if it is missing, while others wait."""
        if architecture not in self._classifiers:
            task = self.resolved.task
            network, about = (
                task.build(architecture).to(self.device),
                {"task": task.dataset, "architecture": architecture},
            )

            def trained() -> Content:
                if (given := task.given_weights(architecture)) is not None:
                    return {"weights.safetensors": given}, {**about, "trained_by": "its owner"}
                x_NCHW, y_N = self.training_set
                learn = train if self.study.classifier_recipe == "plain" else augmented.train_augmented
                with self.device_lock.working(), self.networks(network).training():
                    accuracy = learn(network, x_NCHW, y_N, self.study.classifier_epochs, self.study.seed)
                return {"weights.safetensors": to_bytes(network)}, {**about, "training_accuracy": accuracy}

            entry = self.store.cached("classifiers", self.classifier_key(architecture), trained)
            network.load_state_dict(load_file(entry / "weights.safetensors", device=str(self.device)))
            self._classifiers[architecture] = network.eval().requires_grad_(False)
        return self._classifiers[architecture]

    def classifier_key(self, architecture: str) -> str:
        """Return the fingerprint of a classifier, trained or not; of one that came with weights, it is theirs."""
        if architecture not in self._keys:
            own = self.resolved.task.added(architecture)
            if own is not None and own.weights is not None:
                self._keys[architecture] = fingerprint(own=own.digest, data=self.data_sha256)
            else:
                self._keys[architecture] = classifier_key(
                    architecture,
                    data=self.data_sha256,
                    images=self.training_key,
                    epochs=self.study.classifier_epochs,
                    seed=self.study.seed,
                    **({"own": own.digest} if own else {}),
                    **self.recipe_key,
                    **self.precision_key,
                )
        return self._keys[architecture]

    def consulted(self, defense: Defense) -> tuple[str, ...]:
        """Return the architectures that the defense's training may consult: one, or its `bases`."""
        task = self.resolved.task
        return defense.bases() or (task.classifier if defense.consults == "target" else self.resolved.partner,)

    def needed(self) -> set[str]:
        """Return the architectures whose classifiers are needed at the study's usual setting."""
        space, task = self.resolved.space, self.resolved.task
        usual = {name: space.usual_of(name, domain) for name, domain in space.train.items()}
        with torch.device("meta"), closed("built"):
            defense = self.resolved.defense(usual, space.usual(), task.shape)
        adopted = {task.classifier} if type(defense).adopt is not Defense.adopt else set()
        return {self.resolved.protected, *self.consulted(defense), *adopted}

    # Attacks.

    @cached_property
    def evaluator(self) -> Evaluator:
        """The images and attacks on which every candidate of the study is evaluated."""
        return self.evaluator_of(self.resolved.suite)

    def evaluator_of(self, suite: Suite) -> Evaluator:
        """Return the same with another suite."""
        resolved = self.resolved
        x_NCHW, y_N = (part.to(self.device) for part in self._load("validation", resolved.eval_images))
        oblivious = {
            attack.name: self.adversarial(attack, x_NCHW, y_N, resolved.threat)
            for attack in suite.with_rungs().oblivious
        }
        attacker = self._attacker() if resolved.threat.knowledge == "black-box" else None
        return Evaluator(suite, resolved.threat, x_NCHW, y_N, oblivious, self.study.seed, attacker)

    def _attacker(self) -> BlackBoxAttacker:
        held_out_NCHW = splits.load_held_out(self.resolved.task.dataset, self.study.data_dir).to(self.device)
        resolved = self.resolved
        return BlackBoxAttacker(held_out_NCHW, lambda: resolved.task.build(resolved.substitute).to(self.device))

    def adversarial(self, attack: Attack, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel) -> Tensor:
        """Return the adversarial images of an attack on the bare classifier, made once for all searches.

        Args:
            x_NCHW: the first images of the validation split, with their labels.
        """
        key = fingerprint(
            source=code_digests(attacks.suites.__name__),
            attack=str(attack),
            norm=threat.norm,
            eps=threat.eps,
            classifier=self.classifier_key(self.resolved.protected),
            images=len(y_N),
            seed=self.study.seed,
        )

        def crafted() -> Content:
            target = self.target  # before the device lock, as it may wait for another lock
            with self.device_lock.working():
                images_NCHW = attack.craft(View(target), x_NCHW, y_N, threat, self.study.seed)
            about = {"task": self.study.task, **attack.budget(threat)}
            return {"images.safetensors": save({"images": images_NCHW.cpu().contiguous()})}, about

        entry = self.store.cached("oblivious", key, crafted)
        return load_file(entry / "images.safetensors", device=str(self.device))["images"]


@lru_cache(maxsize=1)
def _whole(dataset: str, data_dir: str | None, limit: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the training and validation images together; all trainings of a final run share them."""
    parts = [splits.load(dataset, "train", data_dir, limit), splits.load(dataset, "validation", data_dir)]
    return torch.cat([x for x, _ in parts]).to(device), torch.cat([y for _, y in parts]).to(device)
