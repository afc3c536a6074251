"""The papers' tables: whole, lawful, and under their true names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

import defenses
from attacks.black_box import STEP
from attacks.catalog import ATTACKS
from search.classifiers.architectures import PARTNERS
from search.data.datasets import DATASETS
from search.reproduce import paper_tables
from search.reproduce.cells import ROUNDS
from search.reproduce.paper_tables import OURS, read, table, tables
from spaces.exceptions import InputError
from spaces.space import SearchSpace

ASKED = {
    "puvae": "3 4 5 6 7 8 fig7 fig8 fig9 pictures",
    "puvae-arxiv": "2 3 4 5 6",
    "defense-vae": "1 2 3 4 7 8 sec4.1 pictures",
    "advae": "1 3 4",
    "gmvae": "1 2 fig3 fig5 rejected eq10 recovered fooling fid pictures",
}
NAMES = [f"{paper}/{number}" for paper, numbers in ASKED.items() for number in numbers.split()]


def test_every_table_with_numbers_is_there_once() -> None:
    assert sorted(one.name for one in tables()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_whole(name: str) -> None:
    one = table(name)
    assert one.title and one.citation and one.source and one.file.endswith(".txt")
    assert set(one.labels) == set(one.dimensions) and len({cell.labels for cell in one.cells}) == len(one.cells)
    for i, dimension in enumerate(one.dimensions):
        assert {cell.labels[i] for cell in one.cells} == {*one.labels[dimension]}


@pytest.mark.parametrize("name", NAMES)
def test_an_accuracy_is_a_fraction_and_a_time_is_above_0(name: str) -> None:
    for cell in table(name).cells:
        timed = cell.setting.measure in ("seconds", "ratio")
        assert timed == (table(name).quantity == "seconds")
        assert cell.value is None or (0 < cell.value if timed else 0 <= cell.value <= 1), cell


@pytest.mark.parametrize("name", NAMES)
def test_a_number_that_the_text_does_not_give_says_why(name: str) -> None:
    one = table(name)
    unknown = [cell for cell in one.cells if cell.value is None and cell.printed != OURS]
    remark = one.remark.lower()
    assert all(cell.note or "picture" in remark or "no number" in remark for cell in unknown)


def test_what_cannot_be_read_or_run_says_why() -> None:
    null = {one.name for one in tables() if all(cell.setting.note for cell in one.cells)}
    assert null == {"puvae/pictures", "defense-vae/pictures", "gmvae/pictures", "gmvae/fid"}


def test_each_result_of_gmvaes_text_is_a_table_of_its_setting() -> None:
    rejected = table("gmvae/rejected")
    assert rejected.cell("FGSM", "MNIST") is None and len(rejected.cells) == 8
    assert all(cell.value == 1 and cell.setting.measure == "rejection" for cell in rejected.cells)
    budgets = {cell.labels[0]: ATTACKS[cell.setting.attack or ""] for cell in rejected.cells}
    steps = {name: (b.steps, round((b.pace or 0) * 0.3, 9)) for name, b in budgets.items()}
    assert steps == {"FGSM": (1, 0.3), "MIM": (10, 0.06), "PGD": (40, 0.01)}
    for cell in table("gmvae/eq10").cells:
        assert cell.setting.every_target and (cell.setting.images, cell.value) == (1000, 0)
    assert {cell.setting.measure for cell in table("gmvae/fooling").cells} == {"fooled"}
    variable = {cell.setting.knobs["variable_entropy"] for cell in table("gmvae/fig5").cells}
    assert variable == {True} and not SearchSpace.of(defenses.find("gmvae")).defaults["variable_entropy"]


@pytest.mark.parametrize("number", "345")
def test_class_means_stand_beside_puvae_and_are_ours_alone(number: str) -> None:
    one = table(f"puvae/{number}")
    means = one.of({"defense": "Class mean"})
    assert [cell.labels[:2] for cell in means] == [cell.labels[:2] for cell in one.of({"defense": "PuVAE"})]
    assert all((cell.printed, cell.value, cell.setting.defense) == (OURS, None, "class_mean") for cell in means)
    assert "Class mean" in one.remark


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_has_an_eps_if_it_keeps_to_one(name: str) -> None:
    attacked = [cell.setting for cell in table(name).cells if cell.setting.attack]
    assert all((made.eps is None) == ATTACKS[made.attack or ""].unbounded for made in attacked)


def test_every_defense_can_be_built_for_its_data_with_its_knobs() -> None:
    settings = {cell.setting for one in tables() for cell in one.cells if cell.setting.defense != "none"}
    needed = {(s.task.partition("/")[0], s.defense, tuple(sorted(s.knobs.items()))) for s in settings}
    assert len(needed) > 40
    for dataset, name, knobs in needed:
        defense, shape = defenses.find(name), DATASETS[dataset].shape
        params = SearchSpace.of(defense).narrow(dict(knobs)).complete({})
        with torch.device("meta"):
            defense(params.train, params.inference, shape)


def test_what_a_paper_calls_white_box_stands_under_its_true_name() -> None:
    assert table("puvae/3").threat == 'oblivious (the paper says "white-box")'
    assert table("defense-vae/2").threat == 'oblivious (the paper says "white-box")'
    assert table("defense-vae/1").knowledge == ("oblivious", "white-box")
    assert table("advae/1").threat == "oblivious, black-box, white-box"
    assert table("defense-vae/4").threat == "no attack"
    for name in NAMES:
        attacked = [cell.setting for cell in table(name).cells if cell.setting.attack]
        if name.startswith("puvae"):
            known = {"puvae/fig8": {"oblivious", "white-box"}, "puvae/6": {"black-box"}}.get(name, {"oblivious"})
            assert {setting.knowledge for setting in attacked} <= known
            assert all(setting.targeted for setting in attacked)


def test_puvae_is_attacked_white_box_where_its_paper_does_so() -> None:
    one = table("puvae/fig8")
    assert one.threat == 'oblivious, white-box (the paper says "white-box, strong white-box")'
    for cell in one.cells:
        made = cell.setting
        data = {"MNIST": "mnist", "Fashion-MNIST": "fashion-mnist", "CIFAR-10": "cifar10"}[cell.labels[0]]
        assert (made.task, PARTNERS["B"]) == (f"{data}/B", "A")  # B is attacked, A is the source classifier
        assert (made.attack, made.eps) == ("fgsm-targeted", 0.06 if data == "cifar10" else 0.3)
        assert (made.knowledge == "white-box") == (cell.labels[1] == "strong white-box")


def test_every_defense_vae_has_five_epochs_a_phase() -> None:
    kind, found = defenses.find("defense_vae"), set()
    for number in ("1", "2", "3", "7", "8", "sec4.1"):
        for made in (cell.setting for cell in table(f"defense-vae/{number}").cells):
            if made.defense == "defense_vae":
                params = SearchSpace.of(kind).narrow(dict(made.knobs)).complete({})
                shape = DATASETS[made.task.partition("/")[0]].shape
                with torch.device("meta"):
                    defense: Any = kind(params.train, params.inference, shape)
                phases = [defense.phase(epoch) for epoch in range(int(params.train["epochs"]))]
                wanted = {"plain": ["vae"], "rec": ["vae", "rec"], "e2e": ["vae", "rec", "e2e"], "scratch": 3 * ["e2e"]}
                variant = str(params.train["variant"])
                assert phases == [phase for phase in wanted[variant] for _ in range(5)]
                found.add((number, variant))
    wide = {(number, variant) for number in "1378" for variant in ("plain", "rec", "e2e")}
    assert found == wide | {("2", "rec"), ("sec4.1", "e2e"), ("sec4.1", "scratch")}


def test_defense_gan_is_under_bpda_alone_where_advae_says_so_and_no_table_says_that_its_code_attacks_the_bare() -> None:
    for cell in table("advae/1").cells:
        if cell.setting.defense == "defense_gan":
            ours = cell.labels[1] == "DefGAN (every gradient)"
            assert (cell.printed == OURS) == ours and bool(cell.setting.attack) >= ours
            assert (cell.setting.gradient == "bpda") == (bool(cell.setting.attack) and not ours)
    for number in "17":
        one = table(f"defense-vae/{number}")
        assert "most likely" in one.remark and "attacks the bare" not in one.remark
        assert {c.setting.knowledge for c in one.of({"defense": "Defense-GAN"})} == {"oblivious"}


def test_the_base_model_of_advae_on_cifar10_is_trained_as_its_section_4_1_says() -> None:
    augmented = {"advae/4"}
    for one in tables():
        recipes = {(cell.setting.classifier_recipe, cell.setting.classifier_epochs) for cell in one.cells}
        assert recipes == ({("augmented", 50)} if one.name in augmented else {("plain", 10)}), one.name
    assert all("first 1000 of validation" in table(f"advae/{n}").remark for n in "134")


def test_magnet_has_its_own_papers_noise_on_colour_images_and_its_usual_one_elsewhere() -> None:
    for made in {cell.setting for one in tables() for cell in one.cells if cell.setting.defense == "magnet"}:
        colour = DATASETS[made.task.partition("/")[0]].shape.channels == 3
        assert (made.knobs.get("noise"), made.knobs.get("reformer")) == ((0.025, "II") if colour else (None, None))


def test_the_noise_of_gmvae_falls_as_its_latent_dimensions_grow() -> None:
    lengths = {}
    for made in {cell.setting for one in tables() for cell in one.cells if cell.setting.defense == "gmvae"}:
        dataset = made.task.partition("/")[0]
        k: Any = SearchSpace.of(defenses.find("gmvae")).narrow(dict(made.knobs)).complete({}).train
        latent = k["latent"] or DATASETS[dataset].shape.classes
        lengths[dataset, latent] = latent * k["latent_variance"]
    del lengths["celeba", 2]  # not run
    assert lengths.keys() == {("mnist", 10), ("svhn", 32), ("coil-100", 100)}
    assert all(length == pytest.approx(1 / 300) for length in lengths.values())


def test_black_box_tables_say_the_substitute_s_step_and_rounds() -> None:
    assert (STEP, ROUNDS) == (0.1, 6)
    for one in tables():
        if "black-box" in one.knowledge and not one.name.startswith("puvae"):
            assert "-0.1" in one.remark and "6" in one.remark, one.name
            assert one.name.startswith("advae") or "+0.1" in one.remark and "5 rounds" in one.remark


def test_a_setting_is_the_defaults_with_those_of_each_label_over_them() -> None:
    cell = table("puvae/5").cell("D", "iFGSM (0.06)", "MagNet")
    assert cell is not None
    setting = cell.setting
    assert (setting.task, setting.defense, setting.attack, setting.eps) == (
        "cifar10/D",
        "magnet",
        "ifgsm-targeted-cifar",
        0.06,
    )
    assert setting.knobs == {"detector_1": 1e6, "detector_2": 1e6, "reformer": "II", "noise": 0.025}
    few = table("gmvae/1").cell("SVHN", "Semi-supervised", "Accuracy")  # knobs of two labels
    assert few is not None and few.setting.knobs.keys() == {"latent", "latent_variance", "labels_per_class"}


def test_clean_images_have_one_setting_whatever_the_row_is() -> None:
    clean = [cell.setting for cell in table("defense-vae/3").of({"data": "MNIST", "defense": "No Attack"})]
    assert len(clean) == 8 and len(set(clean)) == 4


def test_a_part_has_the_cells_with_its_labels_and_the_summaries_of_no_others() -> None:
    whole = paper_tables.table("gmvae/fig3")
    part = whole.only(["Supervised", "Error", "Rejection"])
    assert len(part.cells) == 2 * len({cell.labels[1] for cell in whole.cells}) == len(part.of({"model": "Supervised"}))
    assert part.labels["figure"] == ("Error", "Rejection") and part.labels["eps"] == whole.labels["eps"]
    assert [one.printed for one in part.summaries] == ["3.89"] and part.title.endswith(", Rejection alone")
    assert not whole.only(["0.30"]).summaries and whole.only([]) == whole


def test_a_part_without_cells_and_an_unknown_label_are_refused() -> None:
    table = paper_tables.table("gmvae/1")
    with pytest.raises(InputError, match="but is 'mnist'; did you mean 'MNIST'"):
        table.only(["mnist"])
    with pytest.raises(InputError, match=r"must have a cell .* but has none for \['COIL-100', 'Semi-supervised'\]"):
        table.only(["COIL-100", "Semi-supervised"])


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'puvae/3'"):
        table("puvae/33")


WRONG = [
    ("values", "X | 1 2", "a label of classifier must be one of A"),
    ("values", "A | 1", "a row must have 1 labels and 2 values"),
    ("values", "A | 1 many", "ConversionSyntax"),
    ("defaults", {"task": "mnist/Z"}, "mnist/A"),
    ("defaults", {"task": "mnist/A", "attack": "fgsn"}, "did you mean 'fgsm'"),
    ("defaults", {"task": "mnist/A", "attack": "fgsm", "knowledge": "white"}, "the threat model must be one of"),
    (
        "defaults",
        {"task": "mnist/A", "attack": "fgsm", "knowledge": "white-box", "gradient": "x"},
        "a gradient must be",
    ),
    ("defaults", {"task": "mnist/A", "measure": "speed"}, "a measure must be one of"),
    ("defaults", {"task": "mnist/A", "defence": "puvae"}, "defence"),
    ("defaults", {"task": "mnist/A", "defense": "puvaf"}, "puvae"),
    ("defaults", {"task": "mnist/A", "defense": "puvae", "knobs": {"lambda": 1}}, "a knob must be one of"),
    ("defaults", {"task": "mnist/A", "defense": "puvae", "knobs": {"sigma_eps": -1}}, "sigma_eps"),
    ("notes", {"A | z": "of no cell"}, "a note must stand for a cell"),
]


@pytest.mark.parametrize(("part", "value", "law"), WRONG)
def test_what_stands_for_nothing_is_refused_with_the_tables_name(part: str, value: object, law: str) -> None:
    whole = {
        "name": "p/1",
        "title": "t",
        "source": "Table 1",
        "lines": [1, 1],
        "defaults": {"task": "mnist/A"},
        "labels": {"classifier": {"A": {}}, "attack": {"x": {}, "y": {}}},
        "values": "A | 1 2",
    }
    paper = {"p": {"citation": "c", "file": "p.txt"}}
    assert len(list(read(yaml.safe_dump({"papers": paper, "tables": [whole]}, sort_keys=False)))) == 1
    with pytest.raises(InputError, match=f"table p/1: .*{law}"):
        list(read(yaml.safe_dump({"papers": paper, "tables": [{**whole, part: value}]}, sort_keys=False)))


def test_every_file_of_the_folder_is_read() -> None:
    assert {path.stem for path in paper_tables.FOLDER.iterdir()} == {"puvae", "defense-vae", "advae", "gmvae"}
