"""The report: what it says, what it escapes, what it weighs."""

from __future__ import annotations

import math
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from attacks.confidence import wilson
from search.formatting import brief, duration, spoken_eps, spoken_value
from search.report.page import interval, render, write
from search.report.rank_correlation import RankCorrelation, ranks
from search.study.candidate import Latency
from search.study.study import Study
from spaces.domain import Scalar
from tests.support.page import Page
from tests.support.summaries import (
    CASES,
    findings_of,
    none_feasible,
    nothing_yet,
    one_candidate,
    rejecting,
    several_devices,
    study_of,
)


@pytest.mark.parametrize(
    ("fraction", "n", "low", "high"),
    [(0.8, 10, 0.4902, 0.9433), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.5, 1000, 0.4691, 0.5309)],
)
def test_the_wilson_interval_is_the_known_one(fraction: float, n: int, low: float, high: float) -> None:
    assert wilson(fraction, n) == pytest.approx((low, high), abs=1e-4)


def test_no_image_tells_nothing() -> None:
    assert wilson(0.0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("eps", "words"), [(0.3, "0.3"), (8 / 255, "8/255"), (0.03, "0.03"), (0.0, "0")])
def test_eps_is_written_as_in_papers(eps: float, words: str) -> None:
    assert spoken_eps(eps) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "–"), (True, "True"), (16, "16"), (1000.0, "1000"), (0.12345, "0.123"), (1e-5, "1e-05")]
    + [(0.9995, "0.9995"), (1.0, "1"), (2.00001, "2.00001"), (0.999, "0.999"), (1e6, "1e+06")],
)
def test_a_knob_is_written_short(value: Scalar | None, words: str) -> None:
    assert spoken_value(value) == words
    assert not isinstance(value, float) or brief(value).replace("1e+03", "1000") == words  # in a terminal


@pytest.mark.parametrize(("seconds", "words"), [(None, "–"), (4.2, "4 s"), (600, "10 min"), (5400, "1 h 30 min")])
def test_a_duration_is_short(seconds: float | None, words: str) -> None:
    assert duration(seconds).replace("\u00a0", " ") == words


def test_the_headline_names_best_undefended_threat_and_caveat() -> None:
    summary = findings_of()
    words = Page(render(summary)).words
    assert summary.best is not None
    low, high = interval(summary.best.score)
    assert f"{100 * summary.best.score.attacked_accuracy:.1f} % of the attacked images" in words
    assert f"{100 * low:.1f} to {100 * high:.1f}" in words
    assert "the undefended classifier 0.4 %" in words
    assert "knows the classifier and the defense in full" in words
    assert "white-box, Linf eps 0.3" in words
    assert "A run of 5,000 training images and 1,000 attacked validation images shows the way" in words


def test_a_full_run_needs_no_caveat() -> None:
    assert "proves nothing" not in Page(render(replace(findings_of(), study=study_of(train_images=None)))).words


def test_the_leaderboard_ends_with_the_undefended_classifier_and_says_what_breaks_a_constraint() -> None:
    words = Page(render(none_feasible())).words
    assert (
        "12 candidates, none of which meets all constraints: 12 of 12 fail the audit check gradients are masked"
        in words
    )
    assert "failed audit check: gradients are masked" in words
    assert words.index("failed audit check: gradients are masked") < words.index("undefended 0.4 %")


def test_candidates_that_break_a_constraint_come_last() -> None:
    summary = findings_of()
    broken = [bool(summary.broken(c)) for c in summary.ranked]
    assert any(broken) and broken == sorted(broken)


def test_an_oblivious_study_says_so_and_shows_the_white_box_number_beside() -> None:
    page = Page(render(findings_of(threat="oblivious")))
    assert "knows the classifier but not the defense" in page.words
    assert page.data["threat"].split() == ["oblivious,", "Linf", "eps", "0.3"]
    assert "White-box accuracy white-box, Linf eps 0.3: the attacker knows it 1.5" in page.words


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_a_page_whose_data_is_json(case: str) -> None:
    page = render(CASES[case]())
    assert "nan" not in Page(page).words.lower().split() and "None" not in Page(page).words.split()
    assert isinstance(Page(page).candidates, list)


def test_numbers_that_are_not_finite_leave_a_gap() -> None:
    summary = one_candidate()
    only = replace(summary.candidates[0], score=replace(summary.candidates[0].score, latency_ms_p50=math.nan))
    curve = replace(summary.trials[0], curve=[0.5, math.nan])
    page = Page(render(replace(summary, candidates=[only], front=[only], best=only, trials=[curve])))
    assert page.candidates[0]["ms"] is None
    assert page.data["curves"][0]["y"] == [50.0, None]


def test_markup_in_names_and_reasons_is_escaped() -> None:
    study = study_of().model_copy(update={"name": "<img src=x onerror=alert(1)>"})
    text = render(replace(findings_of(), study=study))
    assert "<script>alert" not in text and "<img src=x" not in text
    assert "&lt;script&gt;alert(&#39;no&#39;)&lt;/script&gt;" in text
    assert "<script>alert('no')</script>" in Page(text).words


