"""The evaluation of every candidate of a study: a target's outputs under attack, and the score computed from them.

The outputs are kept in the store, so that verdicts at other thresholds need no further forward pass.
Shapes: D draws, N images, C channels, H x W pixels, S columns of suspicion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from attacks.audit.gate import Gate
from attacks.audit.quick_gates import noise_gate, noisy, quick_gates
from attacks.black_box import BlackBoxAttacker
from attacks.evaluation import evaluate, observe, untouched
from attacks.suites import SUITES, Suite
from attacks.threat import Knowledge, ThreatModel
from attacks.verdicts import Observation, Seen
from search.study.candidate import Latency, Score
from search.trial.race import first_images


@dataclass(frozen=True)
class Evaluation:
    """A target's outputs under attack, its quick gates, and its outputs on noise."""

    found: Observation
    gates: tuple[Gate, ...]
    noise: Seen

    def tensors(self) -> bytes:
        """Return the outputs on each image as safetensors."""
        parts = {"limits": self.found.limits_S}
        for name, seen in self._seen().items():
            parts |= {f"right {name}": seen.right, f"suspicion {name}": seen.suspicion_DNS}
        # Versions share a tensor if no attack had an image to attack; safetensors needs separate tensors.
        return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in parts.items()})

    def about(self) -> dict[str, Any]:
        """Return the rest as JSON, in the order of the attacks, which safetensors does not keep."""
        return {
            "threat": asdict(self.found.threat),
            "queries": self.found.queries,
            "gates": [asdict(gate) for gate in self.gates],
            "known": self.found.known is not None,
            "bounded": [(name, seen.bounded) for name, seen in self._seen().items()],
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation from its `tensors` and `about`."""
        groups: dict[str, dict[str, Seen]] = {
            "": {},
            "oblivious": {},
            "black-box": {},
            "white-box": {},
            "known-noise": {},
        }
        for name, bounded in about["bounded"]:
            knowledge, _, attack = name.rpartition("/")
            groups[knowledge][attack] = Seen(tensors[f"right {name}"], tensors[f"suspicion {name}"], bounded)
        threat = ThreatModel(**about["threat"])
        found = Observation(
            threat=threat,
            clean=groups[""]["clean"],
            oblivious=groups["oblivious"],
            black_box=groups["black-box"] if threat.knowledge == "black-box" else None,
            white_box=groups["white-box"],
            known=groups["known-noise"] if about["known"] else None,
            limits_S=tensors["limits"],
            queries=about["queries"],
        )
        return cls(found, tuple(Gate(**gate) for gate in about["gates"]), groups[""]["noise"])

    def _seen(self) -> dict[str, Seen]:
        found = self.found
        return {
            "clean": found.clean,
            "noise": self.noise,
            **{f"oblivious/{name}": seen for name, seen in found.oblivious.items()},
            **{f"black-box/{name}": seen for name, seen in (found.black_box or {}).items()},
            **{f"white-box/{name}": seen for name, seen in (found.white_box or {}).items()},
            **{f"known-noise/{name}": seen for name, seen in (found.known or {}).items()},
        }


@dataclass(frozen=True)
class Evaluator:
    """The images and attacks on which every candidate of a study is evaluated.

    Args:
        oblivious: adversarial images of each oblivious attack of the suite and of the quick score, made once on the
            bare classifier.
        attacker: the black-box attacker, if the study's threat model is black-box.
    """

    suite: Suite
    threat: ThreatModel
    x_NCHW: Tensor
    y_N: Tensor
    oblivious: Mapping[str, Tensor]
    seed: int
    attacker: BlackBoxAttacker | None = None

    def probe(self, target: nn.Module, begun: Observation | None = None) -> Evaluation:
        """Attack the target and run the audit's quick gates; the result serves every setting of the thresholds.

        Args:
            begun: the result of `begin`, if it is known; the evaluation is the same without.
        """
        with untouched(self.x_NCHW):
            found = self.observe(target, begun)
            images, looks = (self.x_NCHW, self.y_N), len(found.clean.right)
            noise = noisy(target, *images, self.threat, self.seed, looks)
            return Evaluation(found, quick_gates(target, *images, self.threat, seed=self.seed), noise)

    @property
    def first_N(self) -> Tensor:
        """Which images white-box attacks run on first, bool: none where no race depends on them."""
        count = first_images(len(self.y_N)) if self.threat.knowledge == "white-box" else 0
        return torch.arange(len(self.y_N), device=self.y_N.device) < count

    def begin(self, target: nn.Module) -> Observation:
        """Look at all images, and attack the first ones: what a race of inference settings needs."""
        return replace(self, suite=replace(self.suite, known=None))._observe(target, None, self.first_N)

    def observe(self, target: nn.Module, begun: Observation | None = None) -> Observation:
        """Attack under the oblivious and the white-box threat models in any case, and under the study's own.

        The first images are attacked before the others, in any case: so a race changes no figure.
        """
        return self._observe(target, begun or self.begin(target), ~self.first_N)

    def verdicts(self, begun: Observation) -> NDArray[np.float64]:
        """Return the verdicts of a race on the images on which it is decided: the first ones, or all."""
        robust_N = begun.judge().attacked.right.double().mean(0)
        return (robust_N[self.first_N] if self.first_N.any() else robust_N).cpu().numpy()

    def _observe(self, target: nn.Module, begun: Observation | None, standing_N: Tensor) -> Observation:
        return observe(
            self.suite,
            target,
            self.x_NCHW,
            self.y_N,
            self.threat,
            oblivious={attack.name: self.oblivious[attack.name] for attack in self.suite.oblivious},
            attacker=self.attacker,
            seed=self.seed,
            white_box=True,
            standing_N=standing_N,
            begun=begun,
        )

    def score(self, probed: Evaluation, limits_S: Tensor, latency: Latency | None) -> Score:
        """Return the figures of a bare or defended classifier.

        Args:
            limits_S: its thresholds.
            latency: None if nothing purifies.
        """
        verdict = probed.found.judge(limits_S)
        gates = (*probed.gates, noise_gate(probed.noise, verdict, limits_S))
        attacked = verdict.attacked
        return Score(
            threat=self.threat,
            attacked_accuracy=attacked.accuracy,
            attacked_error=attacked.error,
            attacked_rejection=attacked.rejection,
            oblivious_accuracy=verdict.oblivious.accuracy,
            black_box_accuracy=None if verdict.black_box is None else verdict.black_box.accuracy,
            queries=verdict.queries,
            white_box_accuracy=verdict.strongest.accuracy,
            known_noise_accuracy=None if verdict.known is None else verdict.known.accuracy,
            worst_draw_accuracy=None if verdict.known is None else attacked.worst,
            clean_accuracy=verdict.clean.accuracy,
            clean_rejection=verdict.clean.rejection,
            latency_ms_p50=latency.ms_p50 if latency else 0.0,
            latency_ms_p95=latency.ms_p95 if latency else 0.0,
            images=len(self.y_N),
            device=latency.device if latency else "",
            latency_images=latency.images if latency else "",
            attacks=verdict.trail,
            alarms=tuple(gate.name for gate in gates if not gate.passed),
        )

    def cheap(self, target: nn.Module, images: int) -> float:
        """Return the quick score (rung score): the fraction of the first `images` images that withstand a small attack.

        A rejected clean image does not count as withstanding, a rejected attacked one does: so rejecting all scores 0.
        A black-box attacker, which would train a substitute after each epoch, is replaced by the oblivious one.
        """
        quick = SUITES["quick"]
        knowledge: Knowledge = "white-box" if self.threat.knowledge == "white-box" else "oblivious"
        verdict = evaluate(
            quick,
            target,
            self.x_NCHW[:images],
            self.y_N[:images],
            replace(self.threat, knowledge=knowledge),
            oblivious={attack.name: self.oblivious[attack.name][:images] for attack in quick.oblivious},
            seed=self.seed,
        )
        return float(verdict.robust.double().mean())
