"""A user's own classifiers: a real small network on real digits, added, judged, and kept as it was given."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from search.classifiers import adding, own
from search.classifiers.task import find_task, tasks
from search.classifiers.user_code import Normalised
from search.data import splits
from search.trial.assets import Assets
from spaces.exceptions import InputError
from tests.conftest import digits_study
from tests.search.cli.test_cli import said
from tests.support.own import FILE, data_with_classifier, trained, written


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with the data set `leaves`, and the files `net.py` and `net.pt` beside it."""
    monkeypatch.setenv("CRUCIBLE_DATA", str(tmp_path / "data"))
    data_with_classifier(tmp_path)
    return tmp_path


def network_of(name: str = "mine") -> nn.Module:
    task = find_task(f"leaves/{name}")
    network = task.build(name)
    (folder,) = own.folders("leaves", name, None)
    network.load_state_dict(load_file(folder / own.WEIGHTS))
    return network.eval()


def test_a_classifier_is_judged_at_once_and_then_a_task(data: Path) -> None:
    added = adding.add("mine", f"{data}/net.py:net", "leaves", weights=data / "net.pt")
    x_NCHW, y_N = splits.load("leaves", "validation")
    with torch.no_grad():
        accuracy = float((network_of()(x_NCHW).argmax(1) == y_N).double().mean())
    assert added.clean_accuracy == pytest.approx(accuracy) and accuracy > 0.8 and added.images == len(y_N)
    assert f"clean accuracy {100 * accuracy:.1f} % on {len(y_N)} validation" in adding.said(vars(added))
    assert "leaves/mine" in tasks() and find_task("leaves/mine").partner == "mine"
    assert [row["task"] for row in adding.rows()] == ["leaves/mine"]


def _nested(state: Mapping[str, Tensor]) -> object:
    return {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}


@pytest.mark.parametrize("form", ["state dict", "safetensors", "checkpoint of DataParallel", "weights of an export"])
def test_weights_are_read_in_every_safe_form(data: Path, form: str) -> None:
    state, path = trained().state_dict(), data / "other.pt"
    if form == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif form == "weights of an export":
        adding.add("first", f"{data}/net.py:net", "leaves", weights=data / "net.pt", mean="0", std="1")
        (folder,) = own.folders("leaves", "first", None)
        path = folder / own.WEIGHTS
    else:
        torch.save(_nested(state) if form.startswith("checkpoint") else state, path)
    adding.add("mine", f"{data}/net.py:net", "leaves", weights=path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network_of().state_dict().items())


def test_mean_and_std_normalise_before_the_network(data: Path) -> None:
    adding.add("mine", f"{data}/net.py:net", "leaves", weights=data / "net.pt", mean="0.5", std="0.25")
    network, (x_NCHW, _) = network_of(), splits.load("leaves", "validation")
    assert isinstance(network, Normalised)
    assert torch.allclose(network(x_NCHW), trained()((x_NCHW - 0.5) / 0.25), atol=1e-5)


def test_given_weights_are_used_as_they_are_by_searches_and_final_runs(data: Path) -> None:
    adding.add("mine", f"{data}/net.py:net", "leaves", weights=data / "net.pt")
    study = digits_study(data / "runs", task="leaves/mine", eval_images=10)
    store = study.store.make()
    assets, state = Assets(study, store), trained().state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in assets.target.state_dict().items())
    assert not any(part.requires_grad for part in assets.target.parameters()) and not assets.target.training
    final = Assets(study.model_copy(update={"seed": 1000}), store, with_validation=True)
    assert final.classifier_key("mine") == assets.classifier_key("mine")
    assert store.about("classifiers", assets.classifier_key("mine"))["trained_by"] == "its owner"
    assert study.resolved.partner == study.resolved.substitute == "mine" and assets.needed() == {"mine"}


def test_partner_names_another_source_classifier_of_puvae(data: Path) -> None:
    adding.add("mine", f"{data}/net.py:net", "leaves", weights=data / "net.pt")
    study = digits_study(data / "runs", task="leaves/mine", eval_images=10, partner="A")
    assets = Assets(study, study.store.make())
    assert study.resolved.partner == "A" and assets.needed() == {"mine", "A"}
    with pytest.raises(InputError, match="partner must be left out .*, as magnet is, but is A"):
        digits_study(data / "runs", task="leaves/mine", eval_images=10, partner="A", defense="magnet", space="default")
    with pytest.raises(InputError, match="after the slash, must be one of A, .*mine, but is 'other'"):
        digits_study(data / "runs", task="leaves/mine", eval_images=10, partner="other")


def test_without_weights_it_is_an_architecture_that_the_search_trains(data: Path) -> None:
    added = adding.add("mine", f"{data}/net.py:net", "leaves")
    assert added.clean_accuracy is None and "the first search that needs it trains it" in adding.said(vars(added))
    study = digits_study(data / "runs", task="leaves/mine", eval_images=10, classifier_epochs=60)
    assets = Assets(study, study.store.make())
    x_NCHW, y_N = splits.load("leaves", "validation")
    assert (assets.target(x_NCHW).argmax(1) == y_N).float().mean() > 0.7
    assert "training_accuracy" in study.store.about("classifiers", assets.classifier_key("mine"))
    final = Assets(study, study.store, with_validation=True)
    assert final.classifier_key("mine") != assets.classifier_key("mine"), "a final run trains it anew"


