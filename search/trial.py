"""One trial: train a defense or load it, then score it at every inference setting. No Ray, Optuna or W&B in here.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

import attacks.suite
from attacks.robustness import craft_oblivious
from defenses.base import Batches, Defended, Defense, Metrics
from search import classifiers, tasks
from search.classifiers import Classifier
from search.latency import Lane, Latency, device_name, measure
from search.score import Candidate, Exam
from search.store import Store, fingerprint, to_bytes, write_atomic
from search.study import Study
from spaces.space import GRID_LIMIT, Params, Scalar, SearchSpace, draw

Report = Callable[[int, Metrics], None]
"""Told of each epoch, counted from 1; it may raise to stop the trial, whose progress stays in the store."""

SAMPLE = 5
"""Further inference settings at which a fit is scored where the inference space is not finite and small."""


def silent(epoch: int, metrics: Metrics) -> None:
    """Report to nobody."""


def store_of(study: Study) -> Store:
    """Return the store that all searches of the study's storage share; no search can take its name."""
    return Store(Path(study.storage) / ".store")


class TrialError(RuntimeError):
    """A trial cannot be finished, and trying again will not help."""


def run_trial(study: Study, params: Params, store: Store, report: Report) -> list[Candidate]:
    """Train the fit of `params` or load it, and score it at every inference setting.

    Returns:
        The candidates, the proposed setting first.

    Raises:
        TrialError: the training diverged.
    """
    bench = Bench.of(study, store)
    key, defense = bench.fit(params, report)
    latency = bench.latency(defense)
    return [bench.candidate(key, defense, setting, latency) for setting in bench.settings(params)]


def baseline(study: Study, store: Store) -> Candidate:
    """Return the bare classifier as a candidate, scored by the same suite on the same images."""
    bench = Bench.of(study, store)
    score = bench.exam.score(bench.target.network, None)
    return Candidate(
        candidate="undefended",
        fit=bench.target.fingerprint,
        defense="none",
        task=study.task,
        params=Params({}, {}),
        score=score,
    )


