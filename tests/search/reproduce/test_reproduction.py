"""A paper's table beside ours: a made-up table on digits, run whole, run again, run in part."""

from __future__ import annotations

import io
import json
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from rich.console import Console

import defenses
from attacks.algorithms.mixture import MixtureAttack, fool
from attacks.black_box import Substitute
from attacks.catalog import FGSM_TARGETED
from attacks.confidence import wilson
from attacks.gradient_view import View
from attacks.seeding import Draws
from attacks.threat import ThreatModel
from defenses.base import Batches, Defended, Shape
from search.reproduce import paper_tables
from search.reproduce.attack_cell import NotRun
from search.reproduce.cell_setting import Setting
from search.reproduce.cells import UNTAUGHT, Cells, Ours
from search.reproduce.fraction import Fraction
from search.reproduce.page import _summary, figures, page
from search.reproduce.paper_tables import OURS, Cell, Summary, Table
from search.reproduce.progress import TableProgress
from search.reproduce.reproduction import _named, _order, _summed, beside, reproduce
from search.reproduce.results import TableResult
from search.study.loading import make_study
from search.trial.assets import Assets
from search.trial.runner import TrialRunner
from search.trial.training import Trainer
from spaces.exceptions import InputError
from spaces.space import SearchSpace

ATTACK: dict[str, Any] = {"attack": "fgsm-targeted", "eps": 0.2}
TINY: dict[str, Any] = {"conv_maps": 2, "decoder_maps": 4, "dense": 16, "latent": 4, "epochs": 4, "batch_size": 64}
GMVAE: dict[str, Any] = {"maps": 2, "dense": 8, "epochs": 4, "tau_dec": 0.0}
WHITE: dict[str, Any] = {**ATTACK, "attack": "fgsm", "defense": "gmvae", "knobs": GMVAE, "knowledge": "white-box"}
COLUMNS: dict[str, dict[str, Any]] = {
    "Clean": {"measure": "clean"},
    "None": ATTACK,
    "PuVAE": {**ATTACK, "defense": "puvae", "knobs": TINY},
    "Broken": {**ATTACK, "defense": "gmvae", "knobs": {"latent": 3}},
    "GMVAE": {**WHITE, "measure": "rejection"},
    "Class mean": {**ATTACK, "defense": "class_mean"},
    "Searched": {**WHITE, "knobs": {**GMVAE, "reclassify": True}, "measure": "reclassified"},
}
HALF = Fraction(0.5)


def _number(label: str) -> tuple[float | None, str]:
    return (None, OURS) if label == "Class mean" else (0.5, "50.0")


def tiny(columns: dict[str, dict[str, Any]] = COLUMNS, **fields: Any) -> Table:
    """Return a table of one row."""
    cells = [
        Cell(("A", label), *_number(label), Setting(**{"task": "digits/A", **setting}))
        for label, setting in columns.items()
    ]
    return replace(
        Table(
            name="tiny/1",
            title="A made-up table",
            citation="Nobody",
            source="Table 1",
            file="",
            lines=(1, 1),
            quantity="accuracy",
            called="white-box",
            dimensions=("classifier", "defense"),
            labels={"classifier": ("A",), "defense": tuple(columns)},
            cells=tuple(cells),
            summaries=(Summary("average", {"defense": "None"}, 0.4, "40.0"),),
            remark="",
        ),
        **fields,
    )


def run(storage: Path, table: Table, out: str = "out") -> tuple[TableResult, str]:
    """Return what was found, and what was printed on the way."""
    console = Console(file=io.StringIO(), width=1000)
    found = beside(table, HALF, storage=str(storage), out=storage / out, console=console)
    assert isinstance(console.file, io.StringIO)
    return found, console.file.getvalue()


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reproduce")


@pytest.fixture(scope="module")
def finished(storage: Path) -> tuple[TableResult, str]:
    return run(storage, tiny())


def cell(found: TableResult, defense: str) -> Any:
    return next(row for row in found["cells"] if row["labels"]["defense"] == defense)


