"""Latency: all that the defended model does beyond the bare classifier is timed, whatever the images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.catalog import IFGSM_TARGETED
from attacks.gradient_view import View
from attacks.threat import ThreatModel
from defenses.adversarial_training import AdversarialTraining
from defenses.base import Defended, Defense, Shape
from defenses.identity import Identity
from defenses.puvae import PuVAE
from search.study.candidate import Images, Latency
from search.trial import latency
from search.trial.device_lock import DeviceLock
from search.trial.latency import Unseen, measure
from spaces.domain import Scalar

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _brief_latency() -> None:
    """Time as a search does."""


@pytest.fixture
def few(own_lane: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "REPEATS", 7)


@pytest.fixture(scope="module")
def kinds(digits: tuple[Tensor, Tensor], classifier: nn.Module) -> dict[Images, Tensor]:
    x_NCHW, y_N = digits[0][1400:1500], digits[1][1400:1500]
    threat = ThreatModel("Linf", 0.1, "oblivious")
    return {"clean": x_NCHW, "attacked": IFGSM_TARGETED.craft(View(classifier), x_NCHW, y_N, threat, 0)}


def taken(defense: Defense, classifier: nn.Module, kinds: dict[Images, Tensor]) -> Latency:
    return measure(Defended(defense, classifier), kinds, DeviceLock(CPU))


def made(kind: type[Defense], **knobs: Scalar) -> Defense:
    return kind(knobs, {}, Shape(1, 8, 8, 10)).eval().requires_grad_(False)


SLEEP_S = 0.02


class WorksWhileItClassifies(Identity):
    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        time.sleep(SLEEP_S)
        return classifier(x_NCHW)


class Detector(Identity):
    def accept(self, x_NCHW: Tensor) -> Tensor:
        time.sleep(SLEEP_S)
        return torch.ones(len(x_NCHW), dtype=torch.bool)


class QuickOnNoise(Identity):
    """Takes a short way for images that are as bright as random ones."""

    def purify(self, x_NCHW: Tensor) -> Tensor:
        time.sleep(0 if x_NCHW.mean() > 0.45 else SLEEP_S)
        return x_NCHW


class QuickOnClean(Identity):
    """Takes a short way for images all of whose values are k / 16, as those of the clean digits are."""

    def purify(self, x_NCHW: Tensor) -> Tensor:
        off = (16 * x_NCHW - (16 * x_NCHW).round()).abs() > 1e-4
        time.sleep(SLEEP_S * float(off.flatten(1).any(1).float().mean()))
        return x_NCHW


class QuickOnAttacked(QuickOnClean):
    def purify(self, x_NCHW: Tensor) -> Tensor:
        off = (16 * x_NCHW - (16 * x_NCHW).round()).abs() > 1e-4
        time.sleep(SLEEP_S * float((~off.flatten(1).any(1)).float().mean()))
        return x_NCHW


class Remembers(Identity):
    """Works for images only that it has not seen: each image by its bytes, and the whole batch by its first image."""

    def build(self) -> None:
        self.seen = set[bytes]()

    def purify(self, x_NCHW: Tensor) -> Tensor:
        keys = {image.numpy().tobytes() for image in x_NCHW}
        time.sleep(SLEEP_S * len(keys - self.seen) / len(keys))
        self.seen |= keys
        return x_NCHW


class RemembersHalves(Identity):
    """Works for images only of which it has seen neither half."""

    def build(self) -> None:
        self.seen = set[tuple[int, bytes]]()

    def purify(self, x_NCHW: Tensor) -> Tensor:
        rows = x_NCHW.flatten(1)
        halves = [{(side, part.numpy().tobytes()) for side, part in enumerate(row.chunk(2))} for row in rows]
        time.sleep(SLEEP_S * sum(not pair & self.seen for pair in halves) / len(halves))
        self.seen |= set[tuple[int, bytes]]().union(*halves)
        return x_NCHW


class Late(Tensor):
    """A tensor that is computed when it is read."""

    work: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, given: Any = (), more: Any = None) -> Any:
        return function(*(one.work() if isinstance(one, cls) else one for one in given), **(more or {}))


class WorksLater(Identity):
    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        late = torch.zeros(len(x_NCHW), 10).as_subclass(Late)
        late.work = lambda: WorksWhileItClassifies.classify(self, x_NCHW, classifier)  # type: ignore[arg-type]
        return late


class SlowsTheBareClassifier(Identity):
    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        if not classifier._forward_pre_hooks:
            classifier.register_forward_pre_hook(lambda *_: time.sleep(SLEEP_S))
        return classifier(x_NCHW)


@pytest.mark.parametrize(
    "kind",
    [WorksWhileItClassifies, WorksLater, Detector, QuickOnNoise, Remembers, RemembersHalves, SlowsTheBareClassifier],
    ids=lambda k: k.__name__,
)
def test_work_shows_wherever_it_is_hidden(
    few: None, classifier: nn.Module, kinds: dict[Images, Tensor], kind: type[Defense]
) -> None:
    defense = made(kind)
    for x_NCHW in kinds.values():  # as an attack has shown it all images before
        defense.purify(x_NCHW)
    found = taken(defense, copy.deepcopy(classifier), kinds)
    assert 0.5 * SLEEP_S < found.ms_p50 / 1e3 < 5 * SLEEP_S and found.ms_p50 <= found.ms_p95
    assert 0.5 * SLEEP_S < found.single_ms_p50 / 1e3 < 5 * SLEEP_S


@pytest.mark.parametrize(("kind", "slower"), [(QuickOnClean, "attacked"), (QuickOnAttacked, "clean")])
def test_the_slower_kind_of_images_counts_and_is_named(
    few: None, classifier: nn.Module, kinds: dict[Images, Tensor], kind: type[Defense], slower: str
) -> None:
    found = taken(made(kind), classifier, kinds)
    assert found.images == slower and found.ms_p50 / 1e3 > 0.5 * SLEEP_S


def test_what_takes_no_longer_than_the_bare_classifier_shows_nothing(
    few: None, classifier: nn.Module, kinds: dict[Images, Tensor]
) -> None:
    trained = made(AdversarialTraining)
    trained.adopt(classifier)
    for defense in (made(Identity), trained):
        found = taken(defense, classifier, kinds)
        assert 0 <= found.ms_p50 < 2 and 0 <= found.single_ms_p50 < 2 and found.ms_p95 >= found.ms_p50


def test_what_the_defense_saves_the_classifier_is_no_negative_latency(
    few: None, classifier: nn.Module, kinds: dict[Images, Tensor]
) -> None:
    slow = nn.Sequential(copy.deepcopy(classifier))
    slow.register_forward_pre_hook(lambda *_: time.sleep(SLEEP_S))

    class Skips(Identity):
        def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
            return x_NCHW.flatten(1)[:, :10]

    found = taken(made(Skips), slow, kinds)
    assert (found.ms_p50, found.ms_p95, found.single_ms_p50) == (0, 0, 0)


def test_acceptance_is_timed_only_where_the_defense_can_reject(
    few: None, classifier: nn.Module, kinds: dict[Images, Tensor]
) -> None:
    class Suspects(Identity):
        """Has scores, but no threshold."""

        def suspicion(self, x_NCHW: Tensor) -> Tensor:
            time.sleep(SLEEP_S)
            return x_NCHW.new_zeros((len(x_NCHW), 0))

    assert not Suspects.rejects() and Detector.rejects()
    assert taken(made(Suspects), classifier, kinds).ms_p50 / 1e3 < SLEEP_S / 2


@pytest.mark.parametrize("count", [1, 128])
def test_no_image_is_served_twice_and_only_levels_of_the_data_occur(kinds: dict[Images, Tensor], count: int) -> None:
    x_NCHW = kinds["clean"][:3]
    levels_V = x_NCHW.unique()
    stream, again = Unseen(x_NCHW, levels_V), Unseen(x_NCHW, levels_V)
    served = torch.cat([stream.take(count) for _ in range(1 + 384 // count)])
    known = {image.numpy().tobytes() for image in x_NCHW}
    assert not known & {image.numpy().tobytes() for image in served}
    assert len({image.numpy().tobytes() for image in served}) == len(served)
    assert torch.isin(served, levels_V).all() and served.shape[1:] == x_NCHW.shape[1:]
    far_SM64 = (torch.searchsorted(levels_V, served)[:, None] - torch.searchsorted(levels_V, x_NCHW)[None]).abs()
    nearest_S = (far_SM64 > 1).flatten(2).sum(2).argmin(1)
    far_S64 = far_SM64.flatten(2)[torch.arange(len(served)), nearest_S]
    assert ((far_S64 > 1).sum(1) <= 1).all()  # one value of a real image, and others by a level
    assert (far_S64 == 1).double().mean() > 0.1
    ends_64 = (x_NCHW == levels_V[0]) | (x_NCHW == levels_V[-1])
    assert (far_S64 * ends_64.flatten(1)[nearest_S] > 0).sum(1).max() <= 1
    assert not torch.equal(again.take(3), Unseen(x_NCHW, levels_V).take(3))  # each begins elsewhere


def test_a_measurement_has_ordered_percentiles_and_names_its_device(
    few: None, classifier: nn.Module, kinds: dict[Images, Tensor]
) -> None:
    found = taken(made(PuVAE, conv_maps=8, decoder_maps=8, dense=64, latent=2), classifier, kinds)
    assert 0 < found.single_ms_p50 <= found.ms_p50 <= found.ms_p95
    assert found.device.endswith(f", {torch.get_num_threads()} thread(s)")
    assert found.images in ("clean", "attacked") and found.repeats == 7


def test_a_measurement_is_repeated_while_the_reference_drifts(
    few: None, classifier: nn.Module, kinds: dict[Images, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    series = iter([[1.0], [2.0], [1.0], [1.1]])
    monkeypatch.setattr(latency, "_times", lambda work, device: next(series))
    found = taken(made(Identity), classifier, kinds)
    assert found.drift == pytest.approx(0.1) and not list(series)


def test_a_slow_model_is_repeated_three_times_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "PATIENCE_S", 0.0)
    assert len(latency._times(lambda: time.sleep(0.01), CPU)) == 3


def test_the_times_of_a_sleep_are_its_length() -> None:
    times = latency._times(lambda: time.sleep(0.01), CPU)
    assert len(times) == latency.REPEATS
    assert 10 <= sorted(times)[len(times) // 2] < 20
