"""Final runs: what is trained and judged is what the page says, once, whatever dies on the way.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from scipy.stats import norm
from torch import Tensor
from torch.nn import functional as F

import attacks.black_box
from attacks.black_box import Substitute, train_substitute
from attacks.catalog import APGD_CE, FGSM, PGD_5, SELECTIVE_10
from attacks.evaluation import evaluate
from attacks.gradient_view import SPREAD
from attacks.suites import SUITES, Suite
from attacks.threat import ThreatModel
from attacks.verdicts import Verdict
from defenses.base import Defended
from search.data import splits
from search.data.cache import ensure
from search.engine.jobs import Job, Tell, job_runner
from search.exceptions import TrialError
from search.export.exporter import export
from search.final import evaluation, retraining, test_set_log
from search.final import final_run as finals
from search.final.evaluation import FinalEvaluator, FinalVerdicts
from search.final.final_run import evaluate_export, final, train_seed
from search.final.page import forms, page
from search.final.results import FinalSettings, ModelResult
from search.final.retraining import ExportedWinner, evaluated_models
from search.final.table import COLUMNS, _rows
from search.storage.atomic import write_atomic
from search.storage.seal import FILES, SEAL, seal
from search.storage.store import Store
from search.study.candidate import Latency
from search.study.study import Study
from search.trial.device_lock import DeviceLock
from search.trial.runner import TrialRunner, run_trial
from search.trial.training import Trainer, silent
from spaces.exceptions import InputError
from spaces.space import Params
from tests.conftest import digits_study

pytestmark = pytest.mark.slow

IMAGES, SEEDS, CHOSEN_ON = 24, [1000, 1001], 10
QUIET = Console(file=io.StringIO())
APGD_5 = replace(APGD_CE, steps=5)
SMALL = {
    "full": Suite(
        name="full", oblivious=(FGSM, PGD_5, APGD_5), white_box=(FGSM, SELECTIVE_10, APGD_5), draws=2, looks=20
    ),
    "standard": Suite(name="standard", oblivious=(APGD_5,), white_box=(APGD_5,), draws=2, looks=20),
}


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Take small suites of the same names, and a black-box attacker that asks less: the real ones take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, suite in SMALL.items():
            patch.setitem(cast(dict[str, Suite], SUITES), name, suite)
        patch.setattr(evaluation, "BLOCK", 16)  # two blocks
        _short(patch)
        patch.setattr(attacks.black_box, "train_substitute", quickly)
        yield


def _short(patch: pytest.MonkeyPatch) -> None:
    """Train the baseline for no longer than the classifier, which takes seconds and does not converge."""
    for name, value in {"EPOCHS": 2, "UPDATES": 1, "WARM_UP": 0}.items():
        patch.setattr(retraining, name, value)


def quickly(*given: Any, **options: Any) -> Substitute:
    return train_substitute(*given, **{**options, "rounds": 1})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a MagNet, which rejects, trained on 150 images and chosen on 10 validation images."""
    smaller = {"train_images": 150, "eval_images": CHOSEN_ON, "cheap_images": CHOSEN_ON, "suite": "quick"}
    study = digits_study(tmp_path_factory.mktemp("runs"), defense="magnet", eps=0.1, **smaller)
    store, space = study.store.make(), study.resolved.space
    usual = {name: space.usual_of(name, domain) for name, domain in space.train.items()}
    candidate, *_ = run_trial(study, Params(usual, space.usual()), store, silent, alone=True)
    return export(study, candidate, store, study.folder / "export", despite_alarms=True)