def test_a_cell_is_what_an_independent_evaluation_of_the_same_attack_finds(
    storage: Path, finished: tuple[TableResult, str]
) -> None:
    row = cell(finished[0], "PuVAE")
    params = Cells(str(storage), None, HALF, 0, lambda *heard: None).params(tiny().cells[2].setting)
    study = make_study(
        {
            "defense": "puvae",
            "task": "digits/A",
            "knobs": params.flat(),
            "threat": "oblivious",
            "train_images": HALF.training_images(1257),
            "eval_images": row["images"],
            "classifier_epochs": HALF.epochs(10),
            "storage": str(storage),
        }
    )
    runner = TrialRunner(study, study.store)
    assert runner.trainer.key(params) in runner.assets.store.held("fits")
    _, defense = runner.trainer.fit(params, lambda epoch, metrics: pytest.fail("it was trained again"))
    x_NCHW, y_N = runner.assets.evaluator.x_NCHW, runner.assets.evaluator.y_N
    made = FGSM_TARGETED.craft(View(runner.assets.target), x_NCHW, y_N, ThreatModel("Linf", 0.2, "oblivious"), 0)
    torch.manual_seed(0)
    right = Defended(defense, runner.assets.target)(made).argmax(1) == y_N
    assert row["ours"] == pytest.approx(float(right.double().mean()))
    assert row["interval"] == pytest.approx(wilson(row["ours"], row["images"]))
    assert row["distance"] == pytest.approx(row["ours"] - 0.5)