class Bench:
    """What all trials of a study share in one process: data, classifiers and adversarial images on the device."""

    def __init__(self, study: Study, store: Store) -> None:
        self.study = study
        self.store = store
        self.plan = study.plan()
        uses_gpu = torch.cuda.is_available() and study.gpus_per_trial != 0
        self.device = torch.device("cuda" if uses_gpu else "cpu")
        self.lane = Lane(self.device)

    @staticmethod
    def of(study: Study, store: Store) -> Bench:
        """Return the process's bench of this study, made on first use."""
        return _bench(study.model_dump_json(), store.root)

    @cached_property
    def training(self) -> tuple[Tensor, Tensor]:
        return self._load("train", self.study.train_images)

    @cached_property
    def target(self) -> Classifier:
        return self.classifier(self.plan.task.classifier)

    def classifier(self, architecture: str) -> Classifier:
        task = self.plan.task
        return classifiers.obtain(self.study, task, architecture, self.store, lambda: self.training, self.device)

    @cached_property
    def consulted(self) -> Classifier:
        """What the defense's training may consult."""
        if self.plan.defense.consults == "target":
            return self.target
        return self.classifier(self.plan.task.partner)

    @cached_property
    def exam(self) -> Exam:
        x_NCHW, y_N = self._load("validation", self.plan.eval_images)
        images = self._oblivious(x_NCHW, y_N)
        return Exam(self.plan.suite, self.plan.threat, x_NCHW, y_N, images, self.study.seed)

    def build(self, params: Params) -> Defense:
        torch.manual_seed(self.study.seed)
        return self.plan.defense(params.train, params.inference, self.plan.task.shape).to(self.device)

    def fit(self, params: Params, report: Report) -> tuple[str, Defense]:
        """Return the fit of `params` and its fingerprint: from the store, or trained from where it stopped."""
        key = self.fingerprint(params)
        defense = self.build(params)
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
            threat=str(self.plan.threat),
            attacks=str(attacks.suite.SUITES["quick"]),
            images=self.study.cheap_images,
            classifier=self.target.fingerprint,
            setting=self.plan.space.usual(),
            seed=self.study.seed,
        )

    def fingerprint(self, params: Params) -> str:
        """Return the fit's fingerprint: everything that shapes it."""
        sources = [m for m in self.plan.defense.__mro__ if m.__module__.startswith("defenses.")]
        return fingerprint(
            source=[inspect.getsource(sys.modules[m.__module__]) for m in sources],
            knobs=dict(params.train),
            data=tasks.checksum(self.plan.task.dataset, self.study.data_dir),
            images=self.study.train_images,
            classifier=self.consulted.fingerprint,
            seed=self.study.seed,
        )

    def settings(self, params: Params) -> list[Params]:
        """Return the inference settings at which a fit is scored, the proposed one first."""
        space = self.plan.space
        whole = SearchSpace({}, space.inference, space.defaults)
        size = whole.size()
        if size is not None and size <= GRID_LIMIT:
            others = [setting.inference for setting in whole.grid()]
        else:
            rng = np.random.default_rng(self.study.seed)
            others = [{n: draw(d, rng) for n, d in space.inference.items()} for _ in range(SAMPLE)]
        chosen = [params.inference, *(other for other in others if other != params.inference)]
        return [Params(params.train, inference) for inference in chosen]

    def candidate(self, key: str, defense: Defense, params: Params, latency: Latency) -> Candidate:
        exam, defended = self.exam, Defended(defense.at(params.inference), self.target.network)
        with self.lane.working():
            score = exam.score(defended, latency)
        return Candidate(
            candidate=f"{key[:8]}-{fingerprint(**params.inference)[:4]}",
            fit=key,
            defense=self.study.defense,
            task=self.study.task,
            params=params,
            score=score,
        )

    def latency(self, defense: Defense) -> Latency:
        """Return the latency, measured once for each setting of the knobs that can change it and each device."""
        knobs = {**_latency_knobs(defense.train_knobs), **_latency_knobs(defense.inference_knobs)}
        key = fingerprint(
            defense=inspect.getsource(sys.modules[type(defense).__module__]),
            knobs=knobs,
            shape=str(defense.shape),
            device=device_name(self.device),
        )
        with self.store.lock("latency", key):
            if self.store.get("latency", key) is None:
                found = measure(defense, self.lane, self.device)
                self.store.put("latency", key, {}, {**found.to_json(), "knobs": knobs})
        about = self.store.about("latency", key)
        about.pop("knobs")
        return Latency(**about)

    def picture(self, params: Params, path: Path, images: int = 10) -> Path:
        """Write a PNG with rows of clean, attacked (oblivious targeted iFGSM) and purified images."""
        _, defense = self.fit(params, silent)
        attacked = self.exam.oblivious[attacks.suite.IFGSM_TARGETED.name][:images]
        with torch.no_grad(), attacks.suite.reproducible(defense, self.study.seed):
            rows = torch.stack([self.exam.x_NCHW[:images], attacked, defense.purify(attacked)])
        return write_atomic(path, png(rows))

    def _train(self, key: str, defense: Defense, params: Params, report: Report) -> Path:
        state = self.store.load_progress(key, self.device) or {"curve": []}
        if "defense" in state:
            defense.resume(state["defense"])
        curve: list[Metrics] = state["curve"]
        (x_NCHW, y_N), exam, knobs = self.training, self.exam, defense.train_knobs
        target = self.target.network
        # A fit's rungs must not depend on the inference setting at which it happened to be proposed.
        defense.at(self.plan.space.usual())
        batches = Batches(
            x_NCHW,
            y_N,
            epochs=knobs.epochs,
            batch_size=knobs.batch_size,
            seed=self.study.seed,
            start=len(curve),
            boundary=self.lane.boundary,
        )
        with self.lane.working():
            for metrics in defense.fit(batches, self.consulted.network):
                _finite(metrics, len(curve) + 1)
                metrics["cheap"] = exam.cheap(Defended(defense, target), self.study.cheap_images)
                curve.append(metrics)
                if len(curve) < knobs.epochs:
                    self.store.save_progress(key, {"defense": defense.progress(), "curve": curve})
                    report(len(curve), metrics)
        about = {
            "defense": self.study.defense,
            "task": self.study.task,
            "knobs": dict(params.train),
            "curve": curve,
            "rungs": self.rungs(),
        }
        entry = self.store.put("fits", key, {"weights.safetensors": to_bytes(defense)}, about)
        self.store.drop_progress(key)
        report(len(curve), curve[-1])
        return entry

    def _load(self, split: Literal["train", "validation"], limit: int | None) -> tuple[Tensor, Tensor]:
        x_NCHW, y_N = tasks.load(self.plan.task.dataset, split, self.study.data_dir, limit)
        return x_NCHW.to(self.device), y_N.to(self.device)

    def _oblivious(self, x_NCHW: Tensor, y_N: Tensor) -> Mapping[str, Tensor]:
        """Return the adversarial images that depend on the classifier alone, made once for all searches."""
        suite = self.plan.suite.with_rungs()
        key = fingerprint(
            source=inspect.getsource(attacks.suite),
            attacks=[str(attack) for attack in suite.oblivious],
            eps=self.plan.threat.eps,
            classifier=self.target.fingerprint,
            images=len(y_N),
            seed=self.study.seed,
        )
        with self.store.lock("oblivious", key):
            entry = self.store.get("oblivious", key)
            if entry is None:
                made = craft_oblivious(suite, self.target.network, x_NCHW, y_N, self.plan.threat, self.study.seed)
                content = save({name: tensor.cpu().contiguous() for name, tensor in made.items()})
                entry = self.store.put("oblivious", key, {"images.safetensors": content}, {"task": self.study.task})
        return load_file(entry / "images.safetensors", device=str(self.device))


def png(rows_RNCHW: Tensor, zoom: int = 3) -> bytes:
    """Return images in [0, 1] as a PNG, R rows of N."""
    rows, images, channels, height, width = rows_RNCHW.shape
    grid = rows_RNCHW.permute(0, 3, 1, 4, 2).reshape(rows * height, images * width, channels)
    pixels = (grid.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    buffer = io.BytesIO()
    image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def _finite(metrics: Metrics, epoch: int) -> None:
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise TrialError(f"the training diverged: {name} is {value} after epoch {epoch}")


def _latency_knobs(knobs: Any) -> dict[str, Scalar]:
    """Return the values of the knobs that can change the latency."""
    return {f.name: getattr(knobs, f.name) for f in fields(knobs) if f.metadata["latency"]}


@lru_cache(maxsize=1)
def _bench(study: str, root: Path) -> Bench:
    return Bench(Study.model_validate_json(study), Store(root))