def test_the_key_is_of_code_weights_and_data(data: Path) -> None:
    def key(name: str) -> str:
        study = digits_study(data / "runs", task=f"leaves/{name}", eval_images=10)
        return Assets(study, study.store.make()).classifier_key(name)

    written(data / "same.py", FILE)
    written(data / "code.py", FILE.replace("nn.ReLU()", "nn.ELU()"))
    torch.save({name: tensor * 1.01 for name, tensor in trained().state_dict().items()}, data / "weights.pt")
    adding.add("mine", f"{data}/net.py:net", "leaves", weights=data / "net.pt")
    adding.add("same", f"{data}/same.py:net", "leaves", weights=data / "net.pt")
    adding.add("code", f"{data}/code.py:net", "leaves", weights=data / "net.pt")
    adding.add("weights", f"{data}/net.py:net", "leaves", weights=data / "weights.pt")
    adding.add("scaled", f"{data}/net.py:net", "leaves", weights=data / "net.pt", mean="0", std="2")
    assert key("mine") == key("same") and len({key(n) for n in ("mine", "code", "weights", "scaled")}) == 4


def test_a_classifier_travels_to_a_node_that_lacks_it(data: Path, tmp_path: Path) -> None:
    adding.add("mine", f"{data}/net.py:net", "leaves", weights=data / "net.pt")
    packed = own.pack("leaves", None)
    for _ in range(2):
        own.adopt("leaves", tmp_path / "node", packed)
    assert own.find_own("leaves", "mine", None) is not None
    found = own.find_own("leaves", "mine", tmp_path / "node")
    assert found is not None and found.digest == own.find_own("leaves", "mine", None).digest  # type: ignore[union-attr]
    adding.remove("leaves/mine")
    adding.add("mine", f"{data}/net.py:net", "leaves", weights=data / "net.pt", mean="0", std="2")
    with pytest.raises(InputError, match="must be that of the search, leaves/mine, but .* is another"):
        own.adopt("leaves", tmp_path / "node", own.pack("leaves", None))


def test_ray_can_send_what_a_users_code_builds_to_a_process_that_lacks_the_code(data: Path) -> None:
    written(
        data / "net.py",
        "from torch import nn\n\nclass Net(nn.Sequential):\n    pass\n\n"
        + FILE.replace("return nn.Sequential", "return Net").replace("from torch import nn\n", ""),
    )
    adding.add("mine", f"{data}/net.py:net", "leaves", weights=data / "net.pt")
    network, (x_NCHW, _) = network_of(), splits.load("leaves", "validation")
    (data / "sent").write_bytes(cloudpickle.dumps((network, x_NCHW)))
    code = f"import pickle; f, x = pickle.load(open({str(data / 'sent')!r}, 'rb')); print(f(x).tolist())"
    answer = subprocess.run([sys.executable, "-c", code], cwd=data, capture_output=True, text=True, check=True).stdout
    assert torch.allclose(torch.tensor(json.loads(answer)), network(x_NCHW), atol=1e-5)


def test_a_removed_classifier_is_gone_and_data_with_one_cannot_be_removed(data: Path) -> None:
    adding.add("mine", f"{data}/net.py:net", "leaves", weights=data / "net.pt")
    refused = said("data", "remove", "leaves")
    assert refused.code == 2 and "classifier remove leaves/mine" in refused.err
    assert said("classifier", "remove", "leaves/mine").code == 0 and "leaves/mine" not in tasks()
    assert said("data", "remove", "leaves").code == 0


# What is refused, in one line each, with nothing left behind.

BUILT = {
    "softmax": "nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Softmax(1))",
    "four": "nn.Sequential(nn.Flatten(), nn.Linear(64, 4))",
    "large": "nn.Sequential(nn.Flatten(), nn.Linear(784, 3))",
    "batch": "nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3, track_running_stats=False))",
    "functional": "Batch()",
    "noisy": "Noisy()",
    "nan": "Nan()",
    "step": "Step()",
    "double": "nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()",
    "list": "[]",
    "empty": "nn.Flatten()",
    "pair": "Pair()",
    "fails": "nn.Linear(64)",
    "missing": "__import__('no_such_package')",
}
CLASSES = """import torch
from torch import nn
class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
class Batch(Base):
    def forward(self, x): return self.net(x) - self.net(x).mean(0)
class Noisy(Base):
    def forward(self, x): return nn.functional.dropout(self.net(x), 0.5, training=True)
class Nan(Base):
    def forward(self, x): return self.net(x) / 0
class Step(Base):
    def forward(self, x): return self.net(x.round().detach()).detach()
class Pair(Base):
    def forward(self, x): return self.net(x), x
"""


