"""Made-up findings, for what shows them: a search of PuVAE in every state that a page has to cope with."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from attacks.threat import Knowledge, ThreatModel
from search.report.importance import CHANCE, Importances
from search.report.rank_correlation import RankCorrelation, ranks
from search.report.summary import Summary, TrialRecord
from search.study import ranking
from search.study.candidate import Candidate, Score
from search.study.study import Study
from spaces.space import Params

SEARCHED = ("lambda_rc", "lambda_kl", "lambda_ce", "conv_maps", "sigma_eps")
SIGMAS = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)
LATENCY_MS = {8: 3.42, 16: 9.87}
IMAGES = 1000


def study_of(threat: Knowledge = "white-box", **more: Any) -> Study:
    wishes: dict[str, Any] = {"name": "night", "trials": 40, "threat": threat, "min_clean_accuracy": 0.9}
    return Study(**{**wishes, "max_latency_ms": 12.0, "train_images": 5000, "seed": 3, **more})


def scored(attacked: float, clean: float, ms: float, threat: Knowledge = "white-box") -> Score:
    oblivious = min(clean, attacked + 0.25) if threat == "white-box" else attacked
    return Score(
        threat=ThreatModel("Linf", 0.3, threat),
        attacked_accuracy=round(attacked, 3),
        attacked_error=1 - round(attacked, 3),
        attacked_rejection=0.0,
        oblivious_accuracy=round(oblivious, 3),
        white_box_accuracy=round(attacked, 3) if threat == "white-box" else 0.015,
        clean_accuracy=round(clean, 3),
        clean_rejection=0.0,
        latency_ms_p50=ms,
        latency_ms_p95=1.2 * ms,
        latency_images="attacked" if ms else "",
        images=IMAGES,
    )


def undefended_of(threat: Knowledge = "white-box") -> Candidate:
    score = replace(scored(0.004, 0.991, 0.0, threat), oblivious_accuracy=0.004)
    return Candidate(candidate="undefended", fit="", defense="none", task="mnist/A", params=Params({}, {}), score=score)


def candidates_of(fits: int, threat: Knowledge = "white-box") -> list[Candidate]:
    """Each of `fits` trainings with each sigma_eps, the way a search of PuVAE scores them."""
    return [candidate_of(fit, sigma, threat) for fit, sigma in itertools.product(range(fits), SIGMAS)]


def candidate_of(fit: int, sigma: float, threat: Knowledge) -> Candidate:
    dice = random.Random(fit)
    rc, kl, ce = (10 ** dice.uniform(-1, 1) for _ in range(3))
    maps = dice.choice((8, 16))
    ms = LATENCY_MS[maps] * dice.uniform(0.95, 1.05)
    quality = 0.62 + 0.04 * math.log2(maps / 8) + 0.12 * math.log10(rc) - 0.09 * math.log10(kl)
    quality -= 0.12 * max(0.0, math.log10(sigma + 1e-9)) ** 2 + random.Random(f"{fit} {sigma}").gauss(0, 0.02)
    clean = min(0.985, 0.9 + 0.1 * quality)
    return Candidate(
        candidate=f"{(fit + 1) * 2654435761 % 2**32:08x}-{SIGMAS.index(sigma):04x}",
        fit=f"{fit:064x}",
        defense="puvae",
        task="mnist/A",
        params=Params({"lambda_rc": rc, "lambda_kl": kl, "lambda_ce": ce, "conv_maps": maps}, {"sigma_eps": sigma}),
        score=scored(max(quality - 0.2, 0.05), clean, ms, threat),
    )


def front_of(candidates: list[Candidate]) -> list[Candidate]:
    best, front = -1.0, list[Candidate]()
    for c in sorted(candidates, key=lambda c: (c.score.latency_ms_p50, -c.score.attacked_accuracy)):
        if c.score.attacked_accuracy > best:
            best, front = c.score.attacked_accuracy, [*front, c]
    return front


def picture(path: Path, seed: int) -> Path:
    """Three rows of digits: clean, attacked, purified."""
    noise = np.random.default_rng(seed)
    clean = np.hstack(load_digits().images[seed * 10 : seed * 10 + 10] / 16)
    attacked = np.clip(clean + 0.3 * noise.choice((-1, 1), clean.shape), 0, 1)
    purified = np.clip(clean + 0.05 * noise.standard_normal(clean.shape), 0, 1)
    pixels = (255 * np.vstack([clean, attacked, purified])).astype(np.uint8)
    Image.fromarray(pixels).resize((pixels.shape[1] * 4, pixels.shape[0] * 4), Image.Resampling.NEAREST).save(path)
    return path


def trials_of(candidates: list[Candidate], pictures: Path | None = None) -> list[TrialRecord]:
    """One finished trial for each fit, two pruned ones and a failed one."""
    made, dice = [], random.Random(1)
    for nth, c in enumerate(c for c in candidates if c.candidate.endswith("-0000")):
        top = c.score.clean_accuracy - 0.2
        curve = [top * (1 - 0.7 * math.exp(-epoch / 2.5)) + dice.gauss(0, 0.01) for epoch in range(10)]
        shown = picture(pictures / f"{nth}.png", nth) if pictures and nth < 8 else None
        made.append(TrialRecord(f"t{nth:03d}", "finished", c.params, curve, "", shown, 94.0 + 7 * nth))
    other = candidates[0].params
    for nth, epochs in ((91, 2), (92, 4)):
        params = Params({**other.train, "lambda_kl": float(nth)}, other.inference)
        curve = [0.1 + 0.04 * epoch / (nth - 90) for epoch in range(epochs)]
        made.append(TrialRecord(f"t{nth:03d}", "pruned", params, curve, f"stopped after {epochs} epochs", None, 31.0))
    broken = Params({**other.train, "lambda_rc": 1e3}, other.inference)
    reason = "FitError: the loss is not finite in epoch 1 <script>alert('no')</script>"
    return [*made, TrialRecord("t093", "failed", broken, [0.17], reason, None, 5400.0)]


def findings_of(fits: int = 10, pictures: Path | None = None, threat: Knowledge = "white-box") -> Summary:
    candidates = candidates_of(fits, threat)
    study = study_of(threat)
    feasible = [c for c in candidates if c.score.clean_accuracy >= (study.min_clean_accuracy or 0)]
    best = max(feasible, key=lambda c: c.score.attacked_accuracy)
    shares = dict(zip((*SEARCHED, CHANCE), (0.31, 0.17, 0.04, 0.09, 0.37, 0.02), strict=True))
    found = Importances(shares, dict(zip(shares, reversed(shares.values()), strict=True)), len(candidates))
    trials = trials_of(candidates, pictures)
    cheap = [t.curve[-1] for t in trials if t.state == "finished"]
    finals = [1 - c.score.attacked_error for c in candidates if c.candidate.endswith("-0000")]
    points = [(t.trial, score, final) for t, score, final in zip(trials, cheap, finals, strict=False)]
    agreed = RankCorrelation(study, True, points, ranks([{1: score} for score in cheap], finals, []))
    return Summary(
        study=study,
        undefended=undefended_of(threat),
        candidates=candidates,
        best=best,
        front=front_of(feasible),
        searched=SEARCHED,
        importances=found,
        trials=trials,
        device="2 CPU cores",
        rank_correlation=agreed,
        refinements=[TrialRecord("r001", "finished", Params({}, {}), [], "", None, 3.5)],
        busy=812.0,
    )


def nothing_yet() -> Summary:
    return Summary(study_of(train_images=None), None, [], None, [], SEARCHED, Importances(), [])


def one_candidate() -> Summary:
    only = candidates_of(1)[:1]
    return Summary(study_of(), undefended_of(), only, only[0], only, SEARCHED, Importances(), trials_of(only)[:1])


def none_feasible() -> Summary:
    alarmed = [replace(c, score=replace(c.score, alarms=("gradients are masked",))) for c in candidates_of(2)]
    return replace(findings_of(2), candidates=alarmed, best=None, front=[])


def rejecting() -> Summary:
    """A defense that rejects: half of the attacked images, and of the clean ones more than is allowed by some."""
    summary = findings_of(4)
    curve = ((0.0, 0.6), (0.01, 0.4), (0.04, 0.1), (0.2, 0.02))
    made = []
    for nth, c in enumerate(summary.candidates):
        error = round(0.5 * c.score.attacked_error, 3)
        score = replace(c.score, attacked_error=error, attacked_rejection=error, clean_rejection=0.03 * (nth % 4))
        made.append(replace(c, score=replace(score, risk_coverage=curve if nth % 6 == 0 else ())))
    return replace(summary, candidates=made, best=made[0], front=[made[0]])


def several_devices() -> Summary:
    """Every other fit timed on another kind of GPU."""
    summary = findings_of(6)
    kinds = {fit: ("NVIDIA H200", "Tesla T4")[nth % 2] for nth, fit in enumerate({c.fit for c in summary.candidates})}
    made = [replace(c, score=replace(c.score, device=kinds[c.fit])) for c in summary.candidates]
    within = ranking.feasible(summary.study, made)
    return replace(summary, candidates=made, best=within[0], front=ranking.front(summary.study, made))


def audited(candidate: Candidate, **more: Any) -> dict[str, Any]:
    """Evidence of an audit, of that which the page shows."""
    bare = {"attacked_accuracy": 0.004, "oblivious_accuracy": 0.004, "white_box_accuracy": 0.0, "clean_accuracy": 0.991}
    return {
        "attacked_accuracy": 0.198,
        "attacked_error": 0.802,
        "attacked_accuracy_interval": (0.148, 0.258),
        "oblivious_accuracy": 0.198,
        "white_box_accuracy": 0.0,
        "white_box_accuracy_interval": (0.0, 0.019),
        "clean_accuracy": 0.9,
        "images": candidate.score.images,
        "threat": asdict(candidate.score.threat),
        "baselines": {"undefended": {**bare, "attacked_accuracy_interval": (0.0, 0.01)}},
        "alarms": [],
        "refused": False,
        **more,
    }


def with_audits() -> Summary:
    """The best candidate was refused by its audit, the next one kept its place."""
    summary = findings_of(threat="oblivious")
    refused, kept = summary.ranked[:2]
    failed = audited(refused, alarms=["gradient: it does not hold that images have a usable gradient"], refused=True)
    return replace(summary, best=kept, audits={refused.candidate: failed, kept.candidate: audited(kept)})


CASES = {
    "audited": with_audits,
    "several devices": several_devices,
    "rejecting": rejecting,
    "ten fits": lambda: findings_of(),
    "oblivious": lambda: findings_of(threat="oblivious"),
    "nothing yet": nothing_yet,
    "one candidate": one_candidate,
    "none feasible": none_feasible,
}
