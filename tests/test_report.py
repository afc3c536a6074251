"""The report: what it says, what it escapes, what it weighs, and how a real browser takes it."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import subprocess
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from attacks.interval import wilson
from attacks.threat import Knowledge, ThreatModel
from search import ranking
from search.agreement import Agreement, ranks
from search.findings import Findings, TrialRecord
from search.importance import Importances
from search.latency import Latency
from search.report import interval, render, write
from search.score import Candidate, Score
from search.study import Study
from search.wording import duration, spoken_eps, spoken_value
from spaces.space import Params, Scalar

SEARCHED = ("lambda_rc", "lambda_kl", "lambda_ce", "conv_maps", "sigma_eps")
SIGMAS = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)
LATENCY_MS = {8: 3.42, 16: 9.87}
IMAGES = 1000

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --v=0"
).split()


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


def findings_of(fits: int = 10, pictures: Path | None = None, threat: Knowledge = "white-box") -> Findings:
    candidates = candidates_of(fits, threat)
    study = study_of(threat)
    feasible = [c for c in candidates if c.score.clean_accuracy >= (study.min_clean_accuracy or 0)]
    best = max(feasible, key=lambda c: c.score.attacked_accuracy)
    shares = dict(zip(SEARCHED, (0.31, 0.17, 0.04, 0.09, 0.39), strict=True))
    found = Importances(shares, dict(zip(SEARCHED, reversed(shares.values()), strict=True)), len(candidates))
    trials = trials_of(candidates, pictures)
    cheap = [t.curve[-1] for t in trials if t.state == "finished"]
    finals = [1 - c.score.attacked_error for c in candidates if c.candidate.endswith("-0000")]
    points = [(t.trial, score, final) for t, score, final in zip(trials, cheap, finals, strict=False)]
    agreed = Agreement(study, True, points, ranks([{1: score} for score in cheap], finals, []))
    return Findings(
        study=study,
        undefended=undefended_of(threat),
        candidates=candidates,
        best=best,
        front=front_of(feasible),
        searched=SEARCHED,
        importances=found,
        trials=trials,
        device="2 CPU cores",
        agreement=agreed,
        refinements=[TrialRecord("r001", "finished", Params({}, {}), [], "", None, 3.5)],
        busy=812.0,
    )


def nothing_yet() -> Findings:
    return Findings(study_of(train_images=None), None, [], None, [], SEARCHED, Importances(), [])


def one_candidate() -> Findings:
    only = candidates_of(1)[:1]
    return Findings(study_of(), undefended_of(), only, only[0], only, SEARCHED, Importances(), trials_of(only)[:1])


def none_feasible() -> Findings:
    alarmed = [replace(c, score=replace(c.score, alarms=("gradients are masked",))) for c in candidates_of(2)]
    return replace(findings_of(2), candidates=alarmed, best=None, front=[])


def rejecting() -> Findings:
    """A defense that rejects: half of the attacked images, and of the clean ones more than is allowed by some."""
    findings = findings_of(4)
    curve = ((0.0, 0.6), (0.01, 0.4), (0.04, 0.1), (0.2, 0.02))
    made = []
    for nth, c in enumerate(findings.candidates):
        error = round(0.5 * c.score.attacked_error, 3)
        score = replace(c.score, attacked_error=error, attacked_rejection=error, clean_rejection=0.03 * (nth % 4))
        made.append(replace(c, score=replace(score, risk_coverage=curve if nth % 6 == 0 else ())))
    return replace(findings, candidates=made, best=made[0], front=[made[0]])


def several_devices() -> Findings:
    """Every other fit timed on another kind of GPU."""
    findings = findings_of(6)
    kinds = {fit: ("NVIDIA H200", "Tesla T4")[nth % 2] for nth, fit in enumerate({c.fit for c in findings.candidates})}
    made = [replace(c, score=replace(c.score, device=kinds[c.fit])) for c in findings.candidates]
    within = ranking.feasible(findings.study, made)
    return replace(findings, candidates=made, best=within[0], front=ranking.front(findings.study, made))


CASES = {
    "several devices": several_devices,
    "rejecting": rejecting,
    "ten fits": lambda: findings_of(),
    "oblivious": lambda: findings_of(threat="oblivious"),
    "nothing yet": nothing_yet,
    "one candidate": one_candidate,
    "none feasible": none_feasible,
}


class Page(HTMLParser):
    """What an HTML parser makes of the page: its tags, its words, the data of its charts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.json, self.inside = "", "", ""
        self.feed(text)
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("type") or tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "application/json":
            self.json += data
        elif self.inside not in ("script", "style"):
            self.words += " " + data

    @property
    def data(self) -> Any:
        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        return json.loads(self.json, parse_constant=refuse)


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
    ("value", "words"), [(None, "–"), (True, "True"), (16, "16"), (1000.0, "1000"), (0.12345, "0.123"), (1e-5, "1e-05")]
)
def test_a_knob_is_written_short(value: Scalar | None, words: str) -> None:
    assert spoken_value(value) == words


