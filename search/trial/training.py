"""Fits: trained defenses, from the store or trained from where they stopped.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn

import defenses
from attacks.seeding import seeded
from attacks.suites import SUITES
from defenses.base import Batches, Defended, Defense, Metrics, Tensors, halved
from search.classifiers.training import Classifier
from search.data import splits
from search.exceptions import TrialError
from search.storage.fingerprint import code_digests, fingerprint
from search.storage.store import to_bytes
from search.trial.assets import Materials
from search.trial.evaluator import Evaluator
from spaces.exceptions import InputError
from spaces.space import Params

Report = Callable[[int, Metrics], None]
"""Told of each epoch, counted from 1; it may raise to stop the trial, whose progress stays in the store."""

ADVERSARIAL = "adversarial_training"


def silent(epoch: int, metrics: Metrics) -> None:
    """Report to nobody."""


class Fits(Materials):
    """The fits of a study."""

    def build(self, params: Params) -> Defense:
        torch.manual_seed(self.study.seed)
        defense = self.resolved.defense(params.train, params.inference, self.resolved.task.shape)
        if type(defense).adopt is not Defense.adopt:
            defense.adopt(self.classifier(self.resolved.task.classifier).network)
        return defense.to(self.device)

    def fit(self, params: Params, report: Report) -> tuple[str, Defense]:
        """Return the fit of `params` and its fingerprint: from the store, or trained from where it stopped."""
        defense = self.build(params)
        key = self._fingerprint(defense)
        with self.store.lock("fits", key):
            entry = self.store.get("fits", key)
            if entry is None:
                entry = self._train(key, defense, params, report)
            defense.load_state_dict(load_file(entry / "weights.safetensors", device=str(self.device)))
        return key, defense.at(params.inference).eval().requires_grad_(False)

    def curve(self, key: str) -> list[float]:
        """Return the rung score of each epoch of a finished fit; nothing where another study's rungs scored it."""
        about = self.store.about("fits", key)
        return [metrics["cheap"] for metrics in about["curve"]] if about["rungs"] == self.rungs() else []

    def rungs(self) -> str:
        """Return the fingerprint of what scores an epoch: rung scores compare only where it is the same."""
        return fingerprint(
            source=code_digests(Evaluator.__module__),
            threat=str(self.resolved.threat),
            attacks=str(SUITES["quick"]),
            images=min(self.study.cheap_images, self.resolved.eval_images),
            classifier=self.identity(self.resolved.protected),
            setting=self.resolved.space.usual(),
            seed=self.study.seed,
        )

    def fingerprint(self, params: Params) -> str:
        """Return the fit's fingerprint: everything that shapes it."""
        with torch.device("meta"):
            return self._fingerprint(self.resolved.defense(params.train, params.inference, self.resolved.task.shape))

    def _fingerprint(self, defense: Defense) -> str:
        adopted = [self.resolved.task.classifier] if type(defense).adopt is not Defense.adopt else []
        return fingerprint(
            source=code_digests(type(defense).__module__),
            defense=type(defense).__qualname__,
            knobs=dict(defense.params.train),
            data=splits.checksum(self.resolved.task.dataset, self.study.data_dir),
            images=self.trained.train_images,
            classifiers=[self.identity(architecture) for architecture in (*adopted, *self.consulted(defense))],
            seed=self.study.seed,
        )

    def adversarially_trained(self) -> dict[str, nn.Module]:
        """Return the static baseline beside a winner: the adversarially trained classifier, where there is one.

        Of those that searches of this storage trained on the same images it is the one of the best last epoch, those
        whose epochs were scored as this study scores them first.
        """
        fits = ((key, self.store.about("fits", key)) for key in self.store.keys("fits"))
        kind = ADVERSARIAL, self.study.task
        alike = [(key, about) for key, about in fits if (about["defense"], about["task"]) == kind]
        for key, about in sorted(
            alike, key=lambda fit: (fit[1]["rungs"] != self.rungs(), -fit[1]["curve"][-1]["cheap"])
        ):
            try:
                defense = defenses.find(ADVERSARIAL)(about["knobs"], {}, self.resolved.task.shape)
            except (TypeError, InputError):
                continue  # of another version of the defense
            defense.adopt(self.classifier(self.resolved.task.classifier).network)
            entry = self.store.get("fits", key) if self._fingerprint(defense) == key else None
            if entry is not None:
                defense.load_state_dict(load_file(entry / "weights.safetensors"))
                beside = Defended(defense, self.target.network).to(self.device)
                return {"adversarially trained": beside.eval().requires_grad_(False)}
        return {}

    def _train(self, key: str, defense: Defense, params: Params, report: Report) -> Path:
        state = self.store.load_progress(key, self.device) or {"curve": []}
        if "defense" in state:
            defense.resume(state["defense"])
        curve: list[Metrics] = state["curve"]
        rungs = self.rungs() if state.get("rungs", self.rungs()) == self.rungs() else "several"
        (x_NCHW, y_N), evaluator, knobs = self.training, self.evaluator, defense.train_knobs
        consulted = [self.classifier(architecture) for architecture in self.consulted(defense)]
        target = self.target.network
        # A fit's rungs must not depend on the inference setting at which it happened to be proposed.
        defense.at(self.resolved.space.usual())
        batches = Batches(
            x_NCHW,
            y_N,
            epochs=knobs.epochs,
            batch_size=knobs.batch_size,
            seed=self.study.seed,
            start=len(curve),
            boundary=self.device_lock.boundary,
            once=lambda words, make: self._once(words, make, consulted),
        )
        torch.manual_seed(self.study.seed)  # whatever was trained or loaded before
        networks = nn.ModuleList([classifier.network for classifier in consulted])
        with self.device_lock.working():
            for metrics in defense.fit(batches, networks if defense.bases() else networks[0]):
                _finite(metrics, len(curve) + 1)
                metrics["cheap"] = evaluator.cheap(Defended(defense, target), self.study.cheap_images)
                curve.append(metrics)
                if len(curve) < knobs.epochs:
                    with self.device_lock.away():
                        self.store.save_progress(key, {"defense": defense.progress(), "curve": curve, "rungs": rungs})
                        report(len(curve), metrics)
        about = {
            "defense": self.study.defense,
            "task": self.study.task,
            "knobs": dict(params.train),
            "curve": curve,
            "rungs": rungs,
        }
        entry = self.store.put("fits", key, {"weights.safetensors": to_bytes(defense)}, about)
        self.store.drop_progress(key)
        if len(curve) == knobs.epochs:  # one that stopped early has reported its last epoch
            report(len(curve), curve[-1])
        return entry

    def _once(self, words: str, make: Callable[[], Tensors], consulted: Sequence[Classifier]) -> Tensors:
        """Return tensors that depend on the training images and the consulted classifiers, made once for all fits."""
        key = fingerprint(
            words=words,
            source=code_digests(self.resolved.defense.__module__),
            data=splits.checksum(self.resolved.task.dataset, self.study.data_dir),
            images=self.trained.train_images,
            classifiers=[classifier.fingerprint for classifier in consulted],
            seed=self.study.seed,
        )
        with self.device_lock.away():  # whoever holds the lock may be waiting for the lane
            held = self.store.lock("made", key).acquire()
        with held:
            entry = self.store.get("made", key)
            if entry is None:
                with seeded(self.study.seed):
                    made = {name: tensor.cpu().contiguous() for name, tensor in halved(make()).items()}
                entry = self.store.put("made", key, {"tensors.safetensors": save(made)}, {"words": words})
        return load_file(entry / "tensors.safetensors", device=str(self.device))


def _finite(metrics: Metrics, epoch: int) -> None:
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise TrialError(f"the training diverged: {name} is {value} after epoch {epoch}")
