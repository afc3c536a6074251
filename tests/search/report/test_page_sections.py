"""The report's sections on knobs, latencies, faults, cost and how to reproduce; and that all words can be read."""

from __future__ import annotations

import base64
import itertools
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from search.formatting import spoken_device
from search.report.charts import charts
from search.report.cost import cost
from search.report.page import render
from search.storage.seal import FILES, SEAL, seal
from search.study.columns import COLUMNS, FURTHER
from search.study.study import Study
from search.study.winner import audits, winner
from tests.support.page import Page
from tests.support.summaries import audited, findings_of, nothing_yet, several_devices


def test_the_cost_names_what_was_spent_and_what_was_saved() -> None:
    summary = findings_of()
    found = cost(summary)
    assert found.fits == 10 and found.candidates == 60 and found.trainings_saved == 50
    assert (found.epochs_asked, found.epochs_saved) == (40, 34)  # of 20 epochs, stopped after 2 and after 4
    assert found.seconds_saved == pytest.approx(31 * 9 + 31 * 4)
    words = Page(render(summary)).words
    assert "50 trainings saved: 60 candidates came of 10 trainings" in words
    assert "34 of 40 epochs saved by stopping 2 trainings early: 7 min at the pace of each" in words
    assert "refinements, which train nothing 1 – 4" in words and "14 min in which at least one training ran" in words
    assert "CPU-seconds" in words and "GPU-seconds" not in words


def test_settings_that_lost_a_race_are_counted() -> None:
    summary = findings_of()
    assert "dropped" not in Page(render(summary)).words
    raced = replace(summary, trials=[replace(summary.trials[0], dropped=3), *summary.trials[1:]])
    assert "3 inference settings dropped after a part of the images" in Page(render(raced)).words


def test_gpu_seconds_are_the_share_that_a_trial_held() -> None:
    page = Page(render(several_devices()))
    assert cost(several_devices()).gpus == 0.25 and "and 0.25 of a GPU" in page.words and "GPU-seconds" in page.words


def test_faults_and_alarms_are_gathered_by_what_happened() -> None:
    summary = findings_of(2)
    alarmed = [replace(c, score=replace(c.score, alarms=("completeness",))) for c in summary.candidates[:6]]
    again = replace(summary.trials[0], restarts=2)
    worse = replace(summary, candidates=[*alarmed, *summary.candidates[6:]], trials=[again, *summary.trials[1:]])
    words = Page(render(worse)).words
    assert "failed check : completeness 6 " in words and "and others" in words
    assert "failed : FitError: the loss is not finite" in words and "restarted : its worker had died 1 t000" in words
    fine = replace(summary, trials=[trial for trial in summary.trials if trial.state == "finished"])
    assert "No training failed, no worker died, and no candidate failed an audit check" in Page(render(fine)).words


def test_how_to_reproduce_names_commands_versions_data_and_licence() -> None:
    summary = findings_of()
    page = Page(render(summary))
    assert summary.best is not None
    assert "python launch.py search --config study.yaml --storage again" in page.words
    assert f"--knob lambda_rc={summary.best.params.train['lambda_rc']}" in page.words
    assert re.search(r"Crucible (commit \w{40}.*; )?SHA-256 of its sources \w{64}", page.words)
    assert "CC BY-SA 3.0" in page.words and re.search(r"torch \d+\.\d+", page.words)
    links = [attrs["href"] or "" for tag, attrs in page.tags if tag == "a" and attrs.get("download") == "study.yaml"]
    assert [Study(**yaml.safe_load(base64.b64decode(link.partition(",")[2]))) for link in links] == [summary.study]


def test_knobs_are_shown_beside_chance_and_against_attacked_accuracy() -> None:
    page = Page(render(findings_of()))
    assert page.data["chance"] == "(chance)" and page.data["importances"][-1][0] == "sigma_eps"
    assert (
        "in reaching the best tenth , by PED-ANOVA" in page.words
        and "(chance) is a knob of random values" in page.words
    )
    assert sum(attrs.get("id", "") in [f"slice{i}" for i in range(5)] for _, attrs in page.tags) == 5


