"""The listing of the papers' tables, and what it says that they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from search.data import splits
from search.reproduce.cell_setting import Setting
from search.reproduce.listing import cost, rows
from search.reproduce.paper_tables import tables

PUVAE: dict[str, Any] = {"defense": "puvae", "attack": "fgsm-targeted", "eps": 0.3, "images": 1000}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    empty = tmp_path_factory.mktemp("no data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(empty))
        return {row["table"]: row for row in rows(empty)}


def test_a_listing_has_every_table_and_counts_what_can_be_run_here(listed: dict[str, dict[str, Any]]) -> None:
    assert list(listed) == [one.name for one in tables()]
    counts = ["cells", "runs", "trainings", "epochs", "attacked images"]
    assert list(listed["puvae/3"]) == ["table", "source", "title", "threat", *counts, "not run"]
    assert listed["puvae/3"]["cells"] == listed["puvae/3"]["runs"] == 42
    assert listed["defense-vae/7"]["runs"] == 54 and "celeba is not here" in listed["defense-vae/7"]["not run"]
    assert listed["gmvae/1"]["not run"] == "another paper's classifier"
    assert listed["gmvae/fid"]["runs"] == 0 and "Inception" in listed["gmvae/fid"]["not run"]


def test_a_listing_says_what_each_table_costs_that_trains_anything(listed: dict[str, dict[str, Any]]) -> None:
    for name, row in listed.items():
        timed = row["runs"] and all(cell.setting.measure in ("seconds", "ratio") for cell in table_cells(name))
        assert (row["trainings"] > 0) == (row["epochs"] > 0) == bool(row["runs"] and not timed), name
    # Two classifiers, and of each adversarial training and PuVAE; MagNet, Defense-GAN and the class means once.
    assert listed["puvae/3"]["trainings"] == 9
    assert listed["gmvae/eq10"]["attacked images"] == 18_000  # 9 targets each
    assert listed["gmvae/fooling"]["attacked images"] == 2000
    assert listed["gmvae/fooling"]["threat"] == "white-box"
    assert listed["gmvae/rejected"]["trainings"] == 6  # for each data a classifier and a GMVAE


def table_cells(name: str) -> Any:
    return next(one.cells for one in tables() if one.name == name)


def test_the_cost_counts_once_what_cells_share(tmp_path: Path) -> None:
    def of(*settings: Setting) -> tuple[int, ...]:
        return tuple(cost(settings, tmp_path).values())

    white = Setting(task="mnist/A", **PUVAE, knowledge="white-box")
    assert of(white) == (3, 10 + 10 + 20, 1000)  # A, its partner B, and PuVAE
    assert of(Setting(task="mnist/A", **PUVAE), white) == (3, 40, 2000)
    assert of(Setting(task="mnist/A", measure="clean")) == (1, 10, 0)
    bases = {"bases": "advae-X+advae-A+advae-B"}
    assert of(Setting(task="mnist/advae-X", defense="advae", knobs=bases, measure="clean")) == (4, 130, 0)
    free = splits.sizes("mnist", tmp_path).attackable("oblivious")
    assert of(Setting(task="mnist/A", attack="fgsm", eps=0.3)) == (1, 10, free)
    assert of(Setting(task="mnist/A", defense="puvae", measure="seconds")) == (0, 0, 0)
