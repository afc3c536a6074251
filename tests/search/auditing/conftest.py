"""A folder as a user has it: a file with models, weights of a small network trained on real digits, images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.search.cli.test_cli import Said, said

DATA = "--weights net.safetensors --data digits.npz"
Heard = tuple[Said, dict[str, Any], Path]
MODELS = '''
"""Models of a user, each returned by a function."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10)
        )

    def forward(self, x):
        return self.layers(x)


class Rounding(Net):
    """Rounds pixels to eighths, which hides the gradient."""

    def forward(self, x):
        return self.layers((8 * x).round() / 8)


class Purifying(Net):
    """The same, split into two."""

    forward = nn.Module.forward

    def purify(self, x):
        return (8 * x).round() / 8

    def classify(self, x):
        return self.layers(x)


class Guided(Purifying):
    """With a stand-in; the forward pass is its own."""

    def surrogate(self, x):
        return x

    def forward(self, x):
        return self.layers(self.purify(x))


class Noisy(Net):
    def forward(self, x):
        return self.layers(x + 0.1 * torch.randn_like(x))


class Detecting(Net):
    """Rejects what is rough."""

    def suspicion(self, x):
        return (x - nn.functional.avg_pool2d(x, 3, 1, 1)).abs().mean((1, 2, 3)) - 0.25


class Counting(Net):
    """Answers what it is asked first as it should, and later the negative."""

    asked = []

    def forward(self, x):
        self.asked.append(1)
        return self.layers(x) if len(self.asked) <= 40 else self.layers(1 - x)


class Bent(Guided):
    def forward(self, x):
        return -self.layers(self.purify(x))


class Blind(Net):
    def forward(self, x):
        with torch.no_grad():
            return self.layers(x)


class Numpy(Net):
    """Purifies by NumPy, through which no gradient can be taken."""

    def purify(self, x):
        return torch.from_numpy((8 * x.numpy()).round() / 8)

    def classify(self, x):
        return self.layers(x)

    def forward(self, x):
        return self.classify(self.purify(x))


class Counts(Numpy):
    """Has no gradient where BPDA needs one."""

    def classify(self, x):
        return self.layers(x.detach())


class Silent(nn.Module):
    pass


class OnlyPurifies(Net):
    def purify(self, x):
        return x


class Shrinks(Guided):
    def purify(self, x):
        return x[..., 1:]


class Large(Net):
    def forward(self, x):
        return self.layers(x.reshape(32, 1, 8, 8))


numpy, counts = Numpy, Counts
plain, rounding, purifying, guided, noisy, detecting = Net, Rounding, Purifying, Guided, Noisy, Detecting
counting, bent, blind, silent, only_purifies, shrinks, large = (
    Counting, Bent, Blind, Silent, OnlyPurifies, Shrinks, Large
)


def softmax():
    return nn.Sequential(trained(), nn.Softmax(dim=1))


def trained():
    net = Net()
    net.load_state_dict(torch.load("net.pt", weights_only=True))
    return net


def few_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))


def colour():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))


def infinite():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Times(float("nan")))


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def a_number():
    return 3


def raises():
    raise OSError("no such checkpoint")


def wants(width):
    return Net()
'''


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, digits: tuple[Tensor, Tensor], classifier: nn.Module) -> Path:
    """The folder."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "net.py").write_text(MODELS)
    (folder / "broken.py").write_text("def build(:\n")
    state = {f"layers.{name}": value.clone() for name, value in classifier.state_dict().items()}
    save_file(state, folder / "net.safetensors")
    torch.save(state, folder / "net.pt")
    torch.save({"state_dict": state}, folder / "checkpoint.pt")
    torch.save(classifier, folder / "whole.pt")
    torch.save({**state, "more": torch.zeros(1)}, folder / "more.pt")
    x, y = (np.asarray(part[1400:]) for part in digits)
    np.savez(folder / "digits.npz", x=(255 * x[:, 0]).round().astype(np.uint8), y=y)
    np.savez(folder / "last.npz", x_test=x.transpose(0, 2, 3, 1), y_test=y[:, None])
    np.savez(folder / "bright.npz", x=255 * x, y=y)
    np.savez(folder / "whole.npz", x=x.astype(np.int64), y=y)
    np.savez(folder / "apart.npz", x=x, y=y[:-1])
    np.savez(folder / "soft.npz", x=x, y=y.astype(np.float32))
    np.savez(folder / "below.npz", x=x, y=y - 1)
    np.savez(folder / "beyond.npz", x=x, y=y + 1)
    np.savez(folder / "few.npz", x=x[:20], y=y[:20])
    np.savez(folder / "flat.npz", x=x.reshape(len(x), -1), y=y)
    np.savez(folder / "unnamed.npz", images=x, labels=y)
    np.savez(folder / "words.npz", x=x, y=y.astype(str))
    np.savez(folder / "first.npz", x=x[y < 5].astype(">f8"), y=y[y < 5].astype(np.uint16))
    np.save(folder / "renamed.npy", x)
    (folder / "renamed.npy").rename(folder / "renamed.npz")
    np.savez_compressed(folder / "torn.npz", x=x, y=y)
    whole = bytearray((folder / "torn.npz").read_bytes())
    whole[300:400] = bytes(100)
    (folder / "torn.npz").write_bytes(whole)
    return folder


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(home)
    yield home


def audited(words: str, out: Path) -> Said:
    """Audit a model of the file as a user does, on few images."""
    return said("audit", *words.split(), *"--norm Linf --eps 0.1 --images 32 --out".split(), str(out))


@pytest.fixture(scope="session")
def heard(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Heard]:
    """What the command says of a model of net.py, its evidence and its folder; each is audited once."""
    known: dict[str, Heard] = {}

    def of(function: str) -> Heard:
        if function not in known:
            out = tmp_path_factory.mktemp("audits") / function
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(home)
                told = audited(f"net.py:{function} {DATA}", out)
            assert told.code in (0, 1), told.err
            known[function] = told, json.loads((out / "evidence.json").read_text()), out
        return known[function]

    return of