@pytest.mark.parametrize(("seconds", "words"), [(None, "–"), (4.2, "4 s"), (600, "10 min"), (5400, "1 h 30 min")])
def test_a_duration_is_short(seconds: float | None, words: str) -> None:
    assert duration(seconds).replace("\u00a0", " ") == words


def test_the_headline_names_best_undefended_threat_and_caveat() -> None:
    findings = findings_of()
    words = Page(render(findings)).words
    assert findings.best is not None
    low, high = interval(findings.best.score)
    assert f"{100 * findings.best.score.attacked_accuracy:.1f} % of the attacked images" in words
    assert f"{100 * low:.1f} to {100 * high:.1f}" in words
    assert "the undefended classifier 0.4 %" in words
    assert "knows the classifier and the defense in full" in words
    assert "white-box, L∞ eps 0.3" in words
    assert "A run of 5,000 training images and 1,000 attacked validation images shows the way" in words


def test_a_full_run_needs_no_caveat() -> None:
    assert "proves nothing" not in Page(render(replace(findings_of(), study=study_of(train_images=None)))).words


def test_the_leaderboard_ends_with_the_undefended_classifier_and_says_what_breaks_a_constraint() -> None:
    words = Page(render(none_feasible())).words
    assert "12 candidates, none of which keeps to the constraints" in words
    assert "alarm: gradients are masked" in words
    assert words.index("alarm: gradients are masked") < words.index("undefended 0.4 %")


def test_candidates_that_break_a_constraint_come_last() -> None:
    findings = findings_of()
    broken = [bool(findings.broken(c)) for c in findings.ranked]
    assert any(broken) and broken == sorted(broken)


def test_an_oblivious_study_says_so_and_shows_the_white_box_number_beside() -> None:
    page = Page(render(findings_of(threat="oblivious")))
    assert "knows the classifier but not the defense" in page.words
    assert page.data["threat"].split() == ["oblivious,", "L∞", "eps", "0.3"]
    assert "White-box accuracy white-box, L∞ eps 0.3 1.5" in page.words


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_a_page_whose_data_is_json(case: str) -> None:
    page = render(CASES[case]())
    assert "nan" not in Page(page).words.lower().split() and "None" not in Page(page).words.split()
    assert isinstance(Page(page).data["candidates"], list)


def test_numbers_that_are_not_finite_leave_a_gap() -> None:
    findings = one_candidate()
    only = replace(findings.candidates[0], score=replace(findings.candidates[0].score, latency_ms_p50=math.nan))
    curve = replace(findings.trials[0], curve=[0.5, math.nan])
    page = Page(render(replace(findings, candidates=[only], front=[only], best=only, trials=[curve])))
    assert page.data["candidates"][0]["ms"] is None
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
    findings = findings_of(pictures=tmp_path)
    best = findings.fit(findings.ranked[0])
    assert best is not None
    shown = [attrs["alt"] for tag, attrs in Page(render(findings)).tags if tag == "img"]
    assert len(shown) == 6 and shown[0] == f"Clean, attacked and purified images of trial {best.trial}"
    for file in tmp_path.glob("*.png"):
        file.unlink()
    assert all(tag != "img" for tag, _ in Page(render(findings)).tags)


def test_what_is_rejected_is_reported_apart() -> None:
    page = Page(render(rejecting()))
    broken = {str(c["broken"]).replace("\u00a0", " ") for c in page.data["candidates"] if c["broken"]}
    assert any("more than 5.0 % of the clean images rejected" in words for words in broken)
    assert "Error accepted, wrong Rejected attacked Rejected clean" in page.words
    assert "Error accepted, wrong" not in Page(render(findings_of())).words
    assert "Attacked images accepted and wrong" in page.words and "Attacked images rejected" in page.words
    best = page.data["risk"][0]
    assert best["points"] == [[0, 60], [1, 40], [4, 10], [20, 2]] and best["picked"][0] <= page.data["rejection"] == 5
    assert len(page.data["risk"]) == 4 and "swept over every image of the best 4 fits" in page.words
    assert Page(render(findings_of())).data["risk"] == []


