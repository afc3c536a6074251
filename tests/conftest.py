"""Fixtures that many tests share: small models, and one finished search on real digits."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from search.classifiers.training import train
from search.study.loading import make_study
from search.study.study import Study
from search.trial import assets, latency

os.environ.setdefault("RAY_worker_niceness", "0")
"""Ray's default, 15, would let its workers starve beside other tests of the same machine, which wait for nobody."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold slow tests, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _lane_of_its_own() -> Iterator[None]:
    """Give each of several workers a temporary folder, and so a device lock: none waits for another's tests."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix=worker, ignore_cleanup_errors=True) as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", folder)
            patch.setattr(tempfile, "tempdir", None)
            yield


@pytest.fixture(scope="session", autouse=True)
def _classifiers_trained_once() -> Iterator[None]:
    """Train a classifier of the same layers on the same images by the same seed once, and copy it after that."""
    trained: dict[object, tuple[dict[str, Tensor], float, Tensor]] = {}

    def learn(network: nn.Module, x_NCHW: Tensor, y_N: Tensor, epochs: int, seed: int) -> float:
        if not all(type(part).__module__.startswith("torch.nn.") for part in network.modules()):
            return train(network, x_NCHW, y_N, epochs, seed)  # its layers do not say all that it does
        images = hashlib.sha256(x_NCHW.cpu().numpy().tobytes() + y_N.cpu().numpy().tobytes()).digest()
        key = (str(network), images, tuple(x_NCHW.shape), epochs, seed, "forward" in vars(network), x_NCHW.device)
        if key not in trained:
            accuracy = train(network, x_NCHW, y_N, epochs, seed)
            weights = {name: weight.clone() for name, weight in network.state_dict().items()}
            trained[key] = weights, accuracy, torch.get_rng_state()
        weights, accuracy, state = trained[key]
        network.load_state_dict(weights)
        torch.set_rng_state(state)
        return accuracy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "train", learn)
        yield


@pytest.fixture
def own_lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device lock of the test's own, for child processes too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


@pytest.fixture(scope="module", autouse=True)
def _brief_latency() -> Iterator[None]:
    """Time each setting three times, and not again if the machine was busy; tests of the measurement override this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "REPEATS", 3)
        patch.setattr(latency, "WARM_UP", 1)
        patch.setattr(latency, "TRIES", 1)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _shared(request: pytest.FixtureRequest) -> Iterator[None]:
    """Put the classifier that all tests share back in eval mode, which stock torchattacks does not."""
    yield
    if "classifier" in request.fixturenames:
        request.getfixturevalue("classifier").eval()


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """1,797 real 8 x 8 digits in [0, 1]."""
    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)


@pytest.fixture(scope="session")
def classifier(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """A small network trained on the digits, in eval mode."""
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    train(network, digits[0][:1400], digits[1][:1400], epochs=8, seed=0)
    return network.eval().requires_grad_(False)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A search of seconds on real digits."""
    return digits_study(tmp_path)


def digits_study(storage: Path, **fields: object) -> Study:
    smoke = {
        "name": "smoke",
        "task": "digits/A",
        "space": "smoke",
        "trials": 2,
        "eval_images": 60,
        "cheap_images": 20,
        "classifier_epochs": 4,
        "epochs": 2,
        "wandb": "disabled",
        "storage": str(storage),
    }
    return make_study(smoke | fields)


def brief_study(storage: Path, **fields: object) -> Study:
    """Return a study of whose figures nothing is asked."""
    few = {"suite": "quick", "train_images": 256, "eval_images": 30, "epochs": 1, "classifier_epochs": 1}
    return digits_study(storage, **few | fields)
