"""The papers' numbers as they are printed, and bearing what the papers say of them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import pytest

from search.reproduce.paper_tables import OURS, Table, table, tables
from tests.support.paths import ROOT

PAPERS = Path(os.environ.get("CRUCIBLE_PAPERS", ROOT.parent / "shared" / "papers"))
EXCERPTS = Path(__file__).parent / "papers_excerpts.txt"
PICTURED = "defense-vae/pictures"
PICTURES = {"puvae/pictures", PICTURED, "gmvae/pictures", "puvae/6"}
DRAWN = PICTURES | {"puvae/fig7", "puvae/fig8", "puvae/fig9", "gmvae/fig3", "gmvae/fig5"}
"""Figures: pictures, of whose numbers the text has none or few."""
GMVAES = {"gmvae/rejected", "gmvae/eq10", "gmvae/recovered", "gmvae/fooling", "gmvae/fid"}
SAID = GMVAES | {"defense-vae/sec4.1"}
"""Results of a paper's text, which are no tables there."""
REWORDED = {"defense-vae/2", "defense-vae/4", "advae/1", "advae/4", "gmvae/1", "gmvae/2"}
"""Their columns have other heads than the papers', which the file had to tell apart."""
WRITTEN = [one.name for one in tables() if one.name not in DRAWN | SAID]


def at(name: str, *labels: str) -> float:
    cell = table(name).cell(*labels)
    assert cell is not None and cell.value is not None
    return cell.value


def percent(name: str, *labels: str) -> float:
    return round(100 * at(name, *labels), 4)


def numbers(text: str) -> list[str]:
    """Return the numbers of a text, without those of formulas, marks and the attacks' parameters."""
    text = re.sub(r"\$[^$]*\$|<[^>]*>|\((?:0\.\d+(?:, 0\.\d+)?|100)\)", " ", text)
    return re.findall(r"(?<![\w.-])\d+(?:\.\d+)?", text)


def within(few: list[str], all_of_them: list[str]) -> bool:
    return f" {' '.join(few)} " in f" {' '.join(all_of_them)} "


def flat(lists: Iterable[list[str]]) -> list[str]:
    return [number for numbers_of_one in lists for number in numbers_of_one]


def printed(one: Table) -> Iterator[list[str]]:
    """Yield the rows, as far as they have numbers."""
    for _, row in groupby(one.cells, lambda cell: cell.labels[:-1]):
        yield [cell.printed for cell in row if cell.value is not None]


def columns(one: Table) -> Iterator[list[str]]:
    """Yield the columns, block by block, as arXiv's text has them."""
    for _, block in groupby(one.cells, lambda cell: cell.labels[:-2]):
        cells = list(block)
        for label in dict.fromkeys(cell.labels[-1] for cell in cells):
            yield [cell.printed for cell in cells if cell.labels[-1] == label]


def text_of(one: Table) -> str:
    if not PAPERS.is_dir():
        pytest.skip(f"the papers' texts are not in {PAPERS} ($CRUCIBLE_PAPERS)")
    first, last = one.lines
    return "\n".join((PAPERS / one.file).read_text().splitlines()[first - 1 : last])


@pytest.mark.parametrize("name", WRITTEN)
def test_the_numbers_are_the_papers_in_its_order_and_none_is_left_out(name: str) -> None:
    one = table(name)
    lines = text_of(one).splitlines()
    said = [line for line in lines if line.startswith("Average")]
    assert [summary.printed for summary in one.summaries] == numbers("\n".join(said))
    there = numbers("\n".join(line for line in lines if line not in said))
    if any(cell.note for cell in one.cells):  # rows that ran into each other
        assert Counter(flat(printed(one))) == Counter(there)
    else:
        assert flat(columns(one) if one.file.startswith("puvae-arxiv") else printed(one)) == there


@pytest.mark.parametrize("name", [name for name in WRITTEN if name not in REWORDED])
def test_columns_and_rows_have_the_papers_heads_in_its_order(name: str) -> None:
    one, bare, place = table(name), re.compile(r"[^a-z/]"), 0
    text = bare.sub("", text_of(one).lower())
    rows = [labels[-1] for labels, _ in groupby(one.cells, lambda cell: cell.labels[:-1])]
    ours = {cell.labels[-1] for cell in one.cells if cell.printed == OURS}
    for label in (*(label for label in one.labels[one.dimensions[-1]] if label not in ours), *rows):
        found = text.find(bare.sub("", label.lower()), place)
        assert found >= place, label
        place = found + 1