def test_it_is_said_what_a_latency_is_and_on_which_images_it_was_timed() -> None:
    page = Page(render(findings_of()))
    assert page.words.count("the defended model's time minus the bare classifier's") == 2
    assert "p50, batch of 128, attacked images" in page.words and "ms attacked images" in page.words
    assert {one["images"] for one in page.data["latency"]} == {"attacked"}
    assert {one["images"] for one in page.candidates} == {"attacked"}


def test_latencies_stand_once_a_setting_and_device() -> None:
    summary = findings_of()
    quick = [replace(c, score=replace(c.score, latency_ms_p50=3.0, latency_ms_p95=4.0)) for c in summary.candidates]
    lanes = Page(render(replace(summary, candidates=quick))).data["latency"]
    assert {(one["lane"], one["p50"], one["p95"]) for one in lanes} == {("conv_maps 8", 3, 4), ("conv_maps 16", 3, 4)}
    assert sum(one["candidates"] for one in lanes) == 60


def test_rungs_and_final_scores_are_marked_as_what_they_are() -> None:
    page = Page(render(findings_of()))
    assert (
        page.data["rungs"] and len(page.data["scatter"]) == 10 and sum(dot["best"] for dot in page.data["scatter"]) == 1
    )
    assert "it is not comparable with attacked accuracy. A cross marks where a training was stopped" in page.words


