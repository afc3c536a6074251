"""Scores a fit at its inference settings: attack it once, time it once, and judge it at every threshold.

Shapes: S columns of suspicion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import attacks.suites
from attacks.attack import ROWS
from attacks.gradient_view import BATCH
from attacks.risk_coverage import Point, pick, risk_coverage
from attacks.verdicts import Observation
from defenses.base import Defended, Defense
from search.data.splits import HELD_OUT
from search.exceptions import TrialError
from search.storage.fingerprint import code_digests, fingerprint
from search.storage.store import Content
from search.study.candidate import Candidate, Images, Latency
from search.study.ranking import feasible, unattacked_constraints
from search.trial.assets import Assets
from search.trial.evaluator import Evaluation
from search.trial.latency import device_name, measure
from search.trial.race import Dropped, Entrant, Rivals, contenders, first_images
from spaces.domain import Scalar
from spaces.space import GRID_LIMIT, Params

SAMPLE = 5
"""Further inference settings at which a fit is scored if the inference space is not finite and small."""


Scored = Callable[[int, int, int], None]
"""Called after each inference setting: how many were attacked in this round, of how many, and on how many images."""


def unheard(done: int, settings: int, images: int) -> None:
    """Ignore the progress of a scoring."""


class Scorer:
    """Scores the fits of a study."""

    def __init__(self, assets: Assets) -> None:
        self.assets = assets
        self.study, self.resolved, self.store = assets.study, assets.resolved, assets.store

    def settings(self, params: Params) -> list[Params]:
        """Return the inference settings at which a fit is scored, the proposed one first."""
        space = self.resolved.space.at(params.train)
        size = space.size()
        if size is not None and size <= GRID_LIMIT:
            others = list(space.grid())
        else:
            rng, others = np.random.default_rng(self.study.seed), list[Params]()
            while len(others) < SAMPLE:  # the same for all fits, so that they are comparable
                if (drawn := space.drawn(rng)) not in others:
                    others.append(drawn)
        return [params, *(other for other in others if other != params)]

    def check_memory(self, defense: Defense, settings: Sequence[Params]) -> None:
        """Raise a TrialError if an attack on the defense at one of the settings does not fit into the memory."""
        suite, device = self.resolved.suite, self.assets.device
        for params in settings:
            defense.at(params.inference)
            images = self.resolved.eval_images
            several = min(images, max(1, ROWS // (suite.draws * defense.candidates_each)), BATCH) * suite.draws
            images = max(several, min(images, BATCH) if suite.known else 0)
            parts = defense.memory(images)
            if parts and (free := free_bytes(device)) is not None and sum(parts.values()) > free:
                flat = params.flat()
                less = " or ".join(f"{knob} (now {flat[knob]}: {_gib(size)})" for knob, size in parts.items())
                raise TrialError(
                    f"an attack must fit into the memory of {device_name(device)}, of which {_gib(free)} are free, but "
                    f"the gradient of {images} images takes {_gib(sum(parts.values()))}: lower {less}"
                )

    def raced(
        self, key: str, defense: Defense, settings: Sequence[Params], rivals: Rivals = (), heard: Scored = unheard
    ) -> tuple[list[Candidate], list[Dropped]]:
        """Return the candidates of one fit, the first setting's first, and the settings that lost the race.

        Until some candidate satisfies the constraints, dropped settings that may are attacked on all images too, the
        best first.
        """
        if not self._races(defense, settings):
            return self.candidates(key, defense, settings, heard), []
        entrants = list[Entrant]()
        for params in settings:
            entrants.append(self._entrant(key, defense.at(params.inference)))
            heard(len(entrants), len(settings), len(entrants[-1].verdicts_N))
        device = device_name(self.assets.device)
        kept = sorted({0, *contenders(entrants, [(ms, accuracy) for name, ms, accuracy in rivals if name == device])})
        lost = sorted(set(range(len(settings))) - set(kept), key=lambda i: -entrants[i].accuracy)
        found = self.candidates(key, defense, [settings[i] for i in kept], heard)
        able = [i for i in lost if entrants[i].feasible]
        while able and not feasible(self.study, found):
            lost.remove(i := able.pop(0))
            found += self.candidates(key, defense, [settings[i]])
        return found, [Dropped.of(settings[i], entrants[i]) for i in lost]

    def _races(self, defense: Defense, settings: Sequence[Params]) -> bool:
        """Return whether settings can be dropped: not where thresholds share one evaluation, or on few images."""
        evaluator = self.assets.evaluator
        enough = first_images(len(evaluator.y_N)) > 0
        alone = len(settings) < 2 or defense.thresholds() or evaluator.attacker is not None
        return self.study.scoring == "race" and enough and not alone

    def _entrant(self, key: str, defense: Defense) -> Entrant:
        """Return a setting as attacked on the images that decide a race."""
        evaluator, scored = self.assets.evaluator, self.scores_key(key, defense)
        whole = self.store.get("scores", scored) is not None
        found = self.evaluation(key, defense).found if whole else self._begin(scored, defense)
        clean, latency_ms = found.judge().clean, self.latency(defense).ms_p50
        exceeded = unattacked_constraints(self.study, clean.accuracy, clean.rejection, latency_ms)
        return Entrant(evaluator.verdicts(found), latency_ms, max(exceeded.values()) <= 0)

    def _begin(self, key: str, defense: Defense) -> Observation:
        """Return a setting's outputs under attack on the images that decide a race, computed once as `evaluation`."""

        def attacked() -> Content:
            with self.assets.device_lock.working():
                found = self.assets.evaluator.begin(Defended(defense, self.assets.target))
            said = Evaluation(found, (), found.clean)  # the gates and the noise are for those who win
            return {"said.safetensors": said.tensors()}, said.about()

        entry = self.store.cached("races", key, attacked)
        tensors = load_file(entry / "said.safetensors").items()
        on_device = {name: tensor.to(self.assets.device) for name, tensor in tensors}
        return Evaluation.of(on_device, self.store.about("races", key)).found

    def candidates(
        self, key: str, defense: Defense, settings: Sequence[Params], heard: Scored = unheard
    ) -> list[Candidate]:
        """Return the candidates of one fit; settings that differ only in thresholds share one evaluation.

        If thresholds are searched, each such group gets one more setting, picked from the group's risk-coverage curve:
        the least attacked error at the clean rejection that the study allows.
        """
        evaluator, scored = self.assets.evaluator, dict[str, Candidate]()
        groups: dict[str, Evaluation] = {}
        for done, params in enumerate(settings, start=1):
            thresholds, aimed = defense.thresholds(), self.aimed(params)
            rest = fingerprint(**aimed.inference)
            latency, wanted = self.latency(defense.at(params.inference)), [params]
            if rest not in groups:
                groups[rest] = self.evaluation(key, defense.at(aimed.inference))
                curve = risk_coverage(groups[rest].found) if thresholds and evaluator.attacker is None else []
                wanted += self._picked(params, thresholds, curve)
            for one in wanted:
                score = evaluator.score(groups[rest], defense.at(one.inference).limits(), latency)
                if one is not params:
                    score = replace(score, risk_coverage=tuple((p.clean_rejection, p.attacked_error) for p in curve))
                mark = fingerprint(**one.inference)
                name = f"{key[:8]}-{mark[:6]}"
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
            heard(done, len(settings), len(evaluator.y_N))
        return list(scored.values())

    def evaluation(self, fit: str, defense: Defense | None) -> Evaluation:
        """Return a target's outputs under attack, computed once for all searches of the storage.

        Args:
            fit: the defense's fingerprint.
            defense: the defense at the setting that is attacked; None for the bare classifier.
        """

        key = self.scores_key(fit, defense)

        def attacked() -> Content:
            evaluator, bare = self.assets.evaluator, self.assets.target
            begun = self._begin(key, defense) if defense is not None and self.store.get("races", key) else None
            with self.assets.device_lock.working():
                said = evaluator.probe(bare if defense is None else Defended(defense, bare), begun)
            return {"said.safetensors": said.tensors()}, said.about()

        entry = self.store.cached("scores", key, attacked)
        return Evaluation.of(load_file(entry / "said.safetensors"), self.store.about("scores", key))

    def verdicts(self, fit: str, defense: Defense, params: Params) -> bytes | None:
        """Return the verdicts on each image at a setting, clean and attacked; None if the store has no such outputs."""
        attacked = defense.at(self.aimed(params).inference)
        if self.store.get("scores", self.scores_key(fit, attacked)) is None:
            return None
        found = self.evaluation(fit, attacked).found.judge(defense.at(params.inference).limits())
        kinds = [each for each in (found.clean, found.oblivious, found.black_box, found.white_box) if each]
        return b"".join(part.numpy().tobytes() for each in kinds for part in (each.right, each.wrong))

    def scores_key(self, fit: str, defense: Defense | None) -> str:
        """Return the fingerprint of one evaluation, which covers everything that shapes its outputs."""
        threat = self.resolved.threat
        return fingerprint(
            source=code_digests(Evaluation.__module__),
            fit=fit,
            setting=dict(defense.params.inference) if defense else {},
            classifier=self.assets.classifier_key(self.resolved.protected),
            suite=repr(self.resolved.suite),
            threat=repr(threat),
            attacker=[self.resolved.substitute, HELD_OUT] if threat.knowledge == "black-box" else [],
            images=self.resolved.eval_images,
            seed=self.study.seed,
        )

    def aimed(self, params: Params) -> Params:
        """Return the setting that is attacked: with the usual thresholds, the same for all candidates of a fit.

        A black-box attacker is an exception, since what it learns depends on what is rejected.
        """
        if self.resolved.threat.knowledge == "black-box":
            return params
        usual, names = self.resolved.space.usual(), self.resolved.defense.thresholds()
        return Params(params.train, {**params.inference, **{name: usual[name] for name in names}})

    def _picked(self, params: Params, thresholds: Sequence[str], curve: Sequence[Point]) -> list[Params]:
        """Return the setting with the thresholds that the curve picks; none if the space fixes a threshold."""
        if any(self.resolved.space.inference[name].single() for name in thresholds):
            return []
        point = pick(curve, self.study.max_clean_rejection)
        limits = dict(zip(thresholds, point.limits, strict=True)) if point else {}
        return [Params(params.train, {**params.inference, **limits})] if limits else []

    def latency(self, defense: Defense) -> Latency:
        """Return the latency, measured once for each setting of the knobs that can change it and each device."""
        knobs = {**_latency_knobs(defense.train_knobs), **_latency_knobs(defense.inference_knobs)}
        key = fingerprint(
            source=code_digests(type(defense).__module__, measure.__module__, attacks.suites.__name__),
            defense=type(defense).__qualname__,
            knobs=knobs,
            shape=str(defense.shape),
            device=device_name(self.assets.device),
            classifier=self.assets.classifier_key(self.resolved.protected),  # of these data
            suite=repr(self.resolved.suite),
            threat=[self.resolved.threat.norm, self.resolved.threat.eps],
            images=self.resolved.eval_images,
            seed=self.study.seed,
        )
        self.store.cached("latency", key, lambda: ({}, {**self.measured(defense).to_json(), "knobs": knobs}))
        about = self.store.about("latency", key)
        about.pop("knobs")
        return Latency(**about)

    def measured(self, defense: Defense) -> Latency:
        """Measure the latency now, on the evaluation's clean and oblivious images; the stored latency stays."""
        evaluator, target = self.assets.evaluator, self.assets.target
        # A network that no training has had in its hands, which might have slowed it.
        bare = self.resolved.task.build(self.resolved.protected).to(self.assets.device)
        bare.load_state_dict(target.state_dict())
        kinds: dict[Images, Tensor] = {
            "clean": evaluator.x_NCHW,
            "attacked": torch.cat(list(evaluator.oblivious.values())),
        }
        return measure(Defended(defense, bare.requires_grad_(False)), kinds, self.assets.device_lock)


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process can still take on a device; None if nobody says."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        most = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return min(free + held, most) - used
    left = []
    with suppress(OSError):
        (line,) = re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
        left.append(1024 * int(line))
    with suppress(OSError, ValueError):  # the limit of a control group, "max" where there is none
        group = Path("/sys/fs/cgroup")
        limit, taken, stat = (group.joinpath(f"memory.{name}").read_bytes() for name in ("max", "current", "stat"))
        (cached,) = re.findall(rb"^inactive_file (\d+)$", stat, re.MULTILINE)  # given back where it is needed
        left.append(int(limit) - int(taken) + int(cached))
    return min(left, default=None)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2g} GiB"


def _latency_knobs(knobs: Any) -> dict[str, Scalar]:
    """Return the values of the knobs that can change the latency."""
    return {f.name: getattr(knobs, f.name) for f in fields(knobs) if f.metadata["latency"]}