def test_a_figure_has_the_numbers_that_the_text_says_of_it() -> None:
    one = table("gmvae/fig3")
    (most,) = one.summaries
    assert (most.kind, most.labels, most.value) == ("largest", {"model": "Supervised", "figure": "Error"}, 0.0389)
    assert f"a maximum value of only {most.printed}%" in text_of(one)


def test_the_strong_white_box_figure_is_attacked_as_section_v_c_says() -> None:
    one = table("puvae/fig8")
    text = text_of(one)
    assert "architecture A and B as the source and target classifier, respectively" in text
    assert "white-box FGSMs and strong white-box FGSMs" in text
    assert "slightly decreased, or even increased" in text and "slightly decreased, or even increased" in one.remark


def test_training_from_scratch_stands_beside_the_first_tables_end_to_end() -> None:
    one = table("defense-vae/sec4.1")
    for data in ("F-MNIST", "MNIST"):
        assert at(one.name, data, "Fine-tuned") == at("defense-vae/1", data, "FGSM", "A", "Defense-VAE-E2E")
    assert "almost equally effective" in text_of(one) and "slightly better results" in text_of(one)


@pytest.mark.parametrize("name", sorted(GMVAES | PICTURES | {"gmvae/fig5"}))
def test_what_a_remark_quotes_stands_in_the_papers_text(name: str) -> None:
    one = table(name)
    text = " ".join(text_of(one).split())
    quoted = re.findall(r'"([^"]{20,})"', one.remark)
    assert all(part.rstrip(",") in text for part in quoted), quoted
    assert bool(quoted) == (name in ("gmvae/fig5", "gmvae/eq10", "gmvae/recovered", "gmvae/fooling", PICTURED))


def test_the_numbers_of_gmvaes_text_are_there() -> None:
    assert "all the generated samples were rejected by the models after thresholding" in text_of(
        table("gmvae/rejected")
    )
    assert "the Momentum Iterative Method (2018) and Projected Gradient Descent" in text_of(table("gmvae/rejected"))
    said = [cell.printed for cell in table("gmvae/recovered").cells]
    assert said == ["1.81", f"{100 * 110 / 181:.2f}", "99.07"]
    assert at("gmvae/recovered", "Supervised", "Rejected") == at("gmvae/1", "MNIST", "Supervised", "Rejection")
    fid = {cell.labels[0]: cell.note for cell in table("gmvae/fid").cells}
    assert fid == {"Constant": "the paper has 50.4", "Variable": "the paper has 58.3"}
    assert "(50.4)" in text_of(table("gmvae/fid")) and "(58.3)" in text_of(table("gmvae/fid"))


def excerpts() -> list[tuple[str, int, str]]:
    """Return the quoted lines: file, number of the first, text."""
    quoted = re.split(r"^> (\S+):(\d+)\n", EXCERPTS.read_text(), flags=re.MULTILINE)[1:]
    return [(f, int(n), text.strip()) for f, n, text in zip(quoted[::3], quoted[1::3], quoted[2::3], strict=True)]


@pytest.mark.parametrize(("file", "line", "text"), excerpts(), ids=lambda part: str(part)[:30])
def test_the_data_agree_with_the_quoted_lines(file: str, line: int, text: str) -> None:
    written = [table(name) for name in WRITTEN]
    (one,) = (one for one in written if one.file == file and one.lines[0] <= line <= one.lines[1])
    said = [[summary.printed for summary in one.summaries]]
    assert any(within(numbers(text), flat(lists)) for lists in (printed(one), said, columns(one)))


@pytest.mark.parametrize(("file", "line", "text"), excerpts(), ids=lambda part: str(part)[:30])
def test_a_quoted_line_is_the_papers(file: str, line: int, text: str) -> None:
    if not PAPERS.is_dir():
        pytest.skip(f"the papers' texts are not in {PAPERS} ($CRUCIBLE_PAPERS)")
    assert "\n".join((PAPERS / file).read_text().splitlines()[line - 1 :]).strip().startswith(text)


# Bearing what the papers say of them.


@pytest.mark.parametrize("name", [one.name for one in tables() if any(s.kind == "average" for s in one.summaries)])
def test_a_papers_average_is_its_cells_or_says_that_it_is_not(name: str) -> None:
    one = table(name)
    for summary in (summary for summary in one.summaries if summary.kind == "average"):
        values = [cell.value or 0.0 for cell in one.of(summary.labels)]
        mean = sum(values) / len(values)
        assert (abs(mean - summary.value) <= 5.1e-5) != bool(summary.note), summary
        if summary.note:
            assert f"{100 * mean:.2f}" in summary.note


