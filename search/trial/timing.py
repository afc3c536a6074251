"""One timed step of a search's work, on random images and untrained classifiers.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from attacks.black_box import BlackBoxAttacker
from defenses.base import Batches, Defended, Defense, Tensors, halved
from search.classifiers import training
from search.data import splits
from search.data.guard import closed
from search.data.splits import HELD_OUT
from search.trial.evaluator import Evaluator
from search.trial.latency import BATCH, PATIENCE_S, REPEATS, WARM_UP, asked, device_name
from search.trial.runner import TrialRunner
from spaces.space import Params

STEPS = 8
"""Number of training batches that are run, the first of them as a warm-up."""
FEW = 32
"""Number of images that are attacked."""


@dataclass(frozen=True)
class Training:
    """Seconds of one training: in each epoch, once for each fit, and once for all fits that share the tensors made."""

    epoch: float
    fit: float
    shared: float


class Step:
    """Times the parts of a trial; their durations scale with images and epochs."""

    def __init__(self, runner: TrialRunner) -> None:
        self.runner = runner
        self.resolved, self.study = runner.assets.resolved, runner.study
        if runner.assets.device.type == "cpu":
            torch.set_num_threads(max(1, int(self.study.cpus_per_trial)))  # as Ray sets it for its workers
        self.device = device_name(runner.assets.device)
        space = self.resolved.space
        self.usual: Params = space.setting(space.usual_of)
        with closed("built"):
            self.defense = self._built()
        self.epochs = int(self.defense.train_knobs.epochs)
        self.images = self.study.train_images or splits.sizes(self.resolved.task.dataset, self.study.data_dir).train
        self.target = self._network(self.resolved.protected)

    def _built(self) -> Defense:
        defense = self.resolved.defense(self.usual.train, self.usual.inference, self.resolved.task.shape)
        if type(defense).adopt is not Defense.adopt:
            defense.adopt(self._network(self.resolved.task.classifier))
        return defense.to(self.runner.assets.device)

    @closed("timed")
    def training(self) -> Training:
        """Time the steps of one short epoch."""
        size = self.defense.train_knobs.batch_size
        x_NCHW, y_N = self._random(min(self.images, STEPS * size))
        whole, ticks, made = self.images / len(y_N), list[float](), 0.0

        def once(words: str, make: Callable[[], Tensors]) -> Tensors:
            nonlocal made
            begin = self._now()
            tensors = halved(make())
            made += self._now() - begin
            return tensors

        networks = nn.ModuleList([self._network(name) for name in self.runner.assets.consulted(self.defense)])
        batches = Batches(x_NCHW, y_N, epochs=1, batch_size=size, boundary=lambda: ticks.append(self._now()), once=once)
        begin = self._now()
        trained = self.runner.assets.networks(self.defense, networks)
        fit = trained.epochs(self.defense.fit(batches, networks if self.defense.bases() else networks[0]))
        next(fit)
        epoch = self._now()
        for _ in fit:
            pass
        rest = self._now() - epoch
        warm = min(1, len(ticks) - 1)
        each = (epoch - ticks[warm]) / (len(ticks) - warm) * len(ticks)
        return Training(whole * each, max(0.0, ticks[0] - begin - made) + whole * rest, whole * made)

    @closed("timed")
    def scoring(self) -> tuple[float, float]:
        """Return the seconds of an evaluation at one setting, and those of a quick score."""
        defended = Defended(self.defense.at(self.usual.inference), self.target).eval().requires_grad_(False)
        shape, (x_NCHW, _) = self.resolved.task.shape, self._random(min(FEW, self.resolved.eval_images))
        with torch.no_grad():
            y_N = defended(x_NCHW).argmax(1)
        # A white-box attack skips images that have fallen: all but a quarter, in the searches used to calibrate this.
        y_N = torch.where(torch.arange(len(y_N), device=y_N.device) % 4 == 0, y_N, (y_N + 1) % shape.classes)
        suite, threat, seed = self.resolved.suite, self.resolved.threat, self.study.seed
        blind = {attack.name: x_NCHW for attack in suite.with_rungs().oblivious}
        evaluator = Evaluator(suite, replace(threat, knowledge="white-box"), x_NCHW, y_N, blind, seed)
        observe_s, whole_s = (
            self._timed(lambda: evaluator.observe(defended)),
            self._timed(lambda: evaluator.probe(defended)),
        )
        rung_s = self._timed(lambda: evaluator.cheap(defended, len(y_N)))
        rung_s *= min(self.study.cheap_images, self.resolved.eval_images) / len(y_N)
        fixed_s = max(0.0, whole_s - observe_s)  # the gates use the same number of images in every study
        if threat.knowledge == "black-box":
            held_out, _ = self._random(HELD_OUT)
            attacker = BlackBoxAttacker(
                held_out, lambda: self._network(self.resolved.substitute).train().requires_grad_(True)
            )
            fixed_s += self._timed(lambda: attacker.craft(suite, defended, x_NCHW, y_N, threat, seed))
        return fixed_s + observe_s * self.resolved.eval_images / len(y_N), rung_s

    @closed("timed")
    @torch.no_grad()
    def latency(self) -> float:
        """Return the seconds of one latency measurement: clean and attacked images, in batches and one by one."""
        target = Defended(self.defense, self.target).eval()
        user, seconds = asked(target), 0.0
        for count in (BATCH, 1):
            x_NCHW, _ = self._random(count)
            user(x_NCHW)
            turn_s = self._timed(partial(self.target, x_NCHW)) + self._timed(partial(user, x_NCHW))
            seconds += min(PATIENCE_S, (WARM_UP + REPEATS) * 2 * turn_s)
        return seconds

    def classifier(self) -> float:
        """Return the seconds of training one classifier."""
        x_NCHW, y_N = self._random(min(self.images, STEPS * 128))
        network = self.resolved.task.build(self.resolved.protected).to(self.runner.assets.device)
        with self.runner.assets.networks(network).training():
            training.train(network, x_NCHW[:128], y_N[:128], 1, 0)
            short_s = self._timed(lambda: training.train(network, x_NCHW, y_N, 1, 0))
        return short_s * self.images / len(y_N) * self.study.classifier_epochs

    def _network(self, architecture: str) -> nn.Module:
        return self.resolved.task.build(architecture).to(self.runner.assets.device).eval().requires_grad_(False)

    def _random(self, images: int) -> tuple[Tensor, Tensor]:
        shape, device = self.resolved.task.shape, self.runner.assets.device
        x_NCHW = torch.rand(images, shape.channels, shape.height, shape.width, device=device)
        return x_NCHW, torch.randint(shape.classes, (images,), device=device)

    def _timed(self, work: Callable[[], object]) -> float:
        begin = self._now()
        work()
        return self._now() - begin

    def _now(self) -> float:
        if self.runner.assets.device.type == "cuda":
            torch.cuda.synchronize(self.runner.assets.device)
        return time.perf_counter()
