"""The commands that add a user's own data and classifiers, as they are typed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from search.auditing.images import images
from tests.search.cli.test_cli import said
from tests.support import own


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with pictures, net.py and net.pt; the data folder is of the test's own."""
    monkeypatch.setenv("CRUCIBLE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    own.files(tmp_path)
    return tmp_path


def test_what_is_added_is_listed_and_what_is_removed_is_not(here: Path) -> None:
    added = said("data", "add", "leaves", "pictures", "--licence", "CC0", "--eps", "4/255")
    assert added.code == 0 and "84 train, 18 validation, 18 test images of 3 classes (four, one, zero)" in added.out
    assert "split: validation and test drawn by class, 15% each, seed 0" in added.out
    assert images("leaves", "white-box").split == (
        "validation: validation and test drawn by class, 15% each, seed 0, never test"
    )
    few = "warning: searches judge on 14 of the validation images (the others are kept aside), which leaves an "
    assert f"{few}accuracy of 50 % an interval of 27 to 73 %" in added.out and "left out" not in added.out
    words = ("classifier", "add", "mine", "net.py:net", "--weights", "net.pt", "--data", "leaves")
    assert "clean accuracy" in said(*words).out and "leaves/mine" in said("classifier", "list").out
    assert re.search(r"^leaves/mine  [0-9a-f]{12} +[\d.]+.% +net.py:net$", said("classifier", "list").out, re.MULTILINE)
    assert [row["task"] for row in json.loads(said("list", "tasks", "--json").out)].index("leaves/mine") < 25
    assert re.search(r"^leaves/mine .* yours, net.py:net, with its weights$", said("list", "tasks").out, re.MULTILINE)
    states = {row["dataset"]: row["state"] for row in json.loads(said("data", "list", "--json").out)}
    assert states["leaves"] == "ready" and "mnist" in states
    assert said("classifier", "remove", "leaves/mine").code == said("data", "remove", "leaves").code == 0
    assert "leaves" not in said("list", "tasks").out + said("data", "list").out


def test_files_that_are_no_pictures_or_in_no_class_are_named(here: Path) -> None:
    for name in ("notes.txt", "zero/readme.md", "one/.hidden"):
        (here / "pictures" / name).write_text("no picture")
    Image.new("L", (8, 8)).save(here / "pictures" / "stray.png")
    heard = said("data", "add", "leaves", "pictures")
    line = "left out: 3 files that are no pictures, or in no class (notes.txt, stray.png, zero/readme.md)"
    assert heard.code == 0 and line in heard.out.splitlines()


@pytest.mark.parametrize(
    ("left", "reason"), [(0, "its content is none"), (90, "reading it fails: image file is truncated")]
)
@pytest.mark.parametrize(
    ("broken", "more"),
    [
        ([3], ""),
        ([3, 4, 7], "; 2 more of 120 cannot be read either: one/d4_0.png, one/d7_0.png"),
        (range(3, 9), "; 5 more of 120 cannot be read either: one/d4_0.png, one/d5_0.png, one/d6_0.png, ..."),
    ],
)
def test_every_broken_picture_counts_and_the_first_are_named(
    left: int, reason: str, broken: Sequence[int], more: str, here: Path
) -> None:
    files = [here / "pictures" / "one" / f"d{nth}_0.png" for nth in broken]
    for file in files:
        file.write_bytes(file.read_bytes()[:left])
    heard = said("data", "add", "leaves", "pictures").err
    first = next(file for file in files if str(file) in heard)
    assert heard.startswith(f"error: {first} must be a picture, but {reason}") and heard.endswith(f"{more}\n")
    assert heard.count("\n") == 1 and not (here / "data" / "decoded" / "leaves").exists()


def test_json_alone_is_printed_of_what_was_added(here: Path) -> None:
    (row,) = json.loads(said("data", "add", "leaves", "pictures", "--json").out)
    assert row["dataset"] == "leaves" and row["state"] == "ready"
    words = ("classifier", "add", "mine", "net.py:net", "--weights", "net.pt", "--data", "leaves", "--json")
    added = json.loads(said(*words).out)
    assert added["task"] == "leaves/mine" and 0.8 < added["clean_accuracy"] <= 1 and added["parameters"] == 483
    assert json.loads(said("classifier", "list", "--json").out)[0]["clean_accuracy"] == added["clean_accuracy"]


def test_another_data_folder_is_named_by_a_flag(here: Path) -> None:
    there = ("--data-dir", str(here / "there"))
    assert said("data", "add", "leaves", "pictures", *there).code == 0
    assert said("classifier", "add", "mine", "net.py:net", "--data", "leaves", *there).code == 0
    assert "leaves/mine" in said("list", "tasks", *there).out and "leaves" not in said("list", "tasks").out


@pytest.mark.parametrize(
    ("words", "law"),
    [
        ("data add mnist pictures", "must be new, but 'mnist' is built in"),
        ("data add leaves nothing", "but nothing does not exist|nothing does not exist"),
        (
            "data add leaves pictures net.py",
            "must be a folder of images, an .npz with x_train and y_train, or two .npy",
        ),
        ("data remove leaves", "must be one that was added .none is., but is 'leaves'"),
        ("classifier add mine net.py:net --data leafs", "a data set must be one of mnist, .*, but is 'leafs'"),
        ("classifier add mine net.py:net", "Missing option"),
        ("classifier remove leaves/mine", "must be one that was added .none is., but is 'leaves/mine'"),
        ("search --task leaves/mine", "a data set must be one of mnist, .*, but is 'leaves'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(here: Path, words: str, law: str) -> None:
    heard = said(*words.split())
    assert heard.code == 2 and heard.err.count("\n") == 1
    assert heard.out.replace("judging mine on the validation images of leafs\n", "") == ""
    assert re.search(law, heard.err), heard.err
