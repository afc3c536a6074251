"""One trial: train a defense or load it, then score it at every inference setting. No Ray, Optuna or W&B in here.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

import attacks.suite
import attacks.tidy
import defenses
from attacks.coverage import Point, pick, risk_coverage
from attacks.robustness import Outsider
from attacks.view import View
from defenses.base import Batches, Defended, Defense, Metrics, Tensors, halved
from search import classifiers, tasks
from search.architectures import ARCHITECTURES
from search.classifiers import Classifier
from search.latency import Lane, Latency, device_name, measure
from search.score import Candidate, Exam, Probed
from search.store import Store, fingerprint, to_bytes, write_atomic
from search.study import HELD_OUT, Study
from spaces.space import GRID_LIMIT, InputError, Params, Scalar, SearchSpace, draw

Report = Callable[[int, Metrics], None]
"""Told of each epoch, counted from 1; it may raise to stop the trial, whose progress stays in the store."""

ADVERSARIAL = "adversarial_training"
SAMPLE = 5
"""Further inference settings at which a fit is scored where the inference space is not finite and small."""


def silent(epoch: int, metrics: Metrics) -> None:
    """Report to nobody."""


def store_of(study: Study) -> Store:
    """Return the store that all searches of the study's storage share; no search can take its name."""
    return Store(Path(study.storage) / ".store")


class TrialError(RuntimeError):
    """A trial cannot be finished, and trying again will not help."""


def run_trial(study: Study, params: Params, store: Store, report: Report, *, alone: bool = False) -> list[Candidate]:
    """Train the fit of `params` or load it, and score it at every inference setting.

    Args:
        alone: score it at the proposed setting alone.

    Returns:
        The candidates, the proposed setting first.

    Raises:
        TrialError: the training diverged.
    """
    bench = Bench.of(study, store)
    key, defense = bench.fit(params, report)
    return bench.candidates(key, defense, [params] if alone else bench.settings(params))


