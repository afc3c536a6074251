"""The page on a user's data and classifier: its commands and its files, run as they stand there on real digits."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from defenses.base import Shape
from search import load
from search.classifiers.judging import check
from search.classifiers.training import train
from search.classifiers.user_code import UserCode
from search.data import splits
from spaces.exceptions import InputError
from tests.docs.test_readme import BLOCK
from tests.search.cli.test_cli import Said, said
from tests.support import own
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "own-model.md").read_text()
BLOCKS = [(language, text) for _, language, text in BLOCK.findall(PAGE)]
SHELL = [text.replace("\\\n", " ").splitlines() for language, text in BLOCKS if language == "sh"]
(OF_AN_EXPORT,) = (line for lines in SHELL for line in lines if "EXPORT" in line)
NET, TIMM, TORCHVISION, ROBUSTBENCH = (text for language, text in BLOCKS if language == "python")
SMALL = {
    "search": "--trials 1 --epochs 1 --suite quick --eval-images 10 --cheap-images 8 --wandb disabled --debug",
    "export": "--despite-alarms",
    "attack": "--suite quick --images 10",
}


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Said]]:
    """What the page's first commands say, run in their order in one folder, which stays the current."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("walk"))
        patch.setenv("CRUCIBLE_DATA", str(Path("data").absolute()))
        own.folder_of(Path("photographs"), count=None, mode="RGB")
        Path("net.py").write_text(NET)
        heard = dict[str, Said]()
        for line in SHELL[0]:
            words = shlex.split(line, comments=True)[2:]
            heard[words[0]] = said(*words, *shlex.split(SMALL.get(words[0], "")))
            if words[0] == "data":
                _trained()
        yield heard


def _trained() -> None:
    """Train the page's network on the data that were added, as a user has done elsewhere."""
    found: dict[str, object] = {}
    exec(NET, found)
    network = found["net"]()  # type: ignore[operator]
    x_NCHW, y_N = splits.load("leaves", "train")
    train(network, x_NCHW, y_N, epochs=4, seed=0)
    torch.save(network.state_dict(), "net.pt")


@pytest.mark.slow
def test_the_pages_commands_run_one_after_the_other(walk: dict[str, Said]) -> None:
    assert list(walk) == ["data", "classifier", "search", "export", "attack"]
    assert {line: heard for line, heard in walk.items() if heard.code} == {}
    assert "of 3 classes (four, one, zero)" in walk["data"].out
    assert float(re.findall(r"clean accuracy ([\d.]+) %", walk["classifier"].out)[0]) > 80
    assert "advae on leaves/mine" in walk["search"].out and "exported" in walk["export"].out


@pytest.mark.slow
def test_the_export_has_the_users_weights_and_loads_where_its_code_is_trusted(
    walk: dict[str, Said], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (folder,) = Path("runs/first/export").iterdir()
    given, model = torch.load("net.pt"), load(folder)
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.classifier.state_dict().items())
    known = json.loads((folder / "evidence.json").read_text())
    assert known["classes"] == ["four", "one", "zero"] and known["data_sha256"] == splits.checksum("leaves")
    assert not known["model"]["own"]["classifier"]["trained"] and "its owner's" in (folder / "card.md").read_text()
    monkeypatch.setenv("CRUCIBLE_DATA", str(tmp_path))
    with pytest.raises(InputError, match="the code of an export must be trusted before it is run"):
        load(folder)
    x_NCHW = torch.rand(4, 3, 32, 32)
    assert torch.equal(load(folder, trust=True)(x_NCHW), model(x_NCHW))


@pytest.mark.slow
def test_an_export_alone_gives_its_classifier_to_another_machine(
    walk: dict[str, Said], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (folder,) = Path("runs/first/export").iterdir()
    monkeypatch.setenv("CRUCIBLE_DATA", str(tmp_path))
    assert said("data", "add", "leaves", "photographs", "--size", "32").code == 0
    words = shlex.split(OF_AN_EXPORT.replace("EXPORT", str(folder)))[2:]
    assert said(*words).code == 0
    attacked = said("attack", str(folder), "--suite", "quick", "--images", "10")
    assert attacked.code == 0, attacked.err


@pytest.mark.slow
def test_a_code_that_was_changed_breaks_the_seal(walk: dict[str, Said]) -> None:
    (folder,) = Path("runs/first/export").iterdir()
    text = (folder / "classifier.py").read_text()
    (folder / "classifier.py").write_text(text + "\n")
    with pytest.raises(InputError, match="has another classifier.py than its SHA256SUMS says"):
        load(folder, trust=True)
    (folder / "classifier.py").write_text(text)


def test_the_readme_shows_the_same_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert all(line.partition("  #")[0].strip() in readme for line in SHELL[0])


@pytest.mark.parametrize(
    ("library", "text", "classes"),
    [("timm", TIMM, 3), ("torchvision", TORCHVISION, 3), ("robustbench.model_zoo.architectures", ROBUSTBENCH, 10)],
)
def test_models_of_other_libraries_are_classifiers_where_they_are_installed(
    library: str, text: str, classes: int
) -> None:
    pytest.importorskip(
        library, reason=f"{library} is not installed, and not in requirements.lock", exc_type=ImportError
    )
    shape = Shape(3, 32, 32, classes)
    network = UserCode(code=text, function="net").build(shape).eval()
    check(network, torch.rand(8, 3, 32, 32), shape, "pictures")
    assert len([line for line in text.splitlines() if line]) == 3