def test_a_second_run_trains_and_attacks_nothing(
    storage: Path, finished: tuple[TableResult, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *given: pytest.fail("a fit was asked for"))
    monkeypatch.setattr(Assets, "adversarial", lambda *given: pytest.fail("an attack was run"))
    whole = tiny()
    sound = tuple(c for c in whole.cells if c.labels[1] != "Broken")
    again, printed = run(storage, replace(whole, cells=sound), "again")
    for row in again["cells"]:
        assert row == cell(finished[0], row["labels"]["defense"])
    assert "(kept; it took " in printed and "(kept" not in finished[1]


def test_a_part_of_a_table_is_run_alone_and_lies_beside_the_whole(tmp_path: Path) -> None:
    found = reproduce(
        "gmvae/1", only=["COIL-100", "SOTA"], storage=str(tmp_path), console=Console(file=io.StringIO(), width=99)
    )
    assert found["folder"].endswith("gmvae-1-COIL-100-SOTA") and found["labels"]["figure"] == ["SOTA"]
    assert [row["not_run"] for row in found["cells"]] == ["another paper's classifier"]
    again = "<code>python launch.py reproduce gmvae/1 --only COIL-100 --only SOTA</code>"
    assert again in (Path(found["folder"]) / "table.html").read_text()


def test_a_cell_that_fails_says_why_and_ends_nothing(finished: tuple[TableResult, str]) -> None:
    found, printed = finished
    assert found["state"] == "finished"
    assert cell(found, "Broken")["not_run"].startswith("InputError: latent must be 0 or at least")
    assert [row["labels"]["defense"] for row in found["cells"] if row["ours"] is None] == ["Broken"]
    assert "A · Broken: not run: InputError: latent must be 0" in printed


def test_ratios_are_found_after_all_times_and_after_what_they_are_ratios_of() -> None:
    times = paper_tables.table("puvae/7")
    order = [times.cells[i].labels for i in _order(times)]
    assert [figure for figure, _ in order] == 3 * ["Time (seconds)"] + 3 * ["Ratio"] and order[3][1] == "PuVAE"


def test_a_summary_is_of_the_cells_that_ran(finished: tuple[TableResult, str]) -> None:
    (one,) = finished[0]["summaries"]
    assert one["ours"] == cell(finished[0], "None")["ours"]
    assert (one["cells"], one["of"]) == (1, 1)


def test_a_paper_s_average_is_compared_where_all_of_its_cells_ran_alone() -> None:
    rows: Any = [{"labels": {"attack": name}, "ours": ours} for name, ours in (("FGSM", 0.5), ("CW", None))]
    one = _summed(Summary("average", {}, 0.4, "40.0"), rows)
    assert (one["ours"], one["cells"], one["of"], one["distance"]) == (0.5, 1, 2, None)
    assert "ours 50.0 over 1 of 2 cells, the paper's 40.0, of all cells" in _summary(one)
    assert _summed(Summary("average", {"attack": "FGSM"}, 0.4, "40.0"), rows)["distance"] == pytest.approx(0.1)


def test_a_cell_that_the_paper_does_not_have_is_shown_as_ours_alone(
    storage: Path, finished: tuple[TableResult, str]
) -> None:
    found, printed = finished
    row = cell(found, "Class mean")
    assert row["ours"] is not None and (row["paper"], row["distance"], row["band"]) == (None, None, None)
    (said,) = re.findall(r"A · Class mean: (.*)", printed)
    assert said.startswith(f"ours {100 * row['ours']:.1f}") and "; the paper has none" in said
    assert f"| {100 * row['ours']:.1f} |" in (storage / "out" / "table.md").read_text()
    assert "not in the paper" in (storage / "out" / "table.html").read_text()


def test_what_was_rejected_is_searched_and_counted_alone(finished: tuple[TableResult, str]) -> None:
    rejected, searched = cell(finished[0], "GMVAE"), cell(finished[0], "Searched")
    assert searched["images"] == round(rejected["ours"] * rejected["images"]) > 0


def test_the_page_names_the_threat_model_by_its_true_name_and_says_what_the_run_was(
    storage: Path, finished: tuple[TableResult, str]
) -> None:
    for text in ((storage / "out" / "table.html").read_text(), (storage / "out" / "table.md").read_text()):
        assert "oblivious, white-box (the paper says" in text
        assert "oblivious, Linf eps 0.2; white-box, Linf eps 0.2" in text
        assert "test split is opened by" in text
        assert "shows the way and proves nothing" in text
        assert "puvae: training images 747, classifier epochs 7, epochs 4, batch size 45." in text
        assert "InputError: latent must be 0 or at least" in text
    assert json.loads((storage / "out" / "table.json").read_text()) == json.loads(json.dumps(finished[0]))
    assert "http" not in (storage / "out" / "table.html").read_text()


def test_colours_are_for_terminals(finished: tuple[TableResult, str]) -> None:
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
        console.print(page(finished[0]))
        assert isinstance(console.file, io.StringIO)
        assert ("\x1b[" in console.file.getvalue()) == terminal
        assert "(the paper says" in console.file.getvalue()


@pytest.mark.parametrize("notice", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_it_has(
    notice: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_two(self: Cells, setting: Setting) -> Ours:
        if setting.defense != "none":
            signal.raise_signal(notice)
        return Ours(value=0.47, images=100, seconds=1.0, ran={})

    monkeypatch.setattr(Cells, "run", run_two)
    monkeypatch.setattr(Cells, "missing", lambda self, setting: "")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where Ctrl-C is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tiny())
    finally:
        signal.signal(signal.SIGINT, before)
    kept = json.loads((tmp_path / "out" / "table.json").read_text())
    assert kept["state"] == "interrupted"
    assert [row["ours"] for row in kept["cells"]] == [0.47, 0.47, *5 * [None]]
    assert [row["band"] for row in kept["cells"]] == [1, 1, *5 * [None]]
    assert "the same command goes on from here" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("wish", "law"),
    [
        ({"seed": -1}, "seed must be greater than or equal to 0, but is -1"),
        ({"out": Path(__file__)}, f"a table is written into {__file__}, but that cannot be: "),
        ({"storage": __file__}, f"a table is written into {__file__}"),
    ],
)
def test_what_cannot_be_written_or_seeded_is_refused_before_anything_runs(
    wish: dict[str, Any], law: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(law)):
        reproduce("puvae/7", **{"storage": str(tmp_path / "runs"), "console": Console(quiet=True), **wish})
    assert not (tmp_path / "runs" / "tables").exists()


def test_times_are_compared_as_multiples_of_the_fastest(storage: Path) -> None:
    gan: dict[str, Any] = {"defense": "defense_gan", "knobs": {"latent": 4, "maps": 2, "restarts": 2, "steps": 100}}
    puvae: dict[str, Any] = {"defense": "puvae", "knobs": TINY}
    table = tiny(
        {
            "MagNet": {"defense": "magnet", "measure": "seconds", "images": 256},
            "Defense-GAN": {**gan, "measure": "seconds", "images": 256},
            "times": {**puvae, "measure": "ratio"},
        },
        quantity="seconds",
    )
    values = {"MagNet": 0.1, "Defense-GAN": 10.0, "times": 1.0}
    cells = tuple(replace(c, value=values[c.labels[1]], printed=str(values[c.labels[1]])) for c in table.cells)
    found, said = run(storage, replace(table, cells=cells, summaries=()), "times")
    magnet, descended, times = cast(list[Any], found["cells"])
    assert [row["extrapolated"] for row in found["cells"]] == [False, True, False]
    assert [figures(row)[0].startswith("≈") for row in found["cells"]] == [False, True, False]
    assert "Defense-GAN: ours ≈" in said and said.count("ours ≈") == 1
    for name in ("table.html", "table.md"):
        text = (storage / "times" / name).read_text()
        assert figures(descended)[0] in text and "≈: 1 time extrapolated from 1 and 3 steps" in text
    assert magnet["relative"] == {"ours": 1.0, "paper": 1.0, "to": "A · MagNet"}
    assert descended["relative"]["paper"] == pytest.approx(100)
    assert descended["ours"] > magnet["ours"]
    assert descended["distance"] == pytest.approx(descended["relative"]["ours"] / 100)
    assert times["relative"]["ours"] == 1.0


def test_a_limit_of_time_cuts_the_descent_and_leaves_out_what_is_too_slow(storage: Path) -> None:
    cells = Cells(str(storage), None, Fraction(0.2), 0, lambda *heard: None)
    gan: dict[str, Any] = {"defense": "defense_gan", "knobs": {"latent": 4, "maps": 2, "restarts": 4, "steps": 10_000}}
    ours = cells.run(Setting(task="digits/A", **ATTACK, **gan, limit_s=0.2))
    assert 1 <= ours.ran["steps"] < 10_000
    with pytest.raises(NotRun, match="a batch of 128 takes .* s on this device, more than 1e-06 s"):
        cells.run(Setting(task="digits/A", **ATTACK, defense="puvae", knobs=TINY, limit_s=1e-6))


def test_a_black_box_attacker_asks_whom_its_oracle_is(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def trained(target: torch.nn.Module, *given: Any, **options: Any) -> Substitute:
        asked.append(target)
        assert options["rounds"] == 2
        return Substitute(target, 0, 1.0)

    monkeypatch.setattr("attacks.black_box.train_substitute", trained)
    cells = Cells(str(storage), None, Fraction(0.1), 0, lambda *heard: None)
    for oracle in ("bare", "defended"):
        trained_on = {"defense": "adversarial_training", "knobs": {"attack": "fgsm", "epochs": 1}, "oracle": oracle}
        setting: dict[str, Any] = {**ATTACK, **trained_on, "knowledge": "black-box", "substitute": "A"}
        cells.run(Setting(task="digits/A", **setting))
    assert [isinstance(one, Defended) for one in asked] == [False, True]
    bare = Setting(**{**setting, "task": "digits/A", "oracle": "bare"})
    assert _named(bare) == "black-box, Linf eps 0.2, by a substitute that asks the bare classifier"


def test_one_gradient_source_is_used_where_the_paper_had_one(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views, whole = list[str](), View.__init__

    def spied(self: View, target: torch.nn.Module, gradient: Any = "exact", draws: int = 1) -> None:
        views.append(gradient)
        whole(self, target, gradient, draws)

    monkeypatch.setattr(View, "__init__", spied)
    cells = Cells(str(storage), None, HALF, 0, lambda *heard: None)
    white: dict[str, Any] = {**ATTACK, "attack": "fgsm", "defense": "class_mean", "knowledge": "white-box"}
    every = cells.run(Setting(task="digits/A", **white))
    assert {"bpda", "surrogate"} <= set(views)  # the training's quick score has a view of its own
    views.clear()
    one = Setting(task="digits/A", **white, gradient="bpda")
    assert cells.run(one).value >= every.value and set(views) == {"bpda"}
    assert _named(one) == "white-box, Linf eps 0.2, by BPDA alone"


def test_an_attack_on_each_wrong_class_counts_each_of_its_images(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aims, forward = list[torch.Tensor](), MixtureAttack.forward

    def spied(self: MixtureAttack, x_NCHW: torch.Tensor, y_N: torch.Tensor) -> torch.Tensor:
        self.steps = 2
        aims.append(y_N)
        return forward(self, x_NCHW, y_N)

    monkeypatch.setattr(MixtureAttack, "forward", spied)
    cells = Cells(str(storage), None, HALF, 0, lambda *heard: None)
    white: dict[str, Any] = {"attack": "gmvae-eq10", "defense": "gmvae", "knobs": GMVAE, "knowledge": "white-box"}
    setting = Setting(task="digits/A", **white, every_target=True, measure="error", images=100)
    ours, y_N = cells.run(setting), cells.runner(setting).assets.evaluator.y_N
    assert (ours.images, len(y_N)) == (50, 50) and 0 <= ours.value <= 1
    assert [sorted(column) for column in torch.stack([y_N, *aims]).T.tolist()] == 50 * [list(range(10))]
    assert _named(setting).endswith("bounded by no eps, at each wrong class in turn")


def test_fooling_images_are_made_of_noise_for_each_class_and_count_where_they_are_accepted_as_it(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aims = list[torch.Tensor]()

    def few(model: View, aim_N: torch.Tensor, shape: tuple[int, int, int], draws: Draws) -> torch.Tensor:
        aims.append(aim_N)
        return fool(model, aim_N, shape, draws, steps=3)

    monkeypatch.setattr("search.reproduce.attack_cell.fool", few)
    cells = Cells(str(storage), None, HALF, 0, lambda *heard: None)
    accepted = []
    for tau in (0.0, 1e9):
        knobs = {**GMVAE, "tau_enc": tau, "tau_dec": tau}
        setting = Setting(task="digits/A", defense="gmvae", knobs=knobs, measure="fooled", images=100)
        ours = cells.run(setting)
        assert ours.images == 500 and aims.pop().bincount().tolist() == 10 * [50]
        accepted.append(ours.value)
    assert accepted[0] == 0 and accepted[1] > 0
    assert _named(setting) == "white-box, from noise, bounded by no eps"


def test_one_fit_serves_all_classifiers_where_the_training_looks_at_none(storage: Path) -> None:
    cells = Cells(str(storage), None, HALF, 0, lambda *heard: None)
    for defense, one in (("magnet", True), ("defense_gan", True), ("puvae", False)):
        settings = [Setting(task=f"digits/{name}", defense=defense) for name in "AB"]
        assert (len({cells.runner(s).trainer.key(cells.params(s)) for s in settings}) == 1) == one
        assert [cells.runner(s).assets.resolved.protected for s in settings] == ["A", "B"]


@pytest.mark.parametrize("defense", UNTAUGHT)
def test_the_trainings_that_are_shared_never_look_at_a_classifier(defense: str) -> None:
    class Looked(torch.nn.Module):
        def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
            raise AssertionError("it was looked at")

    kind = defenses.find(defense)
    space = SearchSpace.of(kind)
    small = {n: v for n, v in {"maps": 1, "epochs": 1, "batch_size": 4}.items() if n in space.defaults}
    params = space.narrow({**space.defaults, **small}).complete({})
    built = kind(params.train, params.inference, Shape(1, 8, 8, 2))
    list(built.fit(Batches(torch.rand(20, 1, 8, 8), torch.arange(20) % 2, epochs=1, batch_size=4), Looked()))


def test_a_fraction_cuts_images_epochs_batches_and_steps() -> None:
    space = SearchSpace.of(defenses.find("defense_gan"))
    paper = space.narrow({**space.defaults, "restarts": 20}).complete({})
    cut = Fraction(0.05).params(defenses.find("defense_gan"), paper)
    assert (cut.train["epochs"], cut.train["batch_size"]) == (9, 16)  # of the 40 epochs that count, and the least
    assert (cut.inference["steps"], cut.inference["restarts"]) == (45, 4)
    assert {n: v for n, v in cut.train.items() if n not in ("epochs", "batch_size")}.items() <= paper.train.items()
    assert (Fraction(0.05).training_images(54_000), Fraction(0.05).attacked(6_000)) == (5710, 300)
    assert (Fraction(0.05).attacked(128), Fraction(0.05).attacked(30)) == (50, 30)
    assert (Fraction(0.05).epochs(20), Fraction(0.05).epochs(10), Fraction(0.05).epochs(3)) == (4, 4, 3)
    assert Fraction(1).params(defenses.find("defense_gan"), paper) == paper
    assert (Fraction(1).epochs(926), Fraction(1).attacked(6_000)) == (926, 6_000)


def test_the_time_left_is_told_from_timed_steps_and_runs_out(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.console.EVERY_S", 0.05)
    pipe = io.StringIO()
    threads, pace = torch.get_num_threads(), TableProgress(Console(file=pipe, width=200), 1)
    setting = Setting(task="digits/A", **ATTACK, defense="puvae", knobs={**TINY, "latent": 3})
    pace.expect(Cells(str(storage), None, HALF, 0, lambda *heard: None), [setting])
    whole = pace.left()
    assert whole > 0 and torch.get_num_threads() == threads
    with pace.running():
        pace.cell("A · PuVAE")
        pace.epoch("puvae", 3, 4)
        time.sleep(0.2)
        pace.epoch("puvae", 4, 4)
        time.sleep(0.2)  # the attack takes no time that anybody knows
        pace.done("ours 50.0", 1.0)
    assert pace.left() == 0
    assert re.search(r"A · PuVAE: puvae, epoch 3 of 4: 0 of 1 cells, 0:00:\d\d so far", pipe.getvalue())
    assert re.search(r"A · PuVAE: puvae, epoch 4 of 4: 0 of 1 cells, 0:00:\d\d so far\n", pipe.getvalue())


def test_a_cell_s_study_has_its_classifier_s_recipe(storage: Path) -> None:
    cells = Cells(str(storage), None, HALF, 0, lambda *heard: None)
    study = cells.study(Setting(task="digits/A", classifier_recipe="augmented", classifier_epochs=50))
    assert (study.classifier_recipe, study.classifier_epochs) == ("augmented", HALF.epochs(50))
    assert cells.study(Setting(task="digits/A")).classifier_recipe == "plain"


@pytest.mark.parametrize("fraction", [0.0, 1.5, -1.0])
def test_a_fraction_lies_between_0_and_1(fraction: float) -> None:
    with pytest.raises(InputError, match="fraction must be above 0 and at most 1, but is"):
        Fraction(fraction)


def test_a_table_that_there_is_not_is_named_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="puvae/3"):
        reproduce("puvea/3", storage=str(tmp_path / "runs"), console=Console(file=io.StringIO()))
    assert not (tmp_path / "runs").exists()


def test_figure_7_shows_the_classes_of_one_image(storage: Path, finished: tuple[TableResult, str]) -> None:
    table = tiny({"PuVAE": COLUMNS["PuVAE"]}, name="puvae/fig7", summaries=())
    found, _ = run(storage, table, "figure 7")
    assert found["pictures"] == ["classes.png"]
    with Image.open(storage / "figure 7" / "classes.png") as picture:
        assert picture.width > 11 * 56
    assert "data:image/png;base64," in (storage / "figure 7" / "table.html").read_text()


def test_figures_9_and_3_are_charts(storage: Path, finished: tuple[TableResult, str]) -> None:
    setting = COLUMNS["PuVAE"]
    over = tiny({"PuVAE": setting}, name="puvae/fig9", dimensions=("attack", "defense"), labels={"attack": ("A",)})
    over = replace(over, labels={"attack": ("A",), "defense": ("PuVAE",)}, summaries=())
    found, _ = run(storage, over, "figure 9")
    assert found["pictures"] == ["time.svg"]
    assert found["cells"][0]["batch_s"] > 0
    eps = tiny({"Rejection": COLUMNS["GMVAE"]}, name="gmvae/fig3", dimensions=("model", "figure"))
    eps = replace(eps, labels={"model": ("A",), "figure": ("Rejection",)}, summaries=())
    found, _ = run(storage, eps, "figure 3")
    assert found["pictures"] == ["eps.svg"]
    drawing = ElementTree.fromstring((storage / "figure 3" / "eps.svg").read_text())
    assert len(drawing.findall("{http://www.w3.org/2000/svg}polyline")) == 1
