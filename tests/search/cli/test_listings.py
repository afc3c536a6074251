"""What `list` says, and how tables look where the output is piped."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import defenses
from search.classifiers.task import TASKS, find_task
from search.cli.flags import LISTED
from tests.search.cli.test_cli import said


@pytest.mark.parametrize("name", defenses.names())
def test_a_defense_lists_its_knobs_with_default_legal_values_and_meaning(name: str) -> None:
    rows = json.loads(said("list", name, "--json").out)
    alike = [row for row in json.loads(said("list", "defenses", "--json").out) if row.pop("defense") == name]
    assert [{**row, "meaning": None} for row in rows] == [{**row, "meaning": None} for row in alike]
    assert all(row["meaning"] and row["domain"] for row in rows)
    shown = " ".join(said("list", name).out.split())
    assert all(" ".join(row["meaning"].split()) in shown for row in rows)


def test_what_is_neither_a_kind_nor_a_defense_is_refused_with_the_nearest_name() -> None:
    heard = said("list", "puvea")
    assert heard.code == 2 and heard.err.endswith("but is 'puvea'; did you mean 'puvae'?\n")


def test_tasks_say_what_their_classifiers_are() -> None:
    rows = {row["task"]: row["classifier"] for row in json.loads(said("list", "tasks", "--json").out)}
    assert rows["mnist/A"] == "PuVAE's A: conv 64 5x5, conv 64 5x5 stride 2, dropout 0.25, dense 128, dropout 0.5"
    assert rows["cifar10/resnet29"] == "ResNet v2 of 29 layers, which AdvAE protects"
    for name in (name for name in TASKS if name.startswith("mnist/")):
        with torch.device("meta"):
            network = list((task := find_task(name)).build(task.classifier).modules())
        kinds = {"conv ": nn.Conv2d, "dropout ": nn.Dropout, "max pool ": nn.MaxPool2d, "dense ": nn.Linear}
        for word, kind in kinds.items() if task.classifier != "resnet29" else ():
            last = kind is nn.Linear  # the layer of the logits
            assert rows[name].count(word) == sum(isinstance(layer, kind) for layer in network) - last, (name, word)


@pytest.mark.parametrize("what", LISTED)
def test_a_piped_table_is_not_padded_and_has_a_line_for_each_row(what: str) -> None:
    lines = said("list", what).out.splitlines()
    assert len(lines) == 1 + len(json.loads(said("list", what, "--json").out)) or lines == ["nothing"]
    assert lines == [line.rstrip() for line in lines]


def test_a_column_that_is_empty_everywhere_is_left_out() -> None:
    assert "matters where" in said("list", "magnet").out.splitlines()[0] + said("list", "gmvae").out.splitlines()[0]
    assert "matters where" not in said("list", "puvae").out