def test_both_versions_of_puvae_have_the_same_numbers() -> None:
    for early, late in (("2", "3"), ("3", "4"), ("4", "5"), ("5", "7"), ("6", "8")):
        other = table(f"puvae-arxiv/{early}")
        for cell in table(f"puvae/{late}").cells:
            twin = other.cell(*cell.labels)
            assert cell.labels[-1] == "MagNet" and late == "7" or cell.printed == OURS or twin is not None
            if twin is not None and cell.value is not None:
                assert (twin.value, twin.setting) == (cell.value, cell.setting)


def test_puvae_is_nearly_130_times_as_fast_as_defense_gan() -> None:
    times = {name: at("puvae/7", "Time (seconds)", name) for name in ("MagNet", "Defense-GAN", "PuVAE")}
    assert round(times["Defense-GAN"] / 0.114) == 130
    for name, seconds in times.items():
        assert at("puvae/7", "Ratio", name) == round(seconds / times["PuVAE"], 2)


@pytest.mark.parametrize("attack", ["FGSM (0.3)", "iFGSM (0.3)", "CW (100)"])
@pytest.mark.parametrize("letter", ["A", "B"])
def test_puvae_exceeds_magnet_on_mnist_and_all_on_fashion_mnist_but_under_fgsm(letter: str, attack: str) -> None:
    assert at("puvae/3", letter, attack, "PuVAE") > at("puvae/3", letter, attack, "MagNet")
    row = table("puvae/4").of({"classifier": letter, "attack": attack})
    rivals = [cell.value or 0.0 for cell in row if cell.labels[-1] not in ("No Attack", "PuVAE")]
    assert (at("puvae/4", letter, attack, "PuVAE") > max(rivals)) == (attack != "FGSM (0.3)" or letter == "A")


def test_within_one_second_puvae_has_the_accuracies_of_table_3() -> None:
    for short, long in (("FGSM", "FGSM (0.3)"), ("iFGSM", "iFGSM (0.3)"), ("CW", "CW (100)")):
        assert at("puvae/8", "PuVAE", short) == at("puvae/3", "A", long, "PuVAE")


def test_defense_vae_is_about_50_times_as_fast_and_30_points_better_black_box() -> None:
    seconds = [at("defense-vae/4", label, "Run Time (s)") for label in table("defense-vae/4").labels["defense"]]
    assert 45 < seconds[1] / seconds[0] < 55
    mean = {s.labels["defense"]: s.value for s in table("defense-vae/3").summaries if s.labels["data"] == "F-MNIST"}
    assert 0.27 < mean["Defense-VAE"] - mean["Defense-GAN"] < 0.32


def test_the_second_table_of_defense_vae_is_of_the_retrained_variant() -> None:
    for cell in table("defense-vae/2").of({"training": "all 3"}):
        assert cell.value == at("defense-vae/1", "F-MNIST", *cell.labels[:2], "Defense-VAE-REC")
        assert cell.setting.knobs["variant"] == "rec"


def test_transferring_advae_to_convolutional_classifiers_costs_at_most_11_points() -> None:
    drops = [
        percent("advae/3", attack, "X/X") - percent("advae/3", attack, f"X/{to}")
        for attack in table("advae/3").labels["attack"]
        for to in "ABC"
    ]
    assert max(drops) == pytest.approx(11.0)


def test_training_advae_on_three_classifiers_helps_in_all_cases() -> None:
    for attack in table("advae/3").labels["attack"]:
        assert at("advae/3", attack, "X/X") == at("advae/1", attack, "AdvAE (white-box)")
        assert all(at("advae/3", attack, f"{{XAB}}/{to}") > at("advae/3", attack, f"X/{to}") for to in "ABCD")


def test_the_shares_of_gmvae_add_up_and_its_recovered_images_make_99_07() -> None:
    for cell in table("gmvae/1").of({"figure": "Error"}):
        head = cell.labels[:2]
        assert sum(percent("gmvae/1", *head, share) for share in ("Accuracy", "Error", "Rejection")) == pytest.approx(
            100
        )
    rejected = round(10_000 * at("gmvae/1", "MNIST", "Supervised", "Rejection"))
    assert rejected == 181
    assert at("gmvae/1", "MNIST", "Supervised", "Accuracy") + 110 / 10_000 == pytest.approx(0.9907)
