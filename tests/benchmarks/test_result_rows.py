"""The tables of docs/results.md that are made of committed rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.result_rows import collect, table
from search import session
from search.optimizer.history import SearchHistory
from search.reproduce.reproduction import reproduce
from tests.conftest import digits_study
from tests.support.paths import ROOT


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "results").glob("*.json")), ids=lambda file: file.stem)
def test_a_table_of_the_page_is_that_of_its_rows(file: Path) -> None:
    assert "\n".join(table(json.loads(file.read_bytes()))) in (ROOT / "docs" / "results.md").read_text("utf-8")


def test_a_small_table_of_the_page_comes_out_again_within_its_intervals(tmp_path: Path) -> None:
    kept = json.loads((ROOT / "docs" / "results" / "puvae-3-small.json").read_bytes())
    only = ["A", *kept["labels"]["defense"]]
    found = reproduce(
        kept["name"], fraction=kept["fraction"], only=only, storage=str(tmp_path), console=Console(quiet=True)
    )
    assert len(found["cells"]) == len(kept["cells"]) == 12
    for row, committed in zip(found["cells"], kept["cells"], strict=True):
        (low, high), (lowest, highest) = row["interval"] or (1, 0), committed["interval"]
        assert row["setting"] == committed["setting"] and low <= highest and lowest <= high, row["labels"]


def test_rows_are_those_of_the_searches(tmp_path: Path) -> None:
    fields = {"refine": 0, "threat": "oblivious", "scoring": "all"}
    study = digits_study(tmp_path, trials=1, knobs={"sigma_eps": (0.0, 1.0)}, **fields)
    means = digits_study(tmp_path, name="means", defense="class_mean", trials=1, **fields)
    for one in (study, means):
        assert session.begin(one, Console(quiet=True), debug=True) == 0
    found = json.loads(json.dumps(collect(study.storage, ["smoke", "means"])))
    assert [row["defense"] for row in found["rows"]] == ["none", "puvae", "puvae", "class_mean"]
    assert found["threat"] == "oblivious, Linf eps 0.3" and found["task"] == "digits/A"
    best = SearchHistory(study).candidates()[0]
    (row,) = [r for r in found["rows"][1:3] if r["sigma_eps"] == best.params.inference["sigma_eps"]]
    assert row["accuracy"] == {"clean": best.score.clean_accuracy, **best.score.attacks}
    assert row["nats"] == study.store.about("fits", best.fit)["curve"][-1]["kl"] / 2 and row["epochs"] == 2
    head, _, *lines = table(found)
    assert head.startswith("| defense | sigma_eps | KL, nats | clean | fgsm-targeted |")
    assert lines[0].startswith("| none | – | – | ") and lines[-1].startswith("| class_mean | – | – | ")
    other = digits_study(tmp_path, name="other", defense="class_mean", trials=1, eps=0.1)
    assert session.begin(other, Console(quiet=True), debug=True) == 0
    with pytest.raises(ValueError, match="must have one task, threat, suite and size"):
        collect(study.storage, ["smoke", "other"])
