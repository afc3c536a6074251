"""Trainings in bfloat16: the networks alone, in training alone; everything that judges is float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import defenses
import spaces
from benchmarks import simulated
from defenses.base import Batches, Defended, Shape
from search.engine.run import run
from search.engine.worker import settled as settled_here
from search.study.loading import read_study
from search.trial import precision
from search.trial.evaluator import Evaluator
from search.trial.precision import Networks, settled
from search.trial.runner import TrialRunner
from search.trial.training import Trainer, silent
from spaces.space import SearchSpace
from tests.conftest import digits_study

CPU = torch.device("cpu")
INSTANT = simulated.working(0.0)
DIGITS = Shape(1, 8, 8, 10)
Digits = tuple[Tensor, Tensor]


class Doubled(nn.Linear):
    """A network that returns a tensor and its class, as a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, y.argmax(1)


def test_networks_compute_in_bfloat16_in_training_alone_and_return_float32() -> None:
    torch.manual_seed(0)
    parts = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), Doubled(64, 8)])
    networks, x = Networks("bfloat16", CPU, parts), torch.rand(64, 64)
    exact = parts[0](x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = parts[0](x)
    with networks.training():
        here, (there, classes) = parts[0](x), parts[1](x)
        with networks.exactly():
            assert torch.equal(parts[0](x), exact)
    assert here.dtype == there.dtype == torch.float32 and classes.dtype == torch.int64
    assert torch.equal(here, rounded.float()) and not torch.equal(here, exact)
    assert torch.equal(parts[0](x), exact) and all("forward" not in vars(part) for part in parts)
    with Networks("float32", CPU, parts).training():
        assert torch.equal(parts[0](x), exact)


def test_dense_layers_round_no_weights_for_few_rows() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 8))
    x = torch.rand(64, 1, 8, 8)
    exact, rounding = network(x), Networks("bfloat16", CPU, network)
    with torch.autocast("cpu", torch.bfloat16):
        maps = network[:2](x)
        rounded = network[2](maps)
    with rounding.training():
        assert torch.equal(network(x), rounded.float())
        few = network(x[:32])
    assert torch.equal(few, network[2](maps[:32].float())) and not torch.equal(few, exact[:32])
    assert all("forward" not in vars(part) for part in network)


def test_between_epochs_and_after_a_failure_nothing_is_rounded() -> None:
    network, x, seen = nn.Linear(64, 8), torch.rand(64, 64), []
    exact = network(x)

    def fit() -> Iterator[int]:
        for epoch in range(2):
            seen.append(torch.equal(network(x), exact))
            yield epoch
        raise RuntimeError("broken")

    epochs = Networks("bfloat16", CPU, network).epochs(fit())
    for _ in range(2):
        next(epochs)
        assert torch.equal(network(x), exact)
    with pytest.raises(RuntimeError, match="broken"):
        next(epochs)
    assert torch.equal(network(x), exact) and seen == [False, False]


@pytest.mark.parametrize("name", [name for name in defenses.names() if name != "identity"])
def test_a_defense_learns_in_bfloat16_what_it_does_in_float32(name: str, digits: Digits, classifier: nn.Module) -> None:
    kind = defenses.find(name)
    space = SearchSpace.of(kind).narrow({**spaces.named(name, "smoke"), "epochs": 1} if spaces.names(name) else {})
    params, losses, drawn = space.setting(space.usual_of), dict[str, dict[str, float]](), dict[str, Tensor]()
    low: precision.Precision
    for low in ("float32", "bfloat16"):
        torch.manual_seed(0)
        defense = kind(params.train, params.inference, DIGITS)
        defense.adopt(classifier)
        batches = Batches(digits[0][:160], digits[1][:160], epochs=1, batch_size=32)
        bases = nn.ModuleList([copy.deepcopy(classifier) for _ in defense.bases()])
        networks = Networks(low, CPU, defense, bases, classifier)
        (losses[low],) = networks.epochs(defense.fit(batches, bases if len(bases) else classifier))
        assert {weight.dtype for weight in defense.parameters()} <= {torch.float32}
        drawn[low] = torch.cat([torch.empty(0), *(weight.detach().flatten() for weight in defense.parameters())])
    if len(drawn["float32"]):
        assert not torch.equal(drawn["float32"], drawn["bfloat16"])
    first, second = (torch.tensor([*losses[low].values()]) for low in ("float32", "bfloat16"))
    assert torch.allclose(first, second, rtol=0.1, atol=0.1)


