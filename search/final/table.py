"""What a final run found, as JSON: one row a figure, with what must stand beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from attacks.confidence import wilson
from attacks.verdicts import Verdict
from search.final.evaluation import AUTOATTACK, FULL, FinalVerdicts
from search.final.retraining import ExportedWinner
from search.final.test_set_log import opened_beside
from search.formatting import counted

LATENCIES = ("ms_p50", "ms_p95", "single_ms_p50")
COLUMNS = {
    "clean": "clean",
    f"{FULL}/oblivious": "oblivious",
    f"{FULL}/black-box": "black-box",
    f"{FULL}/white-box": "white-box",
    f"{AUTOATTACK}/white-box": "AutoAttack",
}
INTERVAL = (
    "mean over the seeds ± their standard deviation; in brackets the 95 % Wilson interval of the mean on as many "
    "images as were attacked (not times the seeds, which all meet the same images: it tells what other images would "
    "give, and the deviation what other seeds would)"
)


def announced(case: ExportedWinner, asked: Mapping[str, Any], look: int) -> str:
    """Return what is said before anything is trained; `look` is how often, with this time, the split is opened."""
    return (
        f"{case.name}: {case.study.defense} on {case.study.label}, {counted(len(asked['seeds']), 'training')} on "
        f"train + validation, judged on {asked['images']} of {asked['of']} test images"
        f"{f'; for it this is look {look} at the test split' if look > 1 else ''}"
    )


def table_of(
    cases: Sequence[ExportedWinner], asked: Mapping[str, Any], looks: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the whole table, as JSON.

    Args:
        asked: what was asked for, and the seeds that diverged.
        looks: by export, the looks at the test split so far.
        found: what each seed and each export itself kept.
    """
    seeds = found["seeds"]
    models = [[seed["models"][place] for seed in seeds] for place in range(len(seeds[0]["models"]))]
    return {
        **asked,
        "split": "test",
        "trained_on": _trained_on(cases, asked),
        "smaller": _smaller(cases, asked),
        "interval": INTERVAL,
        "exports": [_export(case, looks[case.name], found) for case in cases],
        "rows": [row for each in models for row in _rows(each, asked)],
        "trails": [_trail(each) for each in models],
    }


def only(table: Mapping[str, Any], export: str) -> dict[str, Any]:
    """Return the part of a table that is about one export and what stands beside it."""
    one = [each for each in table["exports"] if each["export"] == export]
    mine = {name: [row for row in table[name] if row["export"] in (export, "")] for name in ("rows", "trails")}
    return {**table, "exports": one, **mine}


def _trail(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what each attack left of one model, mean over the seeds."""
    trails = [seed["found"].trail for seed in seeds]
    left = {name: mean(trail[name] for trail in trails) for name in trails[0]}
    return {"export": seeds[0]["export"], "model": seeds[0]["model"], "accuracy_after": left}


def _rows(seeds: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of one model over the seeds."""
    first, threat = seeds[0], seeds[0]["threat"]
    named = {"export": first["export"], "model": first["model"], "norm": threat.norm, "eps": threat.eps}
    rows = []
    for what in COLUMNS:
        verdicts = [seed["found"].verdicts[what] for seed in seeds]
        suite, _, knowledge = what.partition("/")
        row = {"figure": "accuracy", "suite": suite, "knowledge": knowledge, **spread([v.accuracy for v in verdicts])}
        low, high = wilson(row["mean"], asked["images"])
        rows.append(
            {
                **named,
                **row,
                "low": low,
                "high": high,
                "images": asked["images"],
                "draws": len(verdicts[0].right),
                "worst_draw": min(v.worst for v in verdicts),
                "error": mean(v.error for v in verdicts),
                "rejection": mean(v.rejection for v in verdicts),
            }
        )
    timed = [seed["latency"] for seed in seeds if seed["latency"]]
    for device in dict.fromkeys(each["device"] for each in timed):  # seeds may have been judged on unlike nodes
        for name in LATENCIES:
            times = spread([each[name] for each in timed if each["device"] == device])
            rows.append({**named, "figure": f"latency_{name}", **times, "device": device})
    return rows


def spread(each: Sequence[float]) -> dict[str, Any]:
    """Return the mean of the seeds' figures and their standard deviation (n - 1), which one seed alone has not."""
    return {"mean": mean(each), "deviation": stdev(each) if len(each) > 1 else None, "each": list(each)}


def _export(case: ExportedWinner, looks: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> dict[str, Any]:
    known, own = case.evidence, found["exports"][case.name]
    compared: list[FinalVerdicts] = [seed["compared"][case.name] for seed in found["seeds"]]
    return {
        "export": case.name,
        "defense": case.study.defense,
        "task": case.study.label,
        "knobs": case.params.flat(),
        "threat": known["threat"],
        "train_images": case.study.train_images,
        "alarms": known["alarms"],
        "gates": len(known["gates"]),
        "gates_passed": sum(gate["passed"] for gate in known["gates"]),
        "alarms_on_test": [list(judged.about["alarms"]) for judged in compared],
        "alarms_on_test_as_exported": list(own.about["alarms"]),
        "looks": list(looks),
        "opened_beside": opened_beside(case.folder),
        "optimism": [
            _optimism(case, what, validation, own.verdicts[what], [judged.verdicts[what] for judged in compared])
            for what, validation in (
                ("search", known["attacked_accuracy_of_the_search"]),
                ("audit", known["attacked_accuracy"]),
            )
        ],
    }


def _optimism(
    case: ExportedWinner, what: str, validation: float, own: Verdict, retrained: Sequence[Verdict]
) -> dict[str, Any]:
    """Return a validation figure beside the test figures under the same attacks."""
    images, tested = case.evidence["images"], own.right.shape[1]
    low, high = difference(validation, images, own.accuracy, tested)
    return {
        "by": what,
        "suite": case.resolved.suite.name if what == "search" else "audit",
        "validation": validation,
        "validation_images": images,
        "test": own.accuracy,
        "test_images": tested,
        "optimistic": validation - own.accuracy,
        "low": low,
        "high": high,
        "retrained": spread([verdict.accuracy for verdict in retrained]),
        "optimistic_retrained": validation - mean(verdict.accuracy for verdict in retrained),
    }


def difference(one: float, n: int, other: float, m: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two proportions of n and of m.

    Source: Newcombe, Interval estimation for the difference between independent proportions, 1998, method 10.
    """
    (low, high), (under, over) = wilson(one, n), wilson(other, m)
    return (
        one - other - math.hypot(one - low, over - other),
        one - other + math.hypot(high - one, other - under),
    )


def _trained_on(cases: Sequence[ExportedWinner], asked: Mapping[str, Any]) -> str:
    counts = {case.study.train_images or asked["train"] for case in cases}
    return f"{' or '.join(map(str, sorted(counts)))} training and all {asked['validation']} validation images"


def _smaller(cases: Sequence[ExportedWinner], asked: Mapping[str, Any]) -> str:
    """Return in what a run is smaller than the whole; empty where it is not."""
    parts = []
    if asked["images"] < asked["of"]:
        parts.append(f"{asked['images']} of {asked['of']} test images were attacked")
    if any((case.study.train_images or asked["train"]) < asked["train"] for case in cases):
        parts.append(
            f"trained on {_trained_on(cases, asked)}, of {asked['train'] + asked['validation']} that there are"
        )
    if len(asked["trained"]) < len(asked["seeds"]):
        parts.append(f"{len(asked['seeds']) - len(asked['trained'])} of {len(asked['seeds'])} trainings diverged")
    return f"a smaller run, which shows the way and proves nothing: {'; '.join(parts)}" if parts else ""
