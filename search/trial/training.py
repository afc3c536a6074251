"""Fits: trained defenses, loaded from the store or trained from their last saved epoch.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn

import defenses
from attacks.seeding import seeded
from attacks.suites import SUITES
from defenses.base import Batches, Defended, Defense, Metrics, Tensors, halved
from search.data.guard import closed
from search.exceptions import TrialError
from search.storage.fingerprint import code_digests, fingerprint
from search.storage.store import Content, to_bytes
from search.trial.assets import Assets
from search.trial.baseline import ADVERSARIAL, ranked
from search.trial.evaluator import Evaluator
from spaces.domain import Scalar
from spaces.exceptions import InputError
from spaces.space import Params

Report = Callable[[int, Metrics], None]
"""Called after each epoch, counted from 1; it may raise to stop the trial, whose progress stays in the store."""


def silent(epoch: int, metrics: Metrics) -> None:
    """Ignore the report."""


class Trainer:
    """Trains the defenses of a study, or loads them from the store."""

    def __init__(self, assets: Assets) -> None:
        self.assets = assets
        self.study, self.resolved, self.store = assets.study, assets.resolved, assets.store

    def build(self, params: Params) -> Defense:
        adopts = self.resolved.defense.adopt is not Defense.adopt
        adopted = self.assets.classifier(self.resolved.task.classifier) if adopts else None
        torch.manual_seed(self.study.seed)
        with closed("built"):
            defense = self.resolved.defense(params.train, params.inference, self.resolved.task.shape)
            if adopted is not None:
                defense.adopt(adopted)
            return defense.to(self.assets.device)

    def fit(self, params: Params, report: Report) -> tuple[str, Defense]:
        """Return the fingerprint and fit of `params`, loaded from the store or trained from its last saved epoch."""
        defense = self.build(params)
        key = self._key(defense)
        with self.store.lock("fits", key):
            entry = self.store.get("fits", key)
            if entry is None:
                curve, rungs = self._given(defense) if self.study.weights else self._train(key, defense, report)
                about = {"defense": self.study.defense, "task": self.study.task, "knobs": dict(params.train)}
                weights = {"weights.safetensors": to_bytes(defense)}
                scored = {"curve": curve, "rungs": rungs, "threat": str(self.resolved.threat)}
                entry = self.store.put("fits", key, weights, {**about, **scored})
                self.store.drop_progress(key)
                if len(curve) == defense.train_knobs.epochs:  # a fit that ended early has reported its last epoch
                    report(len(curve), curve[-1])
            with closed("loaded"):
                defense.load_state_dict(load_file(entry / "weights.safetensors", device=str(self.assets.device)))
        return key, defense.at(params.inference).eval().requires_grad_(False)

    def curve(self, key: str) -> list[float]:
        """Return the quick score of each epoch of a finished fit; empty if it was scored in another way (`rungs`)."""
        about = self.store.about("fits", key)
        return [metrics["cheap"] for metrics in about["curve"]] if about["rungs"] == self.rungs() else []

    def rungs(self) -> str:
        """Return the fingerprint of how an epoch is scored: quick scores are comparable only if it is the same."""
        return fingerprint(
            source=code_digests(Evaluator.__module__),
            threat=str(self.resolved.threat),
            attacks=str(SUITES["quick"]),
            images=min(self.study.cheap_images, self.resolved.eval_images),
            classifier=self.assets.classifier_key(self.resolved.protected),
            setting=self.resolved.space.usual(),
            seed=self.study.seed,
        )

    def key(self, params: Params) -> str:
        """Return the fit's fingerprint, which covers everything that shapes it."""
        with torch.device("meta"), closed("built"):
            defense = self.resolved.defense(params.train, params.inference, self.resolved.task.shape)
        return self._key(defense)

    def _key(self, defense: Defense, *, trained: bool = False) -> str:
        """Return the fingerprint of a fit; `trained`: whatever weights the study has."""
        given = {"weights": self.study.weights} if self.study.weights and not trained else {}
        adopted = [self.resolved.task.classifier] if type(defense).adopt is not Defense.adopt else []
        return fingerprint(
            source=code_digests(type(defense).__module__),
            defense=type(defense).__qualname__,
            knobs=dict(defense.params.train),
            **self._trained_on((*adopted, *self.assets.consulted(defense))),
            **given,
        )

    def _trained_on(self, architectures: tuple[str, ...]) -> dict[str, object]:
        """Return what a fit depends on besides its defense, as parts of a fingerprint."""
        return {
            "data": self.assets.data_sha256,
            "images": self.assets.training_key,
            "classifiers": [self.assets.classifier_key(architecture) for architecture in architectures],
            "seed": self.study.seed,
            **self.assets.precision_key,
        }

    def adversarially_trained(self) -> dict[str, tuple[str, nn.Module]]:
        """Return the static baseline for a winner: the fit of an adversarially trained classifier by its name, if any.

        It is the best (`ranked`) of those that searches of this storage trained on the same images.
        """
        task, kind = self.resolved.task, (ADVERSARIAL, self.study.task)
        every = ((key, self.store.about("fits", key)) for key in self.store.keys("fits"))
        alike = {key: about for key, about in every if (about["defense"], about["task"]) == kind}
        known = {key: about for key, about in alike.items() if self._adversarial_key(about["knobs"]) == key}
        for key, name in ranked(known, self.resolved.threat, task.shape.classes):
            entry = self.store.get("fits", key)
            if entry is not None:
                defense = defenses.find(ADVERSARIAL)(known[key]["knobs"], {}, task.shape)
                defense.adopt(self.assets.classifier(task.classifier))
                defense.load_state_dict(load_file(entry / "weights.safetensors"))
                beside = Defended(defense, self.assets.target).to(self.assets.device)
                return {name: (key, beside.eval().requires_grad_(False))}
        return {}

    def _adversarial_key(self, knobs: Mapping[str, Scalar]) -> str | None:
        """Return the key that a fit of adversarial training has now; None for knobs of another version of it."""
        try:
            with torch.device("meta"):
                return self._key(defenses.find(ADVERSARIAL)(knobs, {}, self.resolved.task.shape), trained=True)
        except (TypeError, InputError):
            return None

    def _given(self, defense: Defense) -> tuple[list[Metrics], str]:
        """Load the weights that the study names in place of a training; return no epochs."""
        entry = self.store.get("weights", str(self.study.weights))
        if entry is None:
            raise TrialError(f"weights must lie in the store, but {self.study.weights} does not")
        with closed("loaded"):
            defense.load_state_dict(load_file(entry / "weights.safetensors", device=str(self.assets.device)))
        return [], self.rungs()

    def _train(self, key: str, defense: Defense, report: Report) -> tuple[list[Metrics], str]:
        """Train from the last saved epoch, and return the metrics of every epoch and how they were scored (`rungs`)."""
        assets, device_lock = self.assets, self.assets.device_lock
        state = self.store.load_progress(key, assets.device) or {"curve": []}
        if "defense" in state:
            defense.resume(state["defense"])
        curve: list[Metrics] = state["curve"]
        rungs = self.rungs() if state.get("rungs", self.rungs()) == self.rungs() else "several"
        (x_NCHW, y_N), evaluator, knobs = assets.training_set, assets.evaluator, defense.train_knobs
        consulted = assets.consulted(defense)
        networks = nn.ModuleList([assets.classifier(architecture) for architecture in consulted])
        target, trained = assets.target, assets.networks(defense, networks)

        def once(words: str, make: Callable[[], Tensors]) -> Tensors:
            with trained.exactly():  # what is made is attacked images, say, and no training
                return self._once(words, make, consulted)

        # A fit's quick scores must not depend on the inference setting with which it was proposed.
        defense.at(self.resolved.space.usual())
        batches = Batches(
            x_NCHW,
            y_N,
            epochs=knobs.epochs,
            batch_size=knobs.batch_size,
            seed=self.study.seed,
            start=len(curve),
            boundary=device_lock.boundary,
            once=once,
        )
        torch.manual_seed(self.study.seed)  # independent of what was trained or loaded before
        with device_lock.working():
            for metrics in trained.epochs(defense.fit(batches, networks if defense.bases() else networks[0])):
                _finite(metrics, len(curve) + 1)
                metrics["cheap"] = evaluator.cheap(Defended(defense, target), self.study.cheap_images)
                curve.append(metrics)
                if len(curve) < knobs.epochs:
                    with device_lock.away():
                        self.store.save_progress(key, {"defense": defense.progress(), "curve": curve, "rungs": rungs})
                        report(len(curve), metrics)
        return curve, rungs

    def _once(self, words: str, make: Callable[[], Tensors], consulted: tuple[str, ...]) -> Tensors:
        """Return tensors that depend on the training images and the consulted classifiers, made once for all fits."""
        source = code_digests(self.resolved.defense.__module__)
        key = fingerprint(words=words, source=source, **self._trained_on(consulted))

        def made() -> Content:
            with seeded(self.study.seed):
                tensors = {name: tensor.cpu().contiguous() for name, tensor in halved(make()).items()}
            return {"tensors.safetensors": save(tensors)}, {"words": words}

        # The process that holds the entry's lock may be waiting for the device lock.
        entry = self.store.cached("made", key, made, waiting=self.assets.device_lock.away())
        return load_file(entry / "tensors.safetensors", device=str(self.assets.device))


def _finite(metrics: Metrics, epoch: int) -> None:
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise TrialError(f"the training diverged: {name} is {value} after epoch {epoch}")
