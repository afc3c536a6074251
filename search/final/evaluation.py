"""Attacks the models of a final run on the test split, in blocks of images whose results are stored.

Shapes: D draws, N images, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

import attacks.black_box
from attacks.attack import Attack, AttackError
from attacks.audit.audit import audit
from attacks.catalog import IFGSM_TARGETED
from attacks.evaluation import observe
from attacks.gradient_view import View, bare
from attacks.suites import SUITES, Suite, craft_oblivious
from attacks.verdicts import Verdict, worse
from defenses.base import Defended
from search.engine.jobs import Tell
from search.export.confirm import confirm, written
from search.final.retraining import EvaluatedModel, ExportedWinner
from search.storage.fingerprint import code_digests, fingerprint
from search.storage.store import Content, Store
from search.study.candidate import Latency
from search.trial.device_lock import DeviceLock
from search.trial.evaluator import Evaluator
from search.trial.latency import device_name, measure
from spaces.exceptions import InputError
from spaces.space import Params

BLOCK = 500
"""Test images per block; a run that dies repeats at most one block."""
FULL, AUTOATTACK = "full", "standard"


@dataclass(frozen=True)
class FinalVerdicts:
    """Verdicts on some images, keyed by evaluation (`clean`, `full/oblivious`, ...).

    Args:
        trail: accuracy after each attack of AutoAttack, and each oblivious and black-box attack of `full`.
        about: further data, as JSON.
    """

    verdicts: Mapping[str, Verdict]
    trail: Mapping[str, float]
    about: Mapping[str, Any]

    def tensors(self) -> bytes:
        parts = {f"{part} {what}": getattr(v, part) for what, v in self.verdicts.items() for part in ("right", "wrong")}
        # Verdicts may share memory, which safetensors does not allow.
        return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in parts.items()})

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> FinalVerdicts:
        named = sorted(name.removeprefix("right ") for name in tensors if name.startswith("right "))
        verdicts = {what: Verdict(tensors[f"right {what}"], tensors[f"wrong {what}"]) for what in named}
        return cls(verdicts, about["trail"], about["about"])

    @classmethod
    def joined(cls, blocks: Sequence[FinalVerdicts]) -> FinalVerdicts:
        """Return the verdicts of several blocks of images as one."""
        images = [next(iter(block.verdicts.values())).right.shape[1] for block in blocks]
        verdicts = {
            what: Verdict(*(torch.cat([getattr(b.verdicts[what], p) for b in blocks], 1) for p in ("right", "wrong")))
            for what in blocks[0].verdicts
        }
        trail = {
            name: sum(n * block.trail[name] for n, block in zip(images, blocks, strict=True)) / sum(images)
            for name in blocks[0].trail
        }
        return cls(verdicts, trail, blocks[0].about)


@dataclass(frozen=True, kw_only=True)
class ReportedAttack(Attack):
    """An attack that reports its name when it is run."""

    say: Callable[[str], None]

    def craft(self, *images: Any, **more: Any) -> Tensor:
        self.say(self.name)
        return super().craft(*images, **more)


def reported(suite: Suite, say: Callable[[str], None]) -> Suite:
    """Return the suite with attacks that report their names when they are run."""

    def each(group: Sequence[Attack]) -> tuple[Attack, ...]:
        return tuple(
            ReportedAttack(**{f.name: getattr(attack, f.name) for f in fields(attack)}, say=say) for attack in group
        )

    oblivious, white_box, transfer = map(each, (suite.oblivious, suite.white_box, suite.transfer))
    return replace(suite, oblivious=oblivious, white_box=white_box, transfer=transfer)


def blocks(images: int) -> list[slice]:
    """Return the slices of the blocks of so many images."""
    return [slice(start, min(start + BLOCK, images)) for start in range(0, images, BLOCK)]


class FinalEvaluator:
    """Evaluates the models of one seed on the test images.

    Args:
        steps: the total number of blocks and comparisons, for the progress display.
    """

    def __init__(
        self, x_NCHW: Tensor, y_N: Tensor, seed: int, store: Store, device_lock: DeviceLock, tell: Tell, steps: int
    ) -> None:
        self.x_NCHW, self.y_N = x_NCHW, y_N
        self.seed = seed
        self.store = store
        self.device_lock = device_lock
        self.steps = steps
        self._tell = tell
        self._ended = 0
        self._substitutes: dict[str, tuple[nn.Module, int]] = {}

    def evaluate(self, models: Sequence[EvaluatedModel]) -> list[FinalVerdicts]:
        """Return the verdicts on each model: under `full` with all knowledge levels, and under AutoAttack."""
        found: list[list[FinalVerdicts]] = [[] for _ in models]
        for block in blocks(len(self.y_N)):
            crafted: dict[str, Mapping[str, Tensor]] = {}
            for model, kept in zip(models, found, strict=True):
                kept.append(self._kept(model, block, crafted))
        return [FinalVerdicts.joined(each) for each in found]

    def _kept(self, model: EvaluatedModel, block: slice, crafted: dict[str, Mapping[str, Tensor]]) -> FinalVerdicts:
        suites = [repr(SUITES[name].within(model.threat)) for name in (FULL, AUTOATTACK)]
        key = self.key(model, suites=suites, block=[block.start, block.stop], images=self._digest(block))
        return self.once(key, lambda: self._attack_block(model, block, crafted), model.name)

    def _say(self, model: EvaluatedModel, doing: str, attack: str = "") -> None:
        self._tell(f"{model.name}, {doing} {attack}", self._ended / self.steps)

    def key(self, model: EvaluatedModel, **more: object) -> str:
        """Return the fingerprint of everything that affects a verdict."""
        return fingerprint(
            source=code_digests(attacks.black_box.__name__, __name__, Evaluator.__module__),
            split="test",
            model=model.identity,
            classifier=model.classifier,
            threat=repr(model.threat),
            substitute=model.substitute,
            seed=self.seed,
            **more,
        )

    def _digest(self, chosen: slice) -> str:
        """Return the SHA-256 of some images and their labels: a user may add other test images under the same name."""
        parts = (self.x_NCHW[chosen], self.y_N[chosen])
        return hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in parts)).hexdigest()

    def once(self, key: str, make: Callable[[], FinalVerdicts], name: str) -> FinalVerdicts:
        """Return the verdicts from the store; if they are missing, call `make` and store its result."""
        kept = True

        def made() -> Content:
            nonlocal kept
            kept = False
            with self.device_lock.working():
                verdicts = make()
            about = {"model": name, "seed": self.seed, "trail": dict(verdicts.trail), "about": dict(verdicts.about)}
            return {"verdicts.safetensors": verdicts.tensors()}, about

        entry = self.store.cached("finals", key, made)
        if kept:
            self._tell(f"{name}, kept from an earlier run", self._ended / self.steps)
        self._ended += 1
        return FinalVerdicts.of(load_file(entry / "verdicts.safetensors"), self.store.about("finals", key))

    def timed(self, model: EvaluatedModel) -> Latency:
        """Return the latency of a model, measured once for each kind of device, alone on the device."""

        def measured() -> Content:
            target, attack = cast(Defended, model.target), IFGSM_TARGETED
            x_NCHW, y_N, blind = self.x_NCHW[:BLOCK], self.y_N[:BLOCK], replace(model.threat, knowledge="oblivious")
            with self.device_lock.working():
                attacked_NCHW = attack.craft(View(target.classifier), x_NCHW, y_N, blind, self.seed)
            return {}, measure(target, {"clean": x_NCHW, "attacked": attacked_NCHW}, self.device_lock).to_json()

        by = code_digests(DeviceLock.__module__, device_name.__module__)
        timed = [device_name(self.x_NCHW.device), min(BLOCK, len(self.y_N))]
        key = self.key(model, timed=timed, by=by)
        self.store.cached("finals", key, measured)
        return Latency(**self.store.about("finals", key))

    def _attack_block(
        self, model: EvaluatedModel, block: slice, crafted: dict[str, Mapping[str, Tensor]]
    ) -> FinalVerdicts:
        """Attack one model on one block of images, by AutoAttack first, because `full` contains its attacks."""
        target, images = model.target, (self.x_NCHW[block], self.y_N[block])
        blind, white = (replace(model.threat, knowledge=knowledge) for knowledge in ("oblivious", "white-box"))
        rest = tuple(attack for attack in SUITES[FULL].white_box if attack not in SUITES[AUTOATTACK].white_box)
        auto, full = (
            reported(suite, partial(self._say, model, f"images {block.start} to {block.stop}: {suite.name}"))
            for suite in (SUITES[AUTOATTACK], replace(SUITES[FULL], white_box=rest))
        )
        bareness = fingerprint(classifier=model.classifier, threat=repr(blind))
        if bareness not in crafted:  # all defenses of one classifier get the same adversarial examples
            crafted[bareness] = craft_oblivious(full, bare(target), *images, blind, self.seed)
        seen: dict[str, Any] = {"seed": self.seed, "white_box": True}
        first = {attack.name: crafted[bareness][attack.name] for attack in auto.within(white).oblivious}
        alone = observe(auto, target, *images, white, oblivious=first, **seen).judge()
        substitute, queries = self._substitute(model)
        dark = craft_oblivious(full, substitute, *images, replace(blind, knowledge="black-box"), self.seed)
        seen |= {"oblivious": crafted[bareness], "black_box": dark, "standing_N": (~alone.strongest.wrong).any(dim=0)}
        found = observe(full, target, *images, blind, **seen).judge()
        assert found.black_box is not None
        verdicts = {
            "clean": found.clean,
            f"{FULL}/oblivious": found.oblivious,
            f"{FULL}/black-box": found.black_box,
            f"{FULL}/white-box": found.strongest & alone.strongest,
            f"{AUTOATTACK}/white-box": alone.strongest,
        }
        # The rest of `full` skips images that AutoAttack broke, so its trail would be misleading.
        others = {name: left for name, left in found.trail.items() if not name.startswith("white-box")}
        trail = {f"{FULL}/{k}": v for k, v in others.items()} | {f"{AUTOATTACK}/{k}": v for k, v in alone.trail.items()}
        return FinalVerdicts(verdicts, trail, {"queries": queries, "images": [block.start, block.stop]})

    def _substitute(self, model: EvaluatedModel) -> tuple[nn.Module, int]:
        """Return the black-box attacker's substitute and its number of queries; trained once for all blocks."""
        key = self.key(model)
        if key not in self._substitutes:
            self._say(model, "the black-box attacker learns")
            found = model.attacker.substitute(model.target, self.seed)
            self._substitutes[key] = found.network, found.queries
        return self._substitutes[key]

    def compare(self, case: ExportedWinner, model: EvaluatedModel, aimed: Params) -> FinalVerdicts:
        """Run the attacks of the search and the audit, which used validation images, on the test split.

        Args:
            model: the winner, as exported or retrained.
            aimed: the setting that the search's attacks target.
        """
        images = min(case.evidence["images"], len(self.y_N))
        suites = [repr(case.resolved.suite), repr(SUITES["audit"])]
        shaping = {
            "images": self._digest(slice(images)),
            "knowledge": case.threat.knowledge,
            "aimed": dict(aimed.inference),
        }
        key = self.key(model, compared=suites, **shaping)
        return self.once(key, lambda: self._compared(case, model, aimed, images), model.name)

    def _compared(self, case: ExportedWinner, model: EvaluatedModel, aimed: Params, images: int) -> FinalVerdicts:
        self._say(model, "the search's suite and the audit")
        x_NCHW, y_N, threat = self.x_NCHW[:images], self.y_N[:images], case.threat
        target = cast(Defended, model.target)
        attacker = model.attacker if threat.knowledge == "black-box" else None
        blind = craft_oblivious(case.resolved.suite, target.classifier, x_NCHW, y_N, threat, self.seed)
        evaluator = Evaluator(case.resolved.suite, threat, x_NCHW, y_N, blind, self.seed, attacker)
        limits_S = target.defense.limits()
        target.defense.at(aimed.inference)
        again = evaluator.observe(target).judge(limits_S)
        target.defense.at(case.params.inference)
        audited = again.attacked
        try:
            found = audit(target, x_NCHW, y_N, threat, seed=self.seed + 1, attacker=attacker)
            audited = worse(found.robustness.attacked, audited)
            with written(target, case.evidence["model"], case.target.code) as folder:
                gates = confirm(folder, found.versions, found.right, y_N, seed=self.seed + 1)
            alarms = [gate.alarm for gate in (*found.gates, *gates) if not gate.passed]
        except (AttackError, InputError) as error:
            alarms = [f"it cannot be audited: {error}"]
        return FinalVerdicts({"search": again.attacked, "audit": audited}, again.trail, {"alarms": alarms})
