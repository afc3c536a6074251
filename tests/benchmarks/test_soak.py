"""The soak's own bookkeeping: what it would notice, and how it measures growth. The soak itself runs for hours."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.simulated import EPOCHS, simulated
from benchmarks.soak import Process, Soak, execute, growth
from defenses.base import Metrics
from search.engine.worker import Report
from search.study.candidate import Candidate, Proposal
from spaces.space import Params

PARAMS = Params(
    {"lambda_rc": 1.0, "lambda_kl": 1.0, "lambda_ce": 1.0, "conv_maps": 4, "decoder_maps": 8, "dense": 128},
    {"sigma_eps": 0.0},
)


def trained(storage: Path, report: Callable[[str, int, Metrics], None] = lambda fit, epoch, metrics: None) -> Path:
    """Run one simulated trial of a search as its driver does, and return the search's candidates.csv."""
    study = simulated(storage, name="soak-000", trials=1)
    study.store.make()
    last = execute(study, Proposal("t001", PARAMS), Report(report), 0.0)
    study.folder.mkdir(parents=True, exist_ok=True)
    path, log = study.folder / "candidates.csv", study.folder.with_suffix(".log")
    with path.open("w", encoding="utf-8") as file:
        written = [Candidate.from_json(data).row() for data in last["candidates"]]
        table = csv.DictWriter(file, written[0])
        table.writeheader()
        table.writerows(written)
    log.write_text("".join(f"t001 epoch {epoch}\n" for epoch in range(1, EPOCHS + 1)), encoding="utf-8")
    return path


def test_a_simulated_training_whose_worker_dies_goes_on_with_its_next_epoch(tmp_path: Path) -> None:
    epochs: list[int] = []

    def dies(fit: str, epoch: int, metrics: Metrics) -> None:
        epochs.append(epoch)
        if epochs == [1, 2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, dies)
    trained(tmp_path, dies)
    trained(tmp_path, dies)
    assert epochs == [*range(1, EPOCHS + 1)]


def test_searches_that_lost_nothing_are_counted(tmp_path: Path) -> None:
    soaked = Soak(tmp_path)
    trained(tmp_path)
    soaked.keep()
    assert soaked.unharmed(1) == {"searches": 1, "trainings": 1, "candidates": 6}


def lost(table: Path) -> None:
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))


def changed(table: Path) -> None:
    table.write_text(table.read_text().replace("oblivious", "white-box"))


def doubled(table: Path) -> None:
    table.write_text(table.read_text() + table.read_text().splitlines()[-1] + "\n")


def repeated(table: Path) -> None:
    (entry,) = table.parents[1].glob(".store/fits/*/entry.json")
    entry.write_bytes(entry.read_bytes())


def epoch_repeated(table: Path) -> None:
    with table.parent.with_suffix(".log").open("a") as log:
        log.write("t001 epoch 2\n")


@pytest.mark.parametrize(
    ("harm", "law"),
    [
        (lost, "a candidate was lost"),
        (changed, "its figures changed"),
        (doubled, "a candidate stands twice"),
        (repeated, "a finished training was done again"),
        (epoch_repeated, "an epoch that had been kept was trained again"),
    ],
)
def test_each_harm_is_noticed(tmp_path: Path, harm: Callable[[Path], None], law: str) -> None:
    soaked, table = Soak(tmp_path), trained(tmp_path)
    soaked.keep()
    harm(table)
    with pytest.raises(AssertionError, match=law):
        soaked.unharmed(1)


def test_growth_is_that_within_processes_after_their_first_looks() -> None:
    """A worker's successor holds 50 MiB more, which is no growth; each grows by 6 MiB an hour, after it has begun."""
    seen: list[Process] = []
    for look in range(20):
        worker, age = divmod(look, 10)
        mib = 100 + 50 * worker + 6 * look / 60 - 40 * (age < 3)
        seen += [(look / 60, "worker", worker, mib, 44), (look / 60, "driver", 9, 500.0, 40 + look)]
    grown = growth(seen)
    assert grown["worker"]["MiB an hour"] == pytest.approx(6) and grown["worker"]["files an hour"] == 0
    assert grown["driver"]["MiB an hour"] == 0 and grown["driver"]["files an hour"] == pytest.approx(60)
    assert grown["worker"]["processes"] == 2 and grown["worker"]["measurements"] == 14


def test_a_process_that_was_seen_too_seldom_does_not_count() -> None:
    assert growth([(look / 60, "worker", 1, 100.0 + look, 44) for look in range(4)]) == {}
