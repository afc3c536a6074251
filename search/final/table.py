"""The results of a final run as JSON: one row per figure, with its interval and conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from attacks.confidence import difference, wilson
from attacks.verdicts import Verdict
from search.export.checks import checks
from search.final.evaluation import AUTOATTACK, FULL, FinalVerdicts
from search.final.results import FinalResults, FinalSettings, ModelResult
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


def announced(case: ExportedWinner, settings: FinalSettings, look: int) -> str:
    """Return the announcement before training; `look` counts the openings of the test split, including this one."""
    return (
        f"{case.name}: {case.study.defense} on {case.study.label}, {counted(len(settings.seeds), 'training')} on "
        f"train + validation{_kept([case])}, judged on {settings.images} of {settings.of} test images"
        f"{f'; for it this is look {look} at the test split' if look > 1 else ''}"
    )


def table_of(
    cases: Sequence[ExportedWinner], settings: FinalSettings, looks: Mapping[str, Any], found: FinalResults
) -> dict[str, Any]:
    """Return the whole table, as JSON.

    Args:
        settings: the settings of the run, including the seeds that diverged.
        looks: by export, the openings of the test split so far.
        found: the results of each seed and of each export itself.
    """
    models = list(zip(*(seed.models for seed in found.seeds), strict=True))
    return {
        **asdict(settings),
        "split": "test",
        "trained_on": _trained_on(cases, settings),
        "smaller": _smaller(cases, settings),
        "interval": INTERVAL,
        "exports": [_export(case, looks[case.name], found) for case in cases],
        "rows": [row for each in models for row in _rows(each, settings)],
        "trails": [_trail(each) for each in models],
    }


def only(table: Mapping[str, Any], export: str) -> dict[str, Any]:
    """Return the part of a table about one export and the baselines."""
    one = [each for each in table["exports"] if each["export"] == export]
    mine = {name: [row for row in table[name] if row["export"] in (export, "")] for name in ("rows", "trails")}
    return {**table, "exports": one, **mine}


def _trail(seeds: Sequence[ModelResult]) -> dict[str, Any]:
    """Return the accuracy of one model after each attack, as mean over the seeds."""
    trails = [seed.verdicts.trail for seed in seeds]
    left = {name: mean(trail[name] for trail in trails) for name in trails[0]}
    return {"export": seeds[0].export, "model": _name(seeds), "accuracy_after": left}


def _name(seeds: Sequence[ModelResult]) -> str:
    """Return the name of one model; the trainings of a baseline have several names if some have not converged."""
    return " and ".join(dict.fromkeys(seed.model for seed in seeds))


def _rows(seeds: Sequence[ModelResult], settings: FinalSettings) -> list[dict[str, Any]]:
    """Return the rows of one model, aggregated over the seeds."""
    first, threat = seeds[0], seeds[0].threat
    named = {"export": first.export, "model": _name(seeds), "norm": threat.norm, "eps": threat.eps}
    rows = []
    for what in COLUMNS:
        verdicts = [seed.verdicts.verdicts[what] for seed in seeds]
        suite, _, knowledge = what.partition("/")
        row = {"figure": "accuracy", "suite": suite, "knowledge": knowledge, **spread([v.accuracy for v in verdicts])}
        low, high = wilson(row["mean"], settings.images)
        rows.append(
            {
                **named,
                **row,
                "low": low,
                "high": high,
                "images": settings.images,
                "draws": len(verdicts[0].right),
                "worst_draw": min(v.worst for v in verdicts),
                "error": mean(v.error for v in verdicts),
                "rejection": mean(v.rejection for v in verdicts),
            }
        )
    timed = [seed.latency for seed in seeds if seed.latency]
    for device in dict.fromkeys(each.device for each in timed):  # seeds may have run on different nodes
        for name in LATENCIES:
            times = spread([getattr(each, name) for each in timed if each.device == device])
            rows.append({**named, "figure": f"latency_{name}", **times, "device": device})
    return rows


def spread(each: Sequence[float]) -> dict[str, Any]:
    """Return the mean and the standard deviation (n - 1) over the seeds; one seed has no deviation."""
    return {"mean": mean(each), "deviation": stdev(each) if len(each) > 1 else None, "each": list(each)}


def _export(case: ExportedWinner, looks: Sequence[Mapping[str, Any]], found: FinalResults) -> dict[str, Any]:
    known, own = case.evidence, found.exports[case.name]
    compared: list[FinalVerdicts] = [seed.compared[case.name] for seed in found.seeds]
    return {
        "export": case.name,
        "defense": case.study.defense,
        "task": case.study.label,
        "knobs": case.params.flat(),
        "threat": known["threat"],
        "train_images": case.study.train_images,
        "changed": case.target.changed,
        "alarms": known["alarms"],
        "checks": checks(known["gates"]),
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
    """Compare a validation accuracy with the test accuracies under the same attacks."""
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


def _trained_on(cases: Sequence[ExportedWinner], settings: FinalSettings) -> str:
    counts = {case.study.train_images or settings.train for case in cases}
    numbers = " or ".join(map(str, sorted(counts)))
    return f"{numbers} training and all {settings.validation} validation images{_kept(cases)}"


def _kept(cases: Sequence[ExportedWinner]) -> str:
    """Return which classifiers came with their weights and are not trained, in brackets; empty if all are trained."""
    tasks = {case.resolved.task: case.resolved.protected for case in cases}
    given = {f"{task.dataset}/{name}" for task, name in tasks.items() if task.is_given(name)}
    return f" (the defense alone: {' and '.join(sorted(given))} keeps the weights that it came with)" if given else ""


def _smaller(cases: Sequence[ExportedWinner], settings: FinalSettings) -> str:
    """Return how a run is smaller than a full run; empty if it is not."""
    parts = []
    if settings.images < settings.of:
        parts.append(f"{settings.images} of {settings.of} test images were attacked")
    if any((case.study.train_images or settings.train) < settings.train for case in cases):
        parts.append(
            f"trained on {_trained_on(cases, settings)}, of {settings.train + settings.validation} that there are"
        )
    if len(settings.trained) < len(settings.seeds):
        parts.append(f"{len(settings.seeds) - len(settings.trained)} of {len(settings.seeds)} trainings diverged")
    return f"a smaller run, which shows the way and proves nothing: {'; '.join(parts)}" if parts else ""