class Counted:
    """Counts what is trained and attacked, and interrupts the third epoch and the fifth attacked block, once each."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.epochs, self.struck, self.interrupts = 0, 0, 0
        save, strike = Store.save_progress, FinalEvaluator._attack_block

        def saving(store: Any, key: str, state: Any) -> None:
            save(store, key, state)
            self.epochs += 1
            self._dies(self.epochs == 3)

        def striking(*args: Any) -> Any:
            found = strike(*args)
            self.struck += 1
            self._dies(self.struck == 5)
            return found

        patch.setattr(Store, "save_progress", saving)
        patch.setattr(FinalEvaluator, "_attack_block", striking)

    def _dies(self, now: bool) -> None:
        if now:
            self.interrupts += 1
            raise KeyboardInterrupt


Found = tuple[dict[str, Any], Counted]


@pytest.fixture(scope="module")
def judged(exported: Path) -> Found:
    """A final run of two seeds that died twice and was called again each time."""
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        for _ in range(2):
            console = Console(file=io.StringIO())
            with pytest.raises(KeyboardInterrupt):
                final([exported], seeds=2, images=IMAGES, debug=True, console=console)
            assert "the same command goes on" in cast(io.StringIO, console.file).getvalue()
        return final([exported], seeds=2, images=IMAGES, debug=True, console=QUIET), counted


def cases_of(exported: Path) -> list[ExportedWinner]:
    moves = {"storage": str(exported.parents[2]), "data_dir": None, "address": None}
    return [finals._case(exported, moves)]


def the(table: Mapping[str, Any], model: str, suite: str, knowledge: str) -> dict[str, Any]:
    """Return the one row of a model's accuracy."""
    wanted = {"figure": "accuracy", "suite": suite, "knowledge": knowledge}
    (row,) = (r for r in table["rows"] if r["model"].startswith(model) and r | wanted == r)
    return cast(dict[str, Any], row)


def test_nothing_that_was_finished_is_done_again_after_a_death(judged: Found) -> None:
    """Of each seed one epoch of two and three of four are kept, and three models attacked in two blocks."""
    _, counted = judged
    assert counted.interrupts == 2
    assert counted.epochs == 2 * (1 + 3)
    assert counted.struck == 2 * 3 * 2 + 1, "the block that died before it was kept, and no other"


def test_a_second_call_reads_all_from_the_store(judged: Found, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **more: object) -> None:
        raise AssertionError("done again")

    for kind, name in (
        (Trainer, "_train"),
        (FinalEvaluator, "_attack_block"),
        (FinalEvaluator, "_compared"),
        (evaluation, "measure"),
    ):
        monkeypatch.setattr(kind, name, never)
    again = final([exported], seeds=2, images=IMAGES, debug=True, console=QUIET)
    assert again == judged[0]
    assert len(again["exports"][0]["looks"]) == 1


def wilson_by_roots(p: float, n: int) -> list[float]:
    """Return where |p - q| is 1.96 standard errors of q: Wilson's interval by its definition."""
    zz = norm.ppf(0.975) ** 2 / n
    return sorted(np.roots([1 + zz, -2 * p - zz, p * p]).real)


@pytest.mark.parametrize("model", ["magnet", "undefended", "adversarial_training"])
@pytest.mark.parametrize("what", ["clean", "full/oblivious", "full/black-box", "full/white-box", "standard/white-box"])
def test_each_figure_is_what_the_kept_verdicts_of_its_seeds_say(
    judged: Found, exported: Path, model: str, what: str
) -> None:
    parts = defaultdict[int, list[dict[str, Tensor]]](list)
    for path in sorted((exported.parents[2] / ".store" / "finals").glob("*/entry.json")):
        about = json.loads(path.read_text())["about"]
        if about.get("model", "").startswith(model) and "images" in about["about"]:
            parts[about["seed"]].append(load_file(path.parent / "verdicts.safetensors"))
    right = [torch.cat([part[f"right {what}"][0] for part in parts[seed]]).numpy() for seed in SEEDS]
    wrong = [torch.cat([part[f"wrong {what}"][0] for part in parts[seed]]).numpy() for seed in SEEDS]
    row = the(judged[0], model, *(what.split("/") if "/" in what else (what, "")))
    assert [len(verdicts) for verdicts in right] == [IMAGES, IMAGES]
    assert row["each"] == pytest.approx([verdicts.mean() for verdicts in right])
    assert row["mean"] == pytest.approx(np.mean([verdicts.mean() for verdicts in right]))
    assert row["deviation"] == pytest.approx(np.std([verdicts.mean() for verdicts in right], ddof=1))
    assert [row["low"], row["high"]] == pytest.approx(wilson_by_roots(row["mean"], IMAGES), abs=1e-9)
    assert row["error"] == pytest.approx(np.mean(wrong))
    assert row["rejection"] == pytest.approx(1 - np.mean(right) - np.mean(wrong))