def baseline(study: Study, store: Store) -> Candidate:
    """Return the bare classifier as a candidate, scored by the same suite on the same images."""
    bench = Bench.of(study, store)
    bare, exam = bench.target.network, bench.exam
    found = exam.observe(bare)
    score = exam.score(exam.probe(bare, found), found.limits_S, None)
    return Candidate(
        candidate="undefended",
        fit=bench.target.fingerprint,
        defense="none",
        task=study.label,
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
        """The classifier that is attacked."""
        return self.classifier(self.plan.protected)

    def classifier(self, architecture: str) -> Classifier:
        task = self.plan.task
        return classifiers.obtain(self.study, task, architecture, self.store, lambda: self.training, self.device)

    @property
    def _adopted(self) -> Classifier:
        """The classifier that a defense may take over: its task's."""
        return self.classifier(self.plan.task.classifier)

    def consulted(self, defense: Defense) -> list[Classifier]:
        """Return what the defense's training may consult: one classifier, or those of its `bases`."""
        return [self.classifier(architecture) for architecture in self._consulted(defense)]

    def _consulted(self, defense: Defense) -> tuple[str, ...]:
        task = self.plan.task
        return defense.bases() or (task.classifier if defense.consults == "target" else task.partner,)

    def needed(self) -> set[str]:
        """Return the architectures whose classifiers the study's usual setting asks for."""
        space = self.plan.space
        usual = {name: space.usual_of(name, domain) for name, domain in space.train.items()}
        with torch.device("meta"):
            defense = self.plan.defense(usual, space.usual(), self.plan.task.shape)
        adopted = {self.plan.task.classifier} if type(defense).adopt is not Defense.adopt else set()
        return {self.plan.protected, *self._consulted(defense), *adopted}

    @cached_property
    def exam(self) -> Exam:
        x_NCHW, y_N = self._load("validation", self.plan.eval_images)
        images, threat = self._oblivious(x_NCHW, y_N), self.plan.threat
        outsider = self._outsider() if threat.knowledge == "black-box" else None
        return Exam(self.plan.suite, threat, x_NCHW, y_N, images, self.study.seed, outsider)

    def _outsider(self) -> Outsider:
        """Return the black-box attacker: its images are the last of the validation split, which are not attacked."""
        x_NCHW, _ = self._load("validation", None)
        return Outsider(x_NCHW[-HELD_OUT:], lambda: self._substitute().to(self.device))

    def _substitute(self) -> nn.Module:
        return ARCHITECTURES[self.plan.substitute].build(self.plan.task.shape)

    def build(self, params: Params) -> Defense:
        torch.manual_seed(self.study.seed)
        defense = self.plan.defense(params.train, params.inference, self.plan.task.shape)
        if type(defense).adopt is not Defense.adopt:
            defense.adopt(self._adopted.network)
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
            threat=str(self.plan.threat),
            attacks=str(attacks.suite.SUITES["quick"]),
            images=self.study.cheap_images,
            classifier=self.target.fingerprint,
            setting=self.plan.space.usual(),
            seed=self.study.seed,
        )

    def fingerprint(self, params: Params) -> str:
        """Return the fit's fingerprint: everything that shapes it."""
        return self._fingerprint(self.build(params))

    def _fingerprint(self, defense: Defense) -> str:
        return fingerprint(
            source=_texts(type(defense).__module__),
            knobs=dict(defense.params.train),
            data=tasks.checksum(self.plan.task.dataset, self.study.data_dir),
            images=self.study.train_images,
            classifiers=[
                *([self._adopted.fingerprint] if type(defense).adopt is not Defense.adopt else []),
                *(classifier.fingerprint for classifier in self.consulted(defense)),
            ],
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
                defense = defenses.find(ADVERSARIAL)(about["knobs"], {}, self.plan.task.shape)
            except (TypeError, InputError):
                continue  # of another version of the defense
            defense.adopt(self._adopted.network)
            entry = self.store.get("fits", key) if self._fingerprint(defense) == key else None
            if entry is not None:
                defense.load_state_dict(load_file(entry / "weights.safetensors"))
                beside = Defended(defense, self.target.network).to(self.device)
                return {"adversarially trained": beside.eval().requires_grad_(False)}
        return {}

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

    def candidates(self, key: str, defense: Defense, settings: Sequence[Params]) -> list[Candidate]:
        """Return the candidates of one fit; settings that differ in thresholds alone share what the model said.

        To the settings of each such group comes the one that the group's risk-coverage curve picks where thresholds
        are searched: the least attacked error at the clean rejection that the study allows.
        """
        exam, scored = self.exam, dict[str, Candidate]()
        groups: dict[str, Probed] = {}
        for params in settings:
            thresholds, aimed = defense.thresholds(), self.aimed(params)
            rest = fingerprint(**aimed.inference)
            latency, wanted = self.latency(defense.at(params.inference)), [params]
            if rest not in groups:
                defended = Defended(defense.at(aimed.inference), self.target.network)
                with self.lane.working():
                    groups[rest] = exam.probe(defended, exam.observe(defended))
                curve = risk_coverage(groups[rest].found) if thresholds and exam.outsider is None else []
                wanted += self._picked(params, thresholds, curve)
            for one in wanted:
                score = exam.score(groups[rest], defense.at(one.inference).limits(), latency)
                if one is not params:
                    score = replace(score, risk_coverage=tuple((p.clean_rejection, p.attacked_error) for p in curve))
                mark = fingerprint(**one.inference)
                name = f"{key[:8]}-{mark[:4]}"
                if name in scored and scored[name].params != one:
                    name = f"{key[:8]}-{mark}"
                scored[name] = Candidate(
                    candidate=name,
                    fit=key,
                    defense=self.study.defense,
                    task=self.study.label,
                    params=one,
                    score=score,
                )
        return list(scored.values())

    def aimed(self, params: Params) -> Params:
        """Return the setting at which the attacks aim: that of the thresholds is the same for all of a fit.

        But what a black-box attacker learns depends on what is rejected.
        """
        if self.plan.threat.knowledge == "black-box":
            return params
        usual, names = self.plan.space.usual(), self.plan.defense.thresholds()
        return Params(params.train, {**params.inference, **{name: usual[name] for name in names}})

    def _picked(self, params: Params, thresholds: Sequence[str], curve: Sequence[Point]) -> list[Params]:
        """Return the setting with the thresholds that the curve picks; a threshold that the space fixes stays."""
        if any(self.plan.space.inference[name].single() for name in thresholds):
            return []
        point = pick(curve, self.study.max_clean_rejection)
        limits = dict(zip(thresholds, point.limits, strict=True)) if point else {}
        return [Params(params.train, {**params.inference, **limits})] if limits else []

    def latency(self, defense: Defense) -> Latency:
        """Return the latency, measured once for each setting of the knobs that can change it and each device."""
        knobs = {**_latency_knobs(defense.train_knobs), **_latency_knobs(defense.inference_knobs)}
        key = fingerprint(
            source=_texts(type(defense).__module__, measure.__module__),
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

    def clock(self, params: Params) -> Latency:
        """Measure the latency of a stored fit's setting again; what the store holds stays."""
        _, defense = self.fit(params, silent)
        return measure(defense, self.lane, self.device)

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
        rungs = self.rungs() if state.get("rungs", self.rungs()) == self.rungs() else "several"
        (x_NCHW, y_N), exam, knobs = self.training, self.exam, defense.train_knobs
        consulted = self.consulted(defense)
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
            once=lambda words, make: self._once(words, make, consulted),
        )
        torch.manual_seed(self.study.seed)  # whatever was trained or loaded before
        networks = nn.ModuleList([classifier.network for classifier in consulted])
        with self.lane.working():
            for metrics in defense.fit(batches, networks if defense.bases() else networks[0]):
                _finite(metrics, len(curve) + 1)
                metrics["cheap"] = exam.cheap(Defended(defense, target), self.study.cheap_images)
                curve.append(metrics)
                if len(curve) < knobs.epochs:
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
            source=_texts(self.plan.defense.__module__),
            data=tasks.checksum(self.plan.task.dataset, self.study.data_dir),
            images=self.study.train_images,
            classifiers=[classifier.fingerprint for classifier in consulted],
            seed=self.study.seed,
        )
        with self.lane.away():  # whoever holds the lock may be waiting for the lane
            held = self.store.lock("made", key).acquire()
        with held:
            entry = self.store.get("made", key)
            if entry is None:
                with attacks.tidy.seeded(self.study.seed):
                    made = {name: tensor.cpu().contiguous() for name, tensor in halved(make()).items()}
                entry = self.store.put("made", key, {"tensors.safetensors": save(made)}, {"words": words})
        return load_file(entry / "tensors.safetensors", device=str(self.device))

    def _load(self, split: Literal["train", "validation"], limit: int | None) -> tuple[Tensor, Tensor]:
        x_NCHW, y_N = tasks.load(self.plan.task.dataset, split, self.study.data_dir, limit)
        return x_NCHW.to(self.device), y_N.to(self.device)

    def _oblivious(self, x_NCHW: Tensor, y_N: Tensor) -> Mapping[str, Tensor]:
        """Return the images that depend on the classifier alone, each attack's made once for all searches."""
        suite, threat = self.plan.suite.with_rungs(), self.plan.threat
        images = {}
        for attack in suite.oblivious:
            key = fingerprint(
                source=_texts(attacks.suite.__name__),
                attack=str(attack),
                norm=threat.norm,
                eps=threat.eps,
                classifier=self.target.fingerprint,
                images=len(y_N),
                seed=self.study.seed,
            )
            with self.store.lock("oblivious", key):
                entry = self.store.get("oblivious", key)
                if entry is None:
                    made = attack.craft(View(self.target.network), x_NCHW, y_N, threat, self.study.seed)
                    content = save({"images": made.cpu().contiguous()})
                    about = {"task": self.study.task, **attack.budget(threat)}
                    entry = self.store.put("oblivious", key, {"images.safetensors": content}, about)
            images[attack.name] = load_file(entry / "images.safetensors", device=str(self.device))["images"]
        return images


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


def _texts(*modules: str) -> list[str]:
    """Return the source of modules and, of the defenses and attacks, of those from which they take anything."""
    found, left = set[str](), list(modules)
    while left:
        name = left.pop()
        if name not in found and (name in modules or name.partition(".")[0] in ("defenses", "attacks")):
            found.add(name)
            taken = vars(sys.modules[name]).values()
            left += [str(getattr(v, "__name__" if inspect.ismodule(v) else "__module__", "")) for v in taken]
    return [inspect.getsource(sys.modules[name]) for name in sorted(found)]


def _latency_knobs(knobs: Any) -> dict[str, Scalar]:
    """Return the values of the knobs that can change the latency."""
    return {f.name: getattr(knobs, f.name) for f in fields(knobs) if f.metadata["latency"]}


@lru_cache(maxsize=1)
def _bench(study: str, root: Path) -> Bench:
    return Bench(Study.model_validate_json(study), Store(root))