def test_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    text = render(findings_of(pictures=tmp_path))
    links = [v or "" for _, attrs in Page(text).tags for k, v in attrs.items() if k in ("src", "href", "action")]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert text.count("* plotly.js v") == 1
    assert "default-src 'none'" in text


def test_pictures_are_embedded_the_best_first_and_missing_ones_left_out(tmp_path: Path) -> None:
    summary = findings_of(pictures=tmp_path)
    best = summary.fit(summary.ranked[0])
    assert best is not None
    shown = [attrs["alt"] for tag, attrs in Page(render(summary)).tags if tag == "img"]
    assert len(shown) == 6 and shown[0] == f"Clean, attacked and purified images of training {best.trial}"
    for file in tmp_path.glob("*.png"):
        file.unlink()
    assert all(tag != "img" for tag, _ in Page(render(summary)).tags)


def test_what_is_rejected_is_reported_apart() -> None:
    page = Page(render(rejecting()))
    broken = {str(c["note"]).replace("\u00a0", " ") for c in page.candidates if c["against"]}
    assert any("more than 5.0 % of the clean images rejected" in words for words in broken)
    assert "Error accepted, wrong Rejected attacked Rejected clean" in page.words
    assert "Error accepted, wrong" not in Page(render(findings_of())).words
    assert "Attacked images accepted and wrong" in page.words and "Attacked images rejected" in page.words
    best = page.data["risk"][0]
    assert best["points"] == [[0, 60], [1, 40], [4, 10], [20, 2]] and best["picked"][0] <= page.data["rejection"] == 5
    assert len(page.data["risk"]) == 4 and "swept over every image of the best 4 trainings" in page.words
    assert Page(render(findings_of())).data["risk"] == []


def test_the_front_is_a_table_with_both_measurements_and_what_to_think_of_them() -> None:
    summary = findings_of()
    quiet, loud, away = summary.candidates[:3]
    first = quiet.score.latency_ms_p50
    again = {
        quiet.candidate: Latency(1.05 * first, 9.0, 1.0, 0.0, "", 30),
        loud.candidate: Latency(1.3 * loud.score.latency_ms_p50, 9.0, 1.0, 0.0, "", 30),
        away.candidate: Latency(1.0, 9.0, 1.0, 0.0, "Tesla T4", 30),
    }
    words = Page(render(replace(summary, front=[quiet, loud, away], again=again))).words
    place = words.index("On the front Attacked error")
    assert f"{1.05 * first:.3g} ms" in words[place:] and "30 % slower when re-measured" in words[place:]
    assert "on another device: Tesla T4" in words[place:] and words.count("when re-measured") == 1


def test_devices_stand_at_latencies_where_there_are_several_and_each_has_a_front() -> None:
    summary = several_devices()
    page = Page(render(summary))
    assert "measured on 2 kinds of device and compare only within one" in page.words
    assert page.data["devices"] == ["NVIDIA H200", "Tesla T4"]
    assert {c["device"] for c in page.candidates if c["front"]} == {0, 1}
    assert "kinds of device" not in Page(render(findings_of())).words


def test_constraints_are_counted() -> None:
    words = Page(render(none_feasible())).words
    assert (
        "0 of 12 candidates meet all" in words
        and "quick audit checks passed 0 12 12 audit check gradients are masked passed 0 12 12" in words
    )
    assert "clean accuracy of at least 90.0 %" in words and "purification latency of at most 12 ms" in words


def test_how_cheap_and_final_scores_agree_is_said_with_its_limits() -> None:
    study, dice = study_of(), random.Random(0)
    finals = [dice.random() for _ in range(12)]
    curves = [{1: dice.random(), 3: final, 9: final} for final in finals]
    found = RankCorrelation(study, True, [("t", c[9], c[9]) for c in curves], ranks(curves, finals, [1, 3]))
    words = Page(render(replace(findings_of(), rank_correlation=found))).words
    assert "How well these rank the 12 finished trainings that were scored, at the usual inference setting" in words
    assert "this is said of the survivors alone" in words and re.search(r"try a later --grace than \d", words)
    assert "epoch 3 12 1.00 – 1.00" in words and "the last epoch 12 1.00 – 1.00" in words
    assert "No training is finished yet" in Page(render(nothing_yet())).words


def test_the_study_can_be_read_back_from_the_page() -> None:
    config = re.search(r"<pre>(name: .*?)</pre>", render(findings_of()), re.DOTALL)
    assert config is not None
    assert Study(**yaml.safe_load(config[1])) == study_of()


def test_writing_leaves_only_the_page(tmp_path: Path) -> None:
    path = write(nothing_yet(), tmp_path / "report.html")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_five_thousand_candidates_make_a_page_of_seven_megabytes_in_ten_seconds(tmp_path: Path) -> None:
    summary = findings_of(834, pictures=tmp_path)
    start = time.monotonic()
    path = write(summary, tmp_path / "report.html")
    assert time.monotonic() - start < 10
    assert len(summary.candidates) > 5000 and path.stat().st_size < 7_000_000
