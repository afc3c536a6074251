"""Final runs: winners are retrained on train + validation with fresh seeds, and evaluated on the test split once.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from os.path import commonpath
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

import attacks.black_box
from attacks.threat import ThreatModel
from search.classifiers import architectures
from search.classifiers.task import Task
from search.data import splits
from search.engine.jobs import Job, RunJobs, Tell, job_runner
from search.exceptions import TrialError
from search.export import loader
from search.final.evaluation import FinalEvaluator, FinalVerdicts, blocks
from search.final.page import write
from search.final.results import FinalResults, FinalSettings, ModelResult, SeedResult
from search.final.retraining import FIRST_SEED, EvaluatedModel, ExportedWinner, evaluated_models, train
from search.final.table import announced, only, table_of
from search.final.test_set_log import looks, note_opening
from search.storage.fingerprint import code_digests, fingerprint
from search.storage.seal import opened
from search.study.loading import EARLIER, make_study
from spaces.exceptions import InputError
from spaces.space import Params

MOST_SEEDS = 1000


def final(
    exports: Sequence[Path],
    *,
    seeds: int = 5,
    images: int | None = None,
    data_dir: str | None = None,
    storage: str | None = None,
    address: str | None = None,
    concurrent: int | None = None,
    gpus_per_trial: float | None = None,
    cpus_per_trial: float | None = None,
    debug: bool = False,
    changed: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Retrain exports on train + validation, evaluate them on the test split, and write the results.

    Finished work is in the store: a run that died continues when it is called again.

    Args:
        exports: their folders; all on one data set. They share classifiers, test images and one table.
        seeds: number of trainings; no search of the exports used their seeds.
        images: number of test images to attack; default: all.
        storage: where fits are stored; default: the storage of the first export, else `runs`.
        concurrent: number of parallel seeds; default: as many as fit on the cluster.
        gpus_per_trial, cpus_per_trial: for each seed; default: those of the first export's search.
        debug: run in this process, without Ray.
        changed: go on where the code of an export changed; the table says so.

    Returns:
        The table, as JSON. Each export has its table in FOLDER/final; several exports also have a common one.

    Raises:
        InputError: an argument or an export is invalid, or every training diverged.
    """
    if not 1 <= seeds <= MOST_SEEDS:
        raise InputError(f"seeds must be from 1 to {MOST_SEEDS}, but is {seeds}")
    if concurrent is not None and concurrent < 1:
        raise InputError(f"concurrent must be at least 1, but is {concurrent}")
    if not exports:
        raise InputError("a final run needs at least one export, but is given none")
    home = storage or _storage(exports[0])
    asks = {"gpus_per_trial": gpus_per_trial, "cpus_per_trial": cpus_per_trial}
    moves: dict[str, Any] = {"storage": home, "data_dir": data_dir, "address": address}
    moves |= {name: share for name, share in asks.items() if share is not None}
    cases = [_case(folder, moves, changed) for folder in exports]
    settings = _settings(cases, seeds, images)
    study, chosen = cases[0].study, settings.seeds
    _prepared(cases)
    for case in cases:
        line = announced(case, settings, len(looks(case.folder, settings)))
        console.print(line, highlight=False, soft_wrap=True)
    with job_runner(study, debug=debug, concurrent=concurrent, console=console) as work:
        diverged = work("training", [Job(f"seed {seed}", train_seed, (cases, seed)) for seed in chosen])
        failed = {str(seed): why for seed, why in zip(chosen, diverged, strict=True) if why}
        settings = replace(settings, failed=failed, trained=[seed for seed in chosen if str(seed) not in failed])
        if not settings.trained:
            raise InputError(f"a final run needs a training that ends, but of {len(chosen)} none did: {diverged[0]}")
        taken = {case.name: note_opening(case.folder, settings) for case in cases}
        found = _evaluated(work, cases, settings)
    table = table_of(cases, settings, taken, found)
    for case in cases:
        write(case.folder / "final", only(table, case.name))
    if len(cases) > 1:
        write(_joint(cases), table)
    return table


def train_seed(study: object, cases: Sequence[ExportedWinner], seed: int, tell: Tell) -> str:
    """Train the missing fits of a seed; return why a training failed, or an empty string."""
    try:
        train(cases, seed, tell)
    except TrialError as error:
        return str(error)
    return ""


def evaluate_seed(study: object, cases: Sequence[ExportedWinner], seed: int, images: int, tell: Tell) -> SeedResult:
    """Evaluate the models of a seed and their baselines; the fits of the seed are in the store."""
    models = evaluated_models(cases, seed)
    evaluator = _evaluator(cases, seed, images, tell, steps=len(models) * len(blocks(images)) + len(cases))
    results = [
        ModelResult(
            export=model.export,
            model=model.name,
            threat=model.threat,
            verdicts=verdicts,
            latency=evaluator.timed(model) if model.export else None,
        )
        for model, verdicts in zip(models, evaluator.evaluate(models), strict=True)
    ]
    own = {model.export: model for model in models if model.export}
    return SeedResult(results, {case.name: _compared(evaluator, case, own[case.name]) for case in cases})


def evaluate_export(study: object, case: ExportedWinner, images: int, tell: Tell) -> FinalVerdicts:
    """Run the attacks of its search and audit on the export itself, on the test split."""
    evaluator = _evaluator([case], case.study.seed, images, tell, steps=1)
    device = evaluator.x_NCHW.device
    model = EvaluatedModel(
        export=case.name,
        name=f"{case.study.defense} as it was exported",
        identity=case.identity,
        classifier="",
        target=case.target.unchecked().to(device),
        threat=replace(case.threat, knowledge="white-box"),
        attacker=case.attacker(device),
        substitute=case.resolved.substitute,
    )
    return _compared(evaluator, case, model)