def test_a_puvae_follows_its_float32_self_for_epochs(digits: Digits, classifier: nn.Module) -> None:
    """One autocast around the whole fit would keep its first copies of the weights, and the loss would stand still."""
    kind = defenses.find("puvae")
    space = SearchSpace.of(kind).narrow({**spaces.named("puvae", "smoke"), "epochs": 4})
    params, curves = space.setting(space.usual_of), []
    low: precision.Precision
    for low in ("float32", "bfloat16"):
        torch.manual_seed(0)
        puvae = kind(params.train, params.inference, DIGITS)
        batches = Batches(digits[0][:320], digits[1][:320], epochs=4, batch_size=16)
        fit = Networks(low, CPU, puvae, classifier).epochs(puvae.fit(batches, classifier))
        curves.append([list(metrics.values()) for metrics in fit])
    exact, rounded = map(torch.tensor, curves)
    assert torch.allclose(exact, rounded, rtol=0.05) and exact[-1, 0] < exact[0, 0]


def test_quick_scores_and_verdicts_are_taken_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = digits_study(tmp_path, precision="bfloat16")
    runner, inside = TrialRunner(study, study.store.make()), list[bool]()
    cheap = Evaluator.cheap

    def watched(self: Evaluator, target: Defended, images: int) -> float:
        inside.extend("forward" in vars(part) for part in target.modules())
        return cheap(self, target, images)

    monkeypatch.setattr(Evaluator, "cheap", watched)
    space = study.resolved.space
    _, defense = runner.trainer.fit(space.setting(space.usual_of), silent)
    assert inside and not any(inside)
    assert defense.purify(torch.rand(2, 1, 8, 8)).dtype == torch.float32


def test_fits_and_classifiers_of_another_precision_are_others(tmp_path: Path) -> None:
    keys = []
    for low in ("float32", "bfloat16"):
        study = digits_study(tmp_path, precision=low)
        runner, space = TrialRunner(study, study.store), study.resolved.space
        keys.append((runner.trainer.key(space.setting(space.usual_of)), runner.assets.classifier_key("A")))
    assert all(one != other for one, other in zip(*keys, strict=True))


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_what_the_hardware_does_natively_and_a_search_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(precision, "native", lambda device: native)
    meant = "bfloat16" if native else "float32"
    assert settled("auto", CPU) == meant and settled("float32", CPU) == "float32"
    study = digits_study(tmp_path, trials=1)
    assert study.precision == "auto" and settled_here(study).precision == meant
    assert run(study, [], debug=True, work=INSTANT) == "finished"
    written = study.folder / "study.yaml"
    assert yaml.safe_load(written.read_text())["precision"] == meant
    assert read_study(written, stored=True).precision == meant


def test_a_search_of_an_earlier_version_was_float32(tmp_path: Path) -> None:
    old = tmp_path / "study.yaml"
    old.write_text("name: old\ntask: digits/A\n")
    assert read_study(old, stored=True).precision == "float32" and read_study(old).precision == "auto"


def test_a_classifier_is_trained_in_it_and_learns_as_well(tmp_path: Path, digits: Digits) -> None:
    trained = []
    for low in ("float32", "bfloat16"):
        study = digits_study(tmp_path, precision=low)
        network = TrialRunner(study, study.store.make()).assets.classifier("A")
        weights = torch.cat([weight.flatten() for weight in network.parameters()])
        trained.append((weights, float((network(digits[0]).argmax(1) == digits[1]).float().mean())))
    (exact, one), (rounded, other) = trained
    assert float((exact - rounded).norm() / exact.norm()) > 1e-4  # the same training repeats to the bit
    assert min(one, other) > 0.85 and abs(one - other) < 0.03


def test_images_that_are_made_once_for_all_fits_are_made_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Digits
) -> None:
    study = digits_study(tmp_path, defense="defense_vae", precision="bfloat16")
    runner, once, alike = TrialRunner(study, study.store.make()), Trainer._once, list[bool]()
    exact = runner.assets.target(digits[0][:32])

    def watched(self: Trainer, *words: Any) -> Any:
        alike.append(torch.equal(runner.assets.target(digits[0][:32]), exact))
        return once(self, *words)

    monkeypatch.setattr(Trainer, "_once", watched)
    space = study.resolved.space
    runner.trainer.fit(space.setting(space.usual_of), silent)
    assert alike and all(alike)


def test_gpus_round_to_tf32_in_training_alone() -> None:
    networks = Networks("bfloat16", CPU, nn.Linear(2, 2))
    with networks.training():
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
        with networks.exactly():
            assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