def test_the_front_is_a_table_with_both_measurements_and_what_to_think_of_them() -> None:
    findings = findings_of()
    quiet, loud, away = findings.candidates[:3]
    first = quiet.score.latency_ms_p50
    again = {
        quiet.candidate: Latency(1.05 * first, 9.0, 1.0, 0.0, "", 30),
        loud.candidate: Latency(1.3 * loud.score.latency_ms_p50, 9.0, 1.0, 0.0, "", 30),
        away.candidate: Latency(1.0, 9.0, 1.0, 0.0, "Tesla T4", 30),
    }
    words = Page(render(replace(findings, front=[quiet, loud, away], again=again))).words
    place = words.index("On the front Attacked error")
    assert f"{1.05 * first:.3g} ms" in words[place:] and "30 % slower the second time" in words[place:]
    assert "on another device: Tesla T4" in words[place:] and words.count("the second time") == 1


def test_devices_stand_at_latencies_where_there_are_several_and_each_has_a_front() -> None:
    findings = several_devices()
    page = Page(render(findings))
    assert "measured on 2 kinds of device and compare only within one" in page.words
    assert page.data["devices"] == ["NVIDIA H200", "Tesla T4"]
    assert {c["device"] for c in page.data["candidates"] if c["front"]} == {0, 1}
    assert "kinds of device" not in Page(render(findings_of())).words


def test_constraints_are_counted() -> None:
    words = Page(render(none_feasible())).words
    assert "0 of 12 candidates keep to all" in words and "no alarm 0 " in words
    assert "clean accuracy of at least 90.0 %" in words and "purification latency of at most 12 ms" in words


def test_how_cheap_and_final_scores_agree_is_said_with_its_limits() -> None:
    study, dice = study_of(), random.Random(0)
    finals = [dice.random() for _ in range(12)]
    curves = [{1: dice.random(), 3: final, 9: final} for final in finals]
    found = Agreement(study, True, [("t", c[9], c[9]) for c in curves], ranks(curves, finals, [1, 3]))
    words = Page(render(replace(findings_of(), agreement=found))).words
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
    findings = findings_of(834, pictures=tmp_path)
    start = time.monotonic()
    path = write(findings, tmp_path / "report.html")
    assert time.monotonic() - start < 10
    assert len(findings.candidates) > 5000 and path.stat().st_size < 7_000_000


PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const charts = [...document.querySelectorAll(".chart")], root = document.documentElement;
  parent.postMessage(JSON.stringify({
    charts: charts.map(chart => chart.id).filter(id => document.querySelector(`#${id} .trace`)),
    places: charts.map(chart => chart.id), inner: innerWidth, wide: root.scrollWidth,
    ink: getComputedStyle(document.body).color, tick: charts.length &&
      getComputedStyle(document.querySelector("#pareto .ytick text")).fill}), "*");
}, 300));</script>"""

FRAME = """<!doctype html><iframe src="probed.html" style="width: {width}px; height: 3000px; border: 0"></iframe>
<script>addEventListener("message", message => {{ document.documentElement.dataset.seen = message.data; }});</script>"""
"""A headless window is never narrower than 500 px; a frame is."""


def browse(findings: Findings, folder: Path, width: int, *flags: str) -> tuple[dict[str, Any], list[str]]:
    """Open the page in a headless browser; return what the probe saw and what the console says."""
    (folder / "probed.html").write_text(render(findings) + PROBE, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=1600,1000", "--virtual-time-budget=5000", "--dump-dom"]
    page = (folder / "frame.html").as_uri()
    ran = subprocess.run([*command, page], capture_output=True, text=True, timeout=120)
    seen = dict(Page(ran.stdout).tags[0][1])["data-seen"]
    return json.loads(seen or ""), [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed: apt-get install chromium")


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_draws_every_chart_within_the_page_without_a_word(case: str, width: int, tmp_path: Path) -> None:
    seen, console = browse(CASES[case](), tmp_path, width)
    assert console == []
    assert seen["inner"] == width and seen["wide"] <= width
    assert seen["charts"] == seen["places"]
    assert len(seen["charts"]) == {"nothing yet": 0, "one candidate": 3, "rejecting": 12}.get(case, 11)


@pytest.mark.slow
@in_a_browser
def test_the_charts_follow_the_colour_scheme(tmp_path: Path) -> None:
    light, _ = browse(findings_of(), tmp_path, 1400, "--blink-settings=preferredColorScheme=1")
    dark, _ = browse(findings_of(), tmp_path, 1400, "--blink-settings=preferredColorScheme=0")
    assert light["ink"] == light["tick"] != dark["ink"] == dark["tick"]
