"""What is known of a candidate: accuracy under attack, clean accuracy, rejection, latency, alarms.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from attacks.probes import Gate, noise_gate, noisy, quick_gates
from attacks.robustness import Observation, Outsider, Seen, evaluate, observe
from attacks.suite import SUITES, Suite
from attacks.threat import Knowledge, ThreatModel
from search.latency import Latency
from spaces.space import Params, Scalar


@dataclass(frozen=True, kw_only=True)
class Score:
    """One candidate's figures. Accuracies and rejections are fractions in [0, 1], latencies milliseconds.

    Args:
        threat: the study's threat model; what is called attacked is under it.
        attacked_accuracy: images of which every version, the clean one too, is accepted and right.
        attacked_error: images of which some version is accepted and wrong.
        attacked_rejection: the rest.
        attacks: accuracy after each attack, by `knowledge/attack`; oblivious ones each over all images, white-box
            ones cumulative (each sees what the earlier ones left).
        queries: how often the black-box attacker asked; 0 where it was not run.
        images: how many validation images were attacked.
        device: where the latency was measured.
        alarms: names of the cheap gates that did not pass (attacks/probes.py).
        risk_coverage: (clean rejection, attacked error) of every setting of the thresholds that none beats, where
            this candidate's thresholds were picked from the curve.
    """

    threat: ThreatModel
    attacked_accuracy: float
    attacked_error: float
    attacked_rejection: float
    oblivious_accuracy: float
    white_box_accuracy: float
    clean_accuracy: float
    clean_rejection: float
    latency_ms_p50: float
    latency_ms_p95: float
    images: int
    black_box_accuracy: float | None = None
    queries: int = 0
    device: str = ""
    attacks: Mapping[str, float] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()
    risk_coverage: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One fit with one setting of its inference-time knobs: the thing that is scored."""

    candidate: str
    fit: str
    defense: str
    task: str
    params: Params
    score: Score

    def row(self) -> dict[str, Scalar | None]:
        """Return the row of candidates.csv."""
        s = self.score
        return {
            "candidate": self.candidate,
            "fit": self.fit,
            "defense": self.defense,
            "task": self.task,
            "threat": s.threat.knowledge,
            "eps": s.threat.eps,
            **self.params.flat(),
            "attacked_accuracy": s.attacked_accuracy,
            "attacked_error": s.attacked_error,
            "attacked_rejection": s.attacked_rejection,
            "oblivious_accuracy": s.oblivious_accuracy,
            "black_box_accuracy": s.black_box_accuracy,
            "white_box_accuracy": s.white_box_accuracy,
            "clean_accuracy": s.clean_accuracy,
            "clean_rejection": s.clean_rejection,
            "latency_ms_p50": s.latency_ms_p50,
            "latency_ms_p95": s.latency_ms_p95,
            "alarms": "; ".join(s.alarms),
            "state": "finished",
            "device": s.device,
            "queries": s.queries,
            "norm": s.threat.norm,
            **s.attacks,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "params": {"train": dict(self.params.train), "inference": dict(self.params.inference)},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        score = {
            **data["score"],
            "threat": ThreatModel(**data["score"]["threat"]),
            "alarms": tuple(data["score"]["alarms"]),
            "risk_coverage": tuple((rejection, error) for rejection, error in data["score"]["risk_coverage"]),
        }
        return cls(**{**data, "params": Params(**data["params"]), "score": Score(**score)})


@dataclass(frozen=True)
class Probed:
    """What a target said under attack, its cheap gates, and what it said of noise."""

    found: Observation
    gates: tuple[Gate, ...]
    noise: Seen


@dataclass(frozen=True)
class Exam:
    """The images and attacks that every candidate of a study faces.

    Args:
        oblivious: adversarial images of each oblivious attack of the suite and of the rungs, made once on the bare
            classifier.
        outsider: the black-box attacker, where the study's threat model is its.
    """

    suite: Suite
    threat: ThreatModel
    x_NCHW: Tensor
    y_N: Tensor
    oblivious: Mapping[str, Tensor]
    seed: int
    outsider: Outsider | None = None

    def observe(self, target: nn.Module) -> Observation:
        """Attack under the oblivious and the white-box threat model, whichever the study's is, and under its own."""
        black_box, queries = None, 0
        if self.outsider is not None:
            images = (self.x_NCHW, self.y_N)
            black_box, queries = self.outsider.craft(self.suite, target, *images, self.threat, self.seed)
        found = observe(
            self.suite,
            target,
            self.x_NCHW,
            self.y_N,
            self.threat,
            oblivious={attack.name: self.oblivious[attack.name] for attack in self.suite.oblivious},
            black_box=black_box,
            seed=self.seed,
            white_box=True,
        )
        return replace(found, queries=queries)

    def probe(self, target: nn.Module, found: Observation) -> Probed:
        """Run the audit's cheap checks, which serve every setting of the thresholds."""
        images, looks = (self.x_NCHW, self.y_N), len(found.clean.right)
        noise = noisy(target, *images, self.threat, self.seed, looks)
        return Probed(found, quick_gates(target, *images, seed=self.seed), noise)

    def score(self, probed: Probed, limits_S: Tensor, latency: Latency | None) -> Score:
        """Return the figures of a bare or defended classifier.

        Args:
            limits_S: its thresholds.
            latency: None where there is nothing that purifies.
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
            clean_accuracy=verdict.clean.accuracy,
            clean_rejection=verdict.clean.rejection,
            latency_ms_p50=latency.ms_p50 if latency else 0.0,
            latency_ms_p95=latency.ms_p95 if latency else 0.0,
            images=len(self.y_N),
            device=latency.device if latency else "",
            attacks=verdict.trail,
            alarms=tuple(gate.name for gate in gates if not gate.passed),
        )

    def cheap(self, target: nn.Module, images: int) -> float:
        """Return the rung score: what withstands one small fixed attack, of the first `images` images.

        A clean image that is rejected does not count, an attacked one does: so rejecting all scores nothing. A
        black-box attacker, who would train a substitute after each epoch, is stood in for by the oblivious one.
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