def test_the_figures_come_back_by_hand_on_the_test_split(judged: Found, exported: Path) -> None:
    """Clean accuracy and FGSM on the bare classifier, written anew, on images read from the cache."""
    folder = ensure("digits", None)
    x_NCHW = torch.from_numpy(np.load(folder / "x_test.npy")[:IMAGES].astype(np.float32)) / 16
    y_N = torch.from_numpy(np.load(folder / "y_test.npy")[:IMAGES].astype(np.int64))
    clean, fooled = [], []
    for seed in SEEDS:
        target = cast(Defended, evaluated_models(cases_of(exported), seed)[0].target)
        x = x_NCHW.clone().requires_grad_()
        logits_NK = target.classifier(x)
        spread_N1 = logits_NK.detach().std(dim=1, correction=0, keepdim=True)
        scaled_NK = logits_NK * spread_N1.clamp(*SPREAD) / spread_N1  # as every attack sees them
        (slope,) = torch.autograd.grad(F.cross_entropy(scaled_NK, y_N, reduction="sum"), x)
        attacked = (x_NCHW + 0.1 * slope.sign()).clamp(0, 1)
        kept = [(target(x).argmax(1) == y_N) & target.accept(x) for x in (x_NCHW, attacked)]
        clean.append(float(kept[0].float().mean()))
        fooled.append(float((kept[0] & kept[1]).float().mean()))
    assert the(judged[0], "magnet", "clean", "")["each"] == pytest.approx(clean)
    (trail,) = (one["accuracy_after"] for one in judged[0]["trails"] if one["model"] == "magnet (A, Linf eps 0.1)")
    assert trail["full/oblivious/fgsm"] == pytest.approx(mean(fooled))


def test_what_is_trained_has_train_and_validation_and_nothing_else(judged: Found, exported: Path) -> None:
    (case,) = cases_of(exported)
    sizes = splits.sizes("digits")
    for _, study, _ in case.trainings():
        x_NCHW, y_N = case.runner(study.model_copy(update={"train_images": None}), 1000).assets.training_set
        assert len(x_NCHW) == len(y_N) == sizes.train + sizes.validation
        for split, part in (("train", slice(sizes.train)), ("validation", slice(sizes.train, None))):
            wanted_NCHW, wanted_N = splits.load("digits", split)  # type: ignore[arg-type]
            assert torch.equal(x_NCHW[part], wanted_NCHW) and torch.equal(y_N[part], wanted_N)
    tested = {image.numpy().tobytes() for image in splits.open_test("digits")[0]}
    assert not tested & {image.numpy().tobytes() for image in x_NCHW}
    assert len(case.runner(study, 1000).assets.training_set[0]) == 150 + sizes.validation


@pytest.mark.parametrize("limit", [None, 100, 1257])
def test_no_search_takes_a_fit_of_a_final_run_nor_the_other_way_round(exported: Path, limit: int | None) -> None:
    (case,) = cases_of(exported)
    for _, study, params in case.trainings():
        study = study.model_copy(update={"train_images": limit, "seed": 1000})
        theirs, ours = TrialRunner(study, study.store), case.runner(study, 1000)
        assert theirs.trainer.key(params) != ours.trainer.key(params)
        assert theirs.assets.classifier_key("A") != ours.assets.classifier_key("A")