def luminance(colour: str) -> float:
    """Source: WCAG 2.2, relative luminance."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_words_stand_out_from_every_ground_in_both_schemes() -> None:
    schemes = re.findall(r"--paper: #.*?}", render(nothing_yet()), re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for ink, ground in itertools.product(("ink", "muted", "accent", "warm"), ("paper", "sheet", "wash")):
            dark, light = sorted((luminance(colours[ink]), luminance(colours[ground])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def test_ended_trainings_are_counted_as_status_counts_them() -> None:
    summary = findings_of()
    going = replace(summary, trials=[*summary.trials, replace(summary.trials[0], trial="t099", state="running")])
    assert f"{len(summary.trials)} of 40 trainings ended" in Page(render(going)).words


def test_a_range_has_a_scale_and_a_choice_has_none() -> None:
    assert Page(render(findings_of())).data["ranges"] == ["log", "log", "log", None, None]


def test_the_verdict_stands_beneath_the_headline_and_in_the_leaderboard() -> None:
    summary = findings_of()
    words = Page(render(summary)).words
    assert summary.best is not None
    assert summary.verdict.startswith("better than no defense: ") and "not yet audited" in summary.verdict
    assert (
        f"Verdict: {summary.verdict}." in words and f"Verdict on {summary.best.candidate}: {summary.verdict}" in words
    )
    assert "Verdict" not in Page(render(nothing_yet())).words


def test_after_an_audit_the_audited_figure_is_what_counts() -> None:
    summary = findings_of(threat="oblivious")
    assert summary.best is not None
    page = replace(summary, audits={summary.best.candidate: audited(summary.best)})
    words = Page(render(page)).words
    assert "The best of 60 candidates, audited, classifies 19.8 % of the attacked images right" in words
    assert (
        "Verdict: better only where the attacker does not know the defense: 19.8 % against 0.4 % undefended; where the "
        "attacker knows it, 0.0 % against 0.0 % (Linf eps 0.3); costs 9.1 points of clean accuracy; audited "
        f"(the search's lighter attacks had left {100 * summary.best.score.attacked_accuracy:.1f} %)." in words
    )
    assert (
        "White-box accuracy white-box, Linf eps 0.3: the attacker knows it 0.0 % 0.0 %" in words
        and "audited: 19.8 %" in words
    )


def test_a_candidate_that_the_audit_refused_is_no_winner() -> None:
    summary = findings_of()
    assert summary.best is not None
    first, second = summary.ranked[:2]
    refused = audited(first, alarms=["gradient: it does not hold that images have a usable gradient"], refused=True)
    assert winner(summary.ranked, {first.candidate: refused}) == second
    words = Page(render(replace(summary, best=second, audits={first.candidate: refused}))).words
    assert "refused by the audit" in words and "; the audit refused 1 candidate ranked above it." in words
    assert "gradient: it does not hold that images have a usable gradient" in words
    none = Page(render(replace(summary, best=None, audits={first.candidate: refused}))).words
    assert "No winner: all" in none and "failed the audit" in none
    strict = summary.study.model_copy(update={"min_clean_accuracy": 1.0})  # what --candidate exports may break it
    outside = replace(summary, study=strict, best=None, front=[], audits={first.candidate: refused})
    words = Page(render(outside)).words
    assert "No winner" not in words and "60 candidates, none of which meets all constraints: 60 of 60" in words


def test_each_figures_heading_says_what_it_means_on_hovering() -> None:
    page = Page(render(findings_of()))
    titles = [attrs["title"] for tag, attrs in page.tags if tag == "th" and "title" in attrs]
    shown = (
        "candidate",
        "attacked_accuracy",
        "oblivious_accuracy",
        "white_box_accuracy",
        "clean_accuracy",
        "latency_ms_p50",
    )
    assert {COLUMNS[name] for name in shown} | {FURTHER["quick_score"], FURTHER["remeasured"]} <= set(titles)


def test_a_front_of_one_candidate_trades_nothing() -> None:
    summary = findings_of()
    assert "more accuracy under attack costs more latency" in Page(render(summary)).words
    one = Page(render(replace(summary, front=summary.front[:1]))).words
    assert "costs more latency" not in one and "The front is one candidate" in one


def test_an_export_that_was_changed_or_is_of_another_search_is_left_out(tmp_path: Path) -> None:
    summary = findings_of()
    one, other, third = summary.candidates[:3]
    study = summary.study.model_copy(update={"storage": str(tmp_path)})
    for candidate, search in ((one, study.name), (other, study.name), (third, "another")):
        known = {"search": search, "candidate": candidate.candidate, "fit": candidate.fit, "alarms": ["noise"]}
        whose = {"threat": asdict(candidate.score.threat)}
        told = json.dumps(known | whose).encode()
        files = {name: told if name == "evidence.json" else b"" for name in FILES}
        folder = study.folder / "export" / candidate.candidate
        folder.mkdir(parents=True)
        for name, content in (files | {SEAL: seal(files)}).items():
            (folder / name).write_bytes(content)
    assert list(audits(study, summary.candidates)) == [one.candidate, other.candidate]
    (study.folder / "export" / other.candidate / "card.md").write_text("It withstands everything.")
    assert list(audits(study, summary.candidates)) == [one.candidate]
    (study.folder / "audits").mkdir()
    (study.folder / "audits" / f"{other.candidate}.json").write_bytes(told.replace(third.candidate.encode(), b""))
    assert list(audits(study, summary.candidates)) == [one.candidate]
    told = json.dumps(known | {"search": study.name, "candidate": other.candidate, "fit": other.fit} | whose).encode()
    (study.folder / "audits" / f"{other.candidate}.json").write_bytes(told)
    assert {name: each["refused"] for name, each in audits(study, summary.candidates).items()} == {
        one.candidate: True,  # exported despite its failed check
        other.candidate: True,
    }


def test_threads_are_in_the_right_number() -> None:
    assert spoken_device("EPYC, 1 thread(s)") == "EPYC, 1 thread"
    assert spoken_device("EPYC, 11 thread(s)") == "EPYC, 11 threads"


def test_a_page_of_very_many_candidates_holds_the_best_the_front_and_evenly_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summary = findings_of(20)
    monkeypatch.setattr("search.report.charts.MOST", 20)
    monkeypatch.setattr("search.report.charts.MOST_TRAININGS", 5)
    found = charts(summary)
    ranks, names = found["candidates"]["rank"], [c.candidate for c in summary.ranked]
    assert found["candidates"]["id"] == [names[rank - 1] for rank in ranks] and found["total"] == len(names) == 120
    assert ranks[:10] == list(range(1, 11)) and {c.candidate for c in summary.front} <= set(found["candidates"]["id"])
    assert max(ranks) > 105 and len(ranks) <= 20 + len(summary.front)
    assert 5 <= len(found["curves"]) <= 6 and any(curve["best"] for curve in found["curves"])
    assert f"This page holds {len(ranks)} of them: the best, the front" in Page(render(summary)).words
    assert "This page holds" not in Page(render(findings_of(2))).words