@pytest.mark.parametrize(
    ("built", "law"),
    [
        ("softmax", "must return logits, but returns probabilities, which sum to 1: omit its softmax"),
        ("four", "must return float32 logits N x 3, one for each class of leaves, but 8 images give .8, 4."),
        ("large", "must take the 1 x 8 x 8 images of leaves, but fails: RuntimeError"),
        ("batch", "BatchNorm must use its running statistics in eval mode, but 2 uses those of the batch"),
        ("functional", "the logits of an image must not depend on the others of its batch"),
        ("noisy", "logits must be the same when asked again"),
        ("nan", "logits must be finite, but the classifier returns NaN"),
        ("step", "logits must be differentiable"),
        ("double", "must take the 1 x 8 x 8 images of leaves, but fails|must return float32"),
        ("list", "net must return an nn.Module, but returns a list"),
        ("empty", "a classifier must have parameters"),
        ("pair", "must return a tensor of logits, but returns a tuple"),
        ("fails", r"net\(\) must build a network, but fails: TypeError"),
        ("missing", "may import installed packages alone, but no_such_package is not installed here"),
    ],
)
def test_what_is_no_classifier_of_these_images_is_refused(data: Path, built: str, law: str) -> None:
    written(data / "net.py", f"{CLASSES}\ndef net():\n    return {BUILT[built]}\n")
    with pytest.raises(InputError, match=law) as refusal:
        adding.add("mine", f"{data}/net.py:net", "leaves")
    assert "\n" not in str(refusal.value) and own.names("leaves", None) == []
    assert not list((data / "data").rglob("classifier.*"))


def evil(path: Path) -> None:
    """Write a pickle that would make a file when it is read."""

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return Path.touch, (str(path.parent / "it-ran"),)

    path.write_bytes(pickle.dumps({"weight": Evil()}))


def whole_module(path: Path) -> None:
    torch.save(trained(), path)


def of_another(path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), path)


def of_another_shape(path: Path) -> None:
    state = trained().state_dict()
    torch.save(state | {"5.weight": torch.zeros(5, 5)}, path)


def optimiser(path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, path)


@pytest.mark.parametrize(
    ("write", "law"),
    [
        (evil, r"state dict that torch.load\(weights_only=True\) reads, since a pickle may run code"),
        (whole_module, r"state dict that torch.load\(weights_only=True\) reads"),
        (of_another, "weights must be those of the network, but in .* it lacks 0.weight, and"),
        (of_another_shape, r"5.weight is \[5, 5\], and \[3, 128\] in the network"),
        (optimiser, "weights must be a state dict, name to tensor, but are a dict with epoch, lr"),
        (lambda path: path.write_bytes(b"nothing"), "state dict that torch.load"),
        (lambda path: None, "weights must be a file, but .* does not exist"),
    ],
)
def test_weights_that_are_none_of_the_network_are_refused(
    data: Path, write: Callable[[Path], object], law: str
) -> None:
    write(data / "bad.pt")
    with pytest.raises(InputError, match=law) as refusal:
        adding.add("mine", f"{data}/net.py:net", "leaves", weights=data / "bad.pt")
    assert "\n" not in str(refusal.value) and own.names("leaves", None) == [] and not (data / "it-ran").exists()


@pytest.mark.parametrize(
    ("name", "source", "more", "law"),
    [
        ("A", "net.py:net", {}, "must be new, but 'A' is built in"),
        ("puvae-A", "net.py:net", {}, "must be new, but 'puvae-A' is built in"),
        ("taken", "net.py:net", {}, "leaves/taken was added before: .* classifier remove leaves/taken"),
        ("a/b", "net.py:net", {}, "must be letters, digits"),
        ("mine", "net.py", {}, "must be FILE.py:FUNCTION"),
        ("mine", "gone.py:net", {}, "must be one that can be read, but .*gone.py: No such file"),
        ("mine", "wrong.py:net", {}, "must be Python, but"),
        ("mine", "net.py:other", {}, "must have a function other, but has none"),
        ("mine", "net.py:net", {"mean": "0.5"}, "mean and std must be given together"),
        ("mine", "net.py:net", {"mean": "0.5,0.5", "std": "1"}, "one number or 1 with commas"),
        ("mine", "net.py:net", {"mean": "0.5", "std": "0"}, "std above 0"),
    ],
)
def test_wrong_names_and_sources_are_refused(
    data: Path, name: str, source: str, more: dict[str, Any], law: str
) -> None:
    adding.add("taken", f"{data}/net.py:net", "leaves")
    written(data / "wrong.py", "def net(:")
    with pytest.raises(InputError, match=law):
        adding.add(name, f"{data}/{source}", "leaves", **more)
    assert own.names("leaves", None) == ["taken"]


def test_altered_files_are_refused(data: Path) -> None:
    adding.add("mine", f"{data}/net.py:net", "leaves", weights=data / "net.pt")
    (folder,) = own.folders("leaves", "mine", None)
    (folder / own.WEIGHTS).write_bytes((folder / own.WEIGHTS).read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="weights.safetensors was altered"):
        find_task("leaves/mine").given_weights("mine")
    (folder / own.CODE).write_text("import os")
    with pytest.raises(InputError, match="must be as it was written, but was altered"):
        find_task("leaves/mine").added("mine")
    assert json.loads((folder / own.ABOUT).read_text())["function"] == "net"