def test_the_baseline_is_named_for_what_it_is_and_long_enough_to_converge_otherwise(
    judged: Found, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four epochs on 330 images do not converge, and every table says so; without the tests' haste there are more."""
    names = {row["model"] for row in judged[0]["rows"] if row["model"].startswith("adv")}
    assert names == {"adversarial_training, pgd Linf eps 0.1, 4 epochs, not converged (A, Linf eps 0.1)"}
    assert names.pop() in page(judged[0]) and "adversarially trained (" not in page(judged[0])
    (case,) = cases_of(exported)
    for threat, reach in ((ThreatModel("L2", 1.5, "oblivious"), 3.75), (ThreatModel("Linf", 0.1, "oblivious"), 0.25)):
        _, (kind, study, params) = replace(case, threat=threat).trainings()
        train = params.train
        assert (train["norm"], train["eps"], train["attack"]) == (threat.norm, threat.eps, "pgd")
        assert train["pgd_steps"] * train["pgd_step_size"] == pytest.approx(reach)  # type: ignore[operator]
        assert kind == "adversarial_training" and study.threat == "white-box"
    whole = replace(case, study=case.study.model_copy(update={"train_images": None}))
    monkeypatch.setattr(retraining, "UPDATES", 1000)
    epochs = [int(dict(params.train)["epochs"]) for _, _, params in whole.trainings()]
    assert epochs[1] * math.ceil(1437 / 128) >= 1000


def test_the_page_says_what_the_numbers_are(judged: Found) -> None:
    table, _ = judged
    said = page(table)
    one = table["exports"][0]
    assert f"{IMAGES} of 360 test images were attacked" in said
    assert "2 trainings, seeded 1000, 1001, on 150 training and all 180 validation images" in said
    assert "trained on 150 training and all 180 validation images, of 1437 that there are" in said
    assert "Linf eps 0.1" in said and "not times the seeds" in said and "Look" not in said
    assert f"**Verdict on {one['export']}: " in said and " undefended (white-box, Linf eps 0.1)" in said
    assert all(f"> **FAILED CHECK** {one['export']}: {alarm}" in said for alarm in one["alarms"])
    for each in one["optimism"]:
        way = "optimistic" if each["optimistic"] >= 0 else "pessimistic"
        assert each["optimistic"] == pytest.approx(each["validation"] - each["test"])
        assert f"{way} by {100 * abs(each['optimistic']):.1f} points" in said


def test_the_search_is_compared_by_its_own_attacks_on_the_same_weights(judged: Found, exported: Path) -> None:
    """The search's suite is `quick`: PGD of five steps and the targeted iFGSM, run here by the suite itself."""
    (case,) = cases_of(exported)
    images = splits.open_test("digits", None, CHOSEN_ON)
    target = Defended(case.target.defense, case.target.classifier)
    found = evaluate(SUITES["quick"], target, *images, case.threat, seed=0).attacked
    each = judged[0]["exports"][0]["optimism"][0]
    assert (each["by"], each["suite"], each["test_images"]) == ("search", "quick", CHOSEN_ON)
    assert each["test"] == pytest.approx(found.accuracy)
    assert each["validation"] == case.evidence["attacked_accuracy_of_the_search"]


def test_another_look_is_noted_and_the_page_says_so(judged: Found, exported: Path, tmp_path: Path) -> None:
    """A copy of the export, so that the others keep their one look; two exports have one table, baselines once."""
    twin = tmp_path / "twin"
    shutil.copytree(exported, twin, ignore=shutil.ignore_patterns("final"))
    known = json.loads((twin / "evidence.json").read_text()) | {"candidate": "twin"}
    (twin / "evidence.json").write_text(json.dumps(known))
    (twin / SEAL).write_bytes(seal({name: (twin / name).read_bytes() for name in FILES}))
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    storage, screen = str(exported.parents[2]), io.StringIO()
    console = Console(file=screen, width=1000)
    table = final([other, twin], seeds=1, images=IMAGES, storage=storage, debug=True, console=console)
    assert [one["export"] for one in table["exports"]] == [judged[0]["exports"][0]["export"], "twin"]
    assert [len(one["looks"]) for one in table["exports"]] == [2, 1]
    assert [one["opened_beside"] for one in table["exports"]] == [["twin"], ["other"]]
    assert "opened for 1 more of twin's folder too (other)" in (twin / "final" / "FINAL.md").read_text()
    assert sum(row["figure"] == "accuracy" for row in table["rows"]) == (2 + 2) * 5
    assert "**Look 2 at the test split**" in page(table) and "look 2 at the test split" in screen.getvalue()
    rows = csv.DictReader(io.StringIO((tmp_path / "final" / "FINAL.csv").read_text()))
    openings = {(row["export"], row["look"]) for row in rows}
    assert openings == {(judged[0]["exports"][0]["export"], "2"), ("twin", "1"), ("", "2")}
    assert "**Look 2" not in (twin / "final" / "FINAL.md").read_text()
    assert "2 exports stand side by side" in (tmp_path / "final" / "FINAL.md").read_text()
    assert all(row["deviation"] is None for row in table["rows"]), "one seed has none"
    assert "±" not in page(table).partition("| model")[2]


def test_the_files_are_markdown_csv_latex_and_json(judged: Found, exported: Path) -> None:
    table, _ = judged
    files = {name: (exported / "final" / name).read_text() for name in forms(table)}
    assert files["FINAL.md"] == page(table)
    assert json.loads(files["FINAL.json"]) == table
    rows = list(csv.DictReader(io.StringIO(files["FINAL.csv"])))
    assert [float(row["mean"]) for row in rows] == pytest.approx([row["mean"] for row in table["rows"]])
    assert all(f"{IMAGES} of 360" in row["smaller"] and row["look"] == "1" for row in rows)
    body = [line for line in files["FINAL.tex"].splitlines() if not line.startswith("%")]
    cells = [line.removesuffix(r" \\").split(" & ") for line in body if " & " in line]
    assert {len(line) for line in cells} == {7} and len(cells) == 4
    assert all("Linf eps 0.1" in line[0] for line in cells[1:]), "each row names its threat model"
    assert body[0].startswith(r"\begin{tabular}{lrrrrrr}") and body[-1] == r"\end{tabular}"
    for line in body:
        bare = re.sub(r"\\[\\%_&#${}]", "", line)
        assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0 and "%" not in bare


def test_a_watcher_sees_seed_epoch_attack_and_the_time_left(
    judged: Found, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    (case,) = cases_of(exported)
    model = evaluated_models([case], 1000)[1]
    heard = FinalEvaluator(
        *splits.open_test("digits", None, 3),
        7,
        case.study.store,
        DeviceLock(torch.device("cpu")),
        lambda doing, share: said.append(doing),
        steps=1,
    )
    heard.evaluate([model])
    assert any("images 0 to 3: standard apgd-ce" in line for line in said)
    assert any("images 0 to 3: full pgd-5" in line for line in said)
    screen = io.StringIO()
    with job_runner(case.study, debug=True, concurrent=None, console=Console(file=screen, force_terminal=True)) as work:
        work("training", [Job("seed 1000", speaks, ())])
    assert "epoch 1/2" in screen.getvalue() and "left" in screen.getvalue()
    with job_runner(case.study, debug=True, concurrent=None, console=Console(file=(pipe := io.StringIO()))) as work:
        work("training", [Job("seed 1000", speaks, ())])
    assert pipe.getvalue() == "training: seed 1000 is done, 1 of 1\n"
    monkeypatch.setattr("search.console.EVERY_S", 0.1)
    with job_runner(case.study, debug=True, concurrent=None, console=Console(file=(pipe := io.StringIO()))) as work:
        work("training", [Job("seed 1000", speaks, ())])
    line = r"training: 50%, \d:\d\d:\d\d so far(, \S+ left)?; seed 1000: puvae: epoch 1/2: 50%, \d:\d\d:\d\d so far"
    assert re.match(line, pipe.getvalue()), pipe.getvalue()
    heard.evaluate([model])
    assert said[-1].endswith("kept from an earlier run")


def speaks(study: Study, tell: Tell) -> None:
    tell("puvae: epoch 1/2", 0.5)
    time.sleep(0.3)  # a terminal is drawn ten times a second


def test_workers_of_ray_do_the_same(judged: Found, exported: Path) -> None:
    cases = cases_of(exported)
    console = Console(file=(screen := io.StringIO()), force_terminal=True, width=200)
    with job_runner(cases[0].study, debug=False, concurrent=1, console=console) as work:
        pieces = [Job(f"seed {seed}", train_seed_shortly, (cases, seed)) for seed in SEEDS]
        assert work("training", pieces) == ["", ""]
        (found,) = work("on the test split", [Job("export", evaluate_export, (cases[0], IMAGES))])
        mark = cases[0].folder / "final" / "mark"
        with pytest.raises(ValueError, match="this one fails"):
            work("failing", [Job("one", fails, ()), Job("two", marks, (mark,)), Job("three", fails, ())])
    assert "seed 1001 is done, 2 of 2" in screen.getvalue()
    optimism = judged[0]["exports"][0]["optimism"][0]
    assert found.verdicts["search"].accuracy == pytest.approx(optimism["test"])
    assert not mark.exists(), "after a failure nothing new is begun"
    with (
        job_runner(cases[0].study, debug=False, concurrent=2, console=QUIET) as work,
        pytest.raises(ValueError, match="this one fails"),
    ):
        work("failing", [Job("one", fails, ()), Job("two", marks, (mark,))])
    assert mark.exists(), "what was under way has ended"


def train_seed_shortly(*given: Any) -> str:
    """Do what the fixture makes of `train_seed` in this process, in a worker."""
    with pytest.MonkeyPatch.context() as patch:
        _short(patch)
        return train_seed(*given)


def fails(study: Study, tell: Tell) -> None:
    raise ValueError("this one fails")


def marks(study: Study, mark: Path, tell: Tell) -> None:
    time.sleep(2)
    mark.touch()


def settings(seed: int) -> FinalSettings:
    return FinalSettings(dataset="digits", images=4, of=4, train=8, validation=2, seeds=[seed], code="")


def test_times_of_unlike_devices_are_no_mean() -> None:
    verdict = Verdict(torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool))
    found = FinalVerdicts(dict.fromkeys(COLUMNS, verdict), {}, {})
    seeds = [
        ModelResult(
            export="e",
            model="m",
            threat=ThreatModel("Linf", 0.1, "white-box"),
            verdicts=found,
            latency=Latency(ms, ms, ms, 0.0, device, 30),
        )
        for ms, device in ((7.0, "A100"), (9.0, "A100"), (40.0, "T4"))
    ]
    rows = [row for row in _rows(seeds, settings(0)) if row["figure"] == "latency_ms_p50"]
    assert [(row["device"], row["mean"]) for row in rows] == [("A100", 8.0), ("T4", 40.0)]


def test_two_runs_at_one_export_lose_no_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "final").mkdir()

    def slowly(path: Path, data: bytes) -> None:
        time.sleep(0.3)
        write_atomic(path, data)

    monkeypatch.setattr(test_set_log, "write_atomic", slowly)
    asked = [settings(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(partial(test_set_log.note_opening, tmp_path), asked))
    assert len(json.loads((tmp_path / test_set_log.OPENED).read_text())) == 3


def test_who_asks_a_final_run_to_end_is_heard_as_ctrl_c(exported: Path) -> None:
    (case,), screen = cases_of(exported), io.StringIO()
    with (
        pytest.raises(KeyboardInterrupt),
        job_runner(case.study, debug=True, concurrent=None, console=Console(file=screen)) as work,
    ):
        work("training", [Job("seed 1000", asked_to_end, ())])
    assert "the same command goes on" in screen.getvalue()


def asked_to_end(study: Study, tell: Tell) -> None:
    signal.raise_signal(signal.SIGTERM)


def test_a_seed_that_diverges_costs_the_others_nothing(
    judged: Found, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(cases: Sequence[ExportedWinner], seed: int, tell: Tell) -> None:
        if seed == 1000:
            raise TrialError("the training diverged: loss is nan after epoch 1")

    monkeypatch.setattr(finals, "train", diverges)
    copy = shutil.copytree(exported, tmp_path / "copy")
    table = final([copy], seeds=2, images=IMAGES, storage=str(exported.parents[2]), debug=True, console=QUIET)
    assert table["trained"] == [1001] and "1000" in table["failed"]
    assert "1 of 2 trainings diverged" in page(table)


@pytest.mark.parametrize(
    ("asked", "law"),
    [
        ({"seeds": 0}, "seeds must be from 1 to 1000, but is 0"),
        ({"concurrent": 0}, "concurrent must be at least 1, but is 0"),
        ({"images": 0}, "images must be from 1 to 360 of digits's test split, but is 0"),
        ({"images": 361}, "images must be from 1 to 360 of digits's test split, but is 361"),
        ({"exports": []}, "at least one export"),
        ({"exports": [Path("nowhere")]}, "an export must be a folder with whole files"),
        ({"altered": "weights.safetensors"}, "weights.safetensors"),
        ({"altered": "evidence.json"}, "evidence.json"),
        ({"data_dir": "empty"}, "the data must be those of the export"),
        ({"twice": True}, "must be different"),
        ({"storage": "/proc/none"}, "a final run writes into /proc/none"),
    ],
)
def test_bad_input_ends_before_anything_is_trained(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], law: str
) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy", ignore=shutil.ignore_patterns("final"))
    if altered := asked.pop("altered", None):
        (copy / altered).write_bytes((copy / altered).read_bytes() + b" ")
    if asked.pop("data_dir", None):
        monkeypatch.setattr(splits, "checksum", lambda *args: "0" * 64)
    given: dict[str, Any] = {
        "storage": str(tmp_path / "store"),
        "exports": [copy] * (2 if asked.pop("twice", False) else 1),
    } | asked
    with pytest.raises(InputError) as error:
        final(**given, debug=True, console=QUIET)
    assert law in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "store").exists() and not (copy / "final").exists()


def test_a_common_folder_that_cannot_be_written_is_named_before_anything_is_trained(
    exported: Path, tmp_path: Path
) -> None:
    (tmp_path / "final").write_text("in the way")
    twin = shutil.copytree(exported, tmp_path / "twin", ignore=shutil.ignore_patterns("final"))
    case = finals._case(twin, {"storage": str(tmp_path / "store"), "data_dir": None, "address": None})
    with pytest.raises(InputError, match="a final run writes into .*final, but that cannot be: File exists"):
        finals._prepared([case, case])