def _evaluator(cases: Sequence[ExportedWinner], seed: int, images: int, tell: Tell, steps: int) -> FinalEvaluator:
    case = cases[0]
    runner = case.runner(case.study, seed)
    x_NCHW, y_N = splits.open_test(case.resolved.task.dataset, case.study.data_dir, images)
    return FinalEvaluator(
        x_NCHW.to(runner.assets.device),
        y_N.to(runner.assets.device),
        seed,
        runner.assets.store,
        runner.assets.device_lock,
        tell,
        steps,
    )


def _compared(evaluator: FinalEvaluator, case: ExportedWinner, model: EvaluatedModel) -> FinalVerdicts:
    aimed = case.runner(case.study, evaluator.seed).scorer.aimed(case.params)
    return evaluator.compare(case, model, aimed)


def _evaluated(work: RunJobs, cases: Sequence[ExportedWinner], settings: FinalSettings) -> FinalResults:
    """Return the results of each seed and of each export itself."""
    images, trained = settings.images, settings.trained
    jobs = [Job(f"seed {seed}", evaluate_seed, (cases, seed, images)) for seed in trained]
    jobs += [Job(f"export {case.name}", evaluate_export, (case, images)) for case in cases]
    found = work("on the test split", jobs)
    own = {case.name: verdicts for case, verdicts in zip(cases, found[len(trained) :], strict=True)}
    return FinalResults(found[: len(trained)], own)


def _storage(export: Path) -> str:
    """Return the storage that contains an export; `runs` if there is none."""
    inside = [folder for folder in export.resolve().parents if (folder / ".store").is_dir()]
    return str(inside[0]) if inside else "runs"


def _case(folder: Path, moves: Mapping[str, Any], changed: bool = False) -> ExportedWinner:
    """Return an export with the study of its search, moved to the storage and cluster of this run.

    Raises:
        InputError: it is not an export, it or its code was changed, or its data differ.
    """
    target, files = loader.load(folder, changed, data_dir=moves["data_dir"]), opened(folder)
    config, known = yaml.safe_load(files["config.yaml"]), json.loads(files["evidence.json"])
    study = make_study({**EARLIER, **config["study"], **moves, "warm_start": None})
    if study.weights is not None:
        raise InputError(
            f"a final run trains anew, which the weights that the defense of {folder} was given cannot be: attack the "
            "export (launch.py attack)"
        )
    dataset = study.resolved.task.dataset
    splits.expect(dataset, study.data_dir, known["data_sha256"])
    _same_classifiers(study.resolved.task, known["model"])
    params, threat = Params(config["train"], config["inference"]), ThreatModel(**config["threat"])
    shaping = code_digests(type(target.defense).__module__, architectures.__name__)
    weights = [
        hashlib.sha256(files[name]).hexdigest() for name in sorted(files) if name.endswith((".safetensors", ".py"))
    ]
    return ExportedWinner(
        folder=folder.resolve(),
        identity=fingerprint(source=shaping, weights=weights, train=config["train"], setting=config["inference"]),
        study=study,
        params=params,
        threat=threat,
        target=target,
        evidence=known,
    )


def _same_classifiers(task: Task, model: Mapping[str, Any]) -> None:
    """Check that the user's own classifiers are those of the export.

    Raises:
        InputError: one has other code or weights by now.
    """
    for role, about in model.get("own", {}).items():
        found = task.added(model[role])
        if found is None or found.digest != about["digest"]:
            raise InputError(
                f"a final run needs the classifier of the export, {task.dataset}/{model[role]} of digest "
                f"{about['digest']}, but the one that was added has {found.digest if found else 'none'}"
            )


def _settings(cases: Sequence[ExportedWinner], seeds: int, images: int | None) -> FinalSettings:
    """Return the settings of the run, which identify an opening of the test split.

    Raises:
        InputError: the exports cannot be evaluated together, or the test split has fewer images.
    """
    first = cases[0].resolved.task.dataset
    for case in cases:
        if case.resolved.task.dataset != first:
            raise InputError(
                f"exports that are judged together must be on one data set, {first}, but {case.folder} is on "
                f"{case.resolved.task.dataset}"
            )
    if len({case.name for case in cases}) < len(cases):
        raise InputError(f"exports that are judged together must be different, but are {[c.name for c in cases]}")
    sizes = splits.sizes(first, cases[0].study.data_dir)
    if images is not None and not 1 <= images <= sizes.test:
        raise InputError(f"images must be from 1 to {sizes.test} of {first}'s test split, but is {images}")
    used = {case.study.seed + k for case in cases for k in (0, 1)}  # an audit uses the seed of its search + 1
    fresh = (seed for seed in range(FIRST_SEED, 2**32) if seed not in used)
    return FinalSettings(
        dataset=first,
        images=images or sizes.test,
        of=sizes.test,
        train=sizes.train,
        validation=sizes.validation,
        seeds=list(islice(fresh, seeds)),
        code=fingerprint(source=code_digests(attacks.black_box.__name__)),
    )


def _prepared(cases: Sequence[ExportedWinner]) -> None:
    """Create the output folders.

    Raises:
        InputError: a folder cannot be created.
    """
    try:
        cases[0].study.store.make()
        for case in cases:
            (case.folder / "final").mkdir(exist_ok=True)
        if len(cases) > 1:
            _joint(cases).mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"a final run writes into {error.filename}, but that cannot be: {error.strerror}") from None


def _joint(cases: Sequence[ExportedWinner]) -> Path:
    """Return the folder of the common table of several exports."""
    return Path(commonpath([case.folder.parent for case in cases])) / "final"
