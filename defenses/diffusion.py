"""Diffusion purification: adds noise to an image by the forward process and removes it by the learned reverse.

Source: training and DDPM: Ho et al., Denoising Diffusion Probabilistic Models, 2020; DDIM: Song et al., Denoising
Diffusion Implicit Models, 2021; cosine schedule: Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic
Models, 2021; purification: Nie et al., Diffusion Models for Adversarial Purification (DiffPure), 2022; guidance: Wang
et al., Guided Diffusion Model for Adversarial Purification (GDMP), 2022; surrogate: Lee and Kim, Robust Evaluation of
Diffusion-Based Adversarial Purification, 2023.
Shapes: N images, C channels, H x W pixels, K classes, V votes, D noise draws of an image. The network sees images in
[-1, 1]; everything outside it lies in [0, 1]. Times are integers: 0 is the image, T is noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul
from typing import Any, cast

import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from attacks.gradient_view import BATCH, Gradient
from defenses.base import Batches, Defense, Knobs, Metrics
from defenses.layers.unet import TimeUNet
from spaces.space import knob

T = 1000
"""Number of noise levels."""
MOST_NOISE = 2**27
"""Most values of noise drawn at once, 512 MB of float32."""
IMAGES_KEPT = 4
"""Images that a gradient keeps of each step of an image, its input and noise among them; measured."""
SURROGATE_STEPS = 5
"""Most steps of the surrogate, as in the code of Lee and Kim."""
SLOPE = 0.1
"""Gradient of the surrogate outside [0, 1], where a clip has none."""
LONGEST_GRADIENT = 1.0
"""Norm to which gradients of the training are clipped, as in the code of Ho et al."""


@dataclass(frozen=True)
class Train(Knobs):
    schedule: str = knob("linear", CategoricalDistribution(("linear", "cosine")), "noise levels: Ho 2020, Nichol 2021")
    maps: int = knob(16, IntDistribution(4, 512), "maps of the U-Net's first level, twice in the others", latency=True)
    levels: int = knob(3, IntDistribution(1, 7), "levels of the U-Net, each of half the side", latency=True)
    blocks: int = knob(1, IntDistribution(1, 8), "residual blocks of a level, and one more going up", latency=True)
    attention: int = knob(
        7, IntDistribution(0, 64), "largest side of maps with self-attention; 16 in Ho et al.; 0: none", latency=True
    )
    embedding: int = knob(64, IntDistribution(2, 4096), "dimensions of the embedded time", latency=True)
    dropout: float = knob(0.0, FloatDistribution(0.0, 0.9), "dropout in the residual blocks; 0.1 in Ho et al.")
    ema: float = knob(0.999, FloatDistribution(0.0, 0.99999), "decay of the weights' moving average, which is used")
    learning_rate: float = knob(1e-3, FloatDistribution(1e-5, 1e-1, log=True), "Adam's; 2e-4 in Ho et al.")
    batch_size: int = knob(64, IntDistribution(1, 4096), "images a step; 128 in Ho et al.")
    epochs: int = knob(5, IntDistribution(1, 10_000), "passes over the training images")


@dataclass(frozen=True)
class Inference(Knobs):
    t_star: float = knob(
        0.3, FloatDistribution(0.0, 1.0), "noise level as a share of T; 0 leaves images as they are", latency=True
    )
    steps: int = knob(5, IntDistribution(1, T), "S, denoising steps; at most t_star T", latency=True)
    sampler: str = knob("ddpm", CategoricalDistribution(("ddpm", "ddim")), "reverse process; ddpm: eta is 1")
    eta: float = knob(0.0, FloatDistribution(0.0, 1.0), "noise of DDIM's steps, Eq. 16", given={"sampler": ("ddim",)})
    votes: int = knob(1, IntDistribution(1, 100), "purified versions whose predictions are averaged", latency=True)
    guidance: float = knob(
        0.0, FloatDistribution(0.0, 1e4), "GDMP's scale of the pull to the noised input; 0: none", latency=True
    )


class Diffusion(Defense):
    """Purify by adding noise and denoising with a diffusion model of the clean images."""

    Train = Train
    Inference = Inference

    @property
    def stochastic(self) -> bool:
        return self.times()[0] > 0

    @property
    def candidates_each(self) -> int:
        return int(self.inference_knobs.votes) if self.stochastic else 1

    @property
    def gradients(self) -> tuple[Gradient, ...]:
        steps = len(self.times()) - 1
        return ("exact", *(("surrogate",) if steps > SURROGATE_STEPS else ()), "bpda") if steps else ("exact",)

    @property
    def eta(self) -> float:
        """Noise of a step as a share of DDPM's."""
        return 1.0 if self.inference_knobs.sampler == "ddpm" else float(self.inference_knobs.eta)

    def build(self) -> None:
        k, s = self.train_knobs, self.shape
        TimeUNet.check(k.levels, s.height, s.width)
        self.network = TimeUNet(
            s.channels,
            min(s.height, s.width),
            maps=k.maps,
            levels=k.levels,
            blocks=k.blocks,
            attention=k.attention,
            embedding=k.embedding,
            dropout=k.dropout,
        )
        self.alpha_bar = alpha_bars(k.schedule)

    def memory(self, images: int) -> Mapping[str, int]:
        """Return what is kept of all steps, and what the network takes in the one that is computed again."""
        s, rows, steps = self.shape, images * self.candidates_each, len(self.times()) - 1
        x_NCHW = next(self.parameters()).new_zeros((1, s.channels, s.height, s.width))
        kept = rows * steps * IMAGES_KEPT * x_NCHW.nbytes
        return {"steps": kept, "maps": min(rows, BATCH) * self.network.graph_bytes(x_NCHW)} if steps else {}

    # Training: Algorithm 1 of Ho et al.

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        """Train the U-Net to predict the noise, Eq. 14; neither the classifier nor the labels are used."""
        k, device = self.train_knobs, batches.x_NCHW.device
        adam = torch.optim.Adam(self.parameters(), lr=k.learning_rate, fused=True)
        average = Average(self.network, k.ema)
        self.track(adam=adam, average=average)
        alpha_bar_T = torch.tensor(self.alpha_bar, device=device)
        for epoch in batches:
            average.exchange()
            self.train()
            total, images = torch.zeros((), device=device), 0
            for x_NCHW, _ in epoch:
                t_N = torch.randint(1, T + 1, (len(x_NCHW),), device=device)
                noise_NCHW = torch.randn_like(x_NCHW)
                alpha_N111 = alpha_bar_T[t_N, None, None, None]
                noisy_NCHW = alpha_N111.sqrt() * (2 * x_NCHW - 1) + (1 - alpha_N111).sqrt() * noise_NCHW
                loss = F.mse_loss(self.network(noisy_NCHW, t_N), noise_NCHW)
                adam.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters(), LONGEST_GRADIENT)
                adam.step()
                average.update()
                total += loss.detach() * len(x_NCHW)
                images += len(x_NCHW)
            average.exchange()
            yield {"loss": float(total / images)}

    def remarks(self, x_NCHW: Tensor, y_N: Tensor) -> tuple[str, ...]:
        """Return what memory the gradient of an attack takes."""
        parts = self.memory(BATCH)
        words = f"{BATCH} images x {self.candidates_each} votes through {len(self.times()) - 1} steps"
        return (f"an attack's gradient takes {sum(parts.values()) / 2**20:,.0f} MiB ({words})",) if parts else ()

    # Inference.

    def times(self, most: int = T) -> list[int]:
        """Return the S + 1 times from t* to 0, for at most `most` steps; only 0 if t* is 0."""
        t_star = round(self.inference_knobs.t_star * T)
        steps = min(self.inference_knobs.steps, t_star, most)
        return [t_star * left // steps for left in range(steps, -1, -1)] if steps else [0]

    def purify(self, x_NCHW: Tensor) -> Tensor:
        """Return the images after the forward process to t* and S steps of the reverse one; the input if t* is 0."""
        return self._purified(x_NCHW, self.times())

    def surrogate(self, x_NCHW: Tensor) -> Tensor:
        """Return purified images from few steps, with a gradient for clipped values too.

        Source: Lee and Kim's surrogate process; the gradient outside the range is ours.
        """
        return self._purified(x_NCHW, self.times(SURROGATE_STEPS), SLOPE)

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        """Return logits_NK: with several votes the logarithm of the mean of their probabilities."""
        if (votes := self.candidates_each) == 1:
            return classifier(self.purify(x_NCHW))
        logits = classifier(self.purify(x_NCHW.repeat_interleave(votes, dim=0)))
        log_p_NVK = F.log_softmax(logits, dim=1).unflatten(0, (-1, votes))
        return log_p_NVK.logsumexp(dim=1) - math.log(votes)

    def step(self, x_NCHW: Tensor, t: int, s: int, noise_NCHW: Tensor | None = None, slope: float = 0.0) -> Tensor:
        """Return x_s from x_t by one step of DDIM, of which DDPM is the case eta = 1.

        As in the code of Ho et al. the predicted image is clipped, and the predicted noise follows from it. Source: Eq.
        12 and 16 of Song et al.; with eta = 1 and s = t - 1 they are Eq. 6 and 7 of Ho et al.

        Args:
            noise_NCHW: standard normal noise; None: zero.
            slope: gradient for predicted values outside the range.
        """
        alpha_t, alpha_s = self.alpha_bar[t], self.alpha_bar[s]
        t_N = x_NCHW.new_full((len(x_NCHW),), t, dtype=torch.int64)
        raw_NCHW = (x_NCHW - math.sqrt(1 - alpha_t) * self.network(x_NCHW, t_N)) / math.sqrt(alpha_t)
        image_NCHW = clipped(raw_NCHW, slope)
        epsilon_NCHW = (x_NCHW - math.sqrt(alpha_t) * image_NCHW) / math.sqrt(1 - alpha_t)
        variance = self.eta**2 * (1 - alpha_s) / (1 - alpha_t) * (1 - alpha_t / alpha_s)
        mean_NCHW = math.sqrt(alpha_s) * image_NCHW + math.sqrt(1 - alpha_s - variance) * epsilon_NCHW
        return mean_NCHW if noise_NCHW is None else mean_NCHW + math.sqrt(variance) * noise_NCHW

    def noised(self, x_NCHW: Tensor, t: int, noise_NCHW: Tensor) -> Tensor:
        """Return x_t for images in [-1, 1]. Source: Eq. 4 of Ho et al."""
        return math.sqrt(self.alpha_bar[t]) * x_NCHW + math.sqrt(1 - self.alpha_bar[t]) * noise_NCHW

    def _purified(self, x_NCHW: Tensor, times: list[int], slope: float = 0.0) -> Tensor:
        if times[0] == 0:
            return x_NCHW
        # The start's noise, the steps', the pulls'; drawn image by image, so that the batch size changes nothing.
        k, steps = self.inference_knobs, len(times) - 1
        draws = 1 + (steps - 1) * (self.eta > 0) + steps * (k.guidance > 0)
        size = max(1, min(BATCH, MOST_NOISE // (draws * x_NCHW[0].numel())))
        return torch.cat([self._denoised(x, times, slope, _noise(x, draws)) for x in x_NCHW.split(size)])

    def _denoised(self, x_NCHW: Tensor, times: list[int], slope: float, noise_NDCHW: Tensor) -> Tensor:
        """Return purified images; under a gradient each step is computed again in the backward pass, not stored."""
        guidance, plain = self.inference_knobs.guidance, not (x_NCHW.requires_grad and torch.is_grad_enabled())
        draws = iter(noise_NDCHW.unbind(dim=1))
        image_NCHW = 2 * x_NCHW - 1
        x_t = self.noised(image_NCHW, times[0], next(draws))
        for t, s in pairwise(times):
            step = (x_t, t, s, next(draws) if s and self.eta else None, slope)
            x_s = self.step(*step) if plain else _again(self.step, *step)
            if guidance:
                x_s = x_s + self.pull(t, s) * (self.noised(image_NCHW, t, next(draws)) - x_t)
            x_t = x_s
        return (clipped(x_t, slope) + 1) / 2

    def pull(self, t: int, s: int) -> float:
        """Return the share of the way to the noised input that GDMP's guidance moves an image in a step, at most 1.

        Source: the authors' code, with the mean squared error as its distance: there the variance beta_t scales the
        pull, and on CIFAR-10 `guidance` is 19. The bound is ours: with few steps it would go too far.
        """
        alpha_t, alpha_s = self.alpha_bar[t], self.alpha_bar[s]
        scale = self.inference_knobs.guidance * math.sqrt((1 - alpha_t) / alpha_t)
        return min(1.0, scale * (1 - alpha_t / alpha_s))


class Average:
    """The moving average of a network's weights, which takes their place between epochs.

    Source: as in the code of Ho et al.; the decay begins lower, as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay, self.updates = network, decay, 0
        self.others = [weight.detach().clone() for weight in network.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network's present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.others, list(self.network.parameters()), 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange the network's weights and their average."""
        for weight, other in zip(self.network.parameters(), self.others, strict=True):
            kept = weight.clone()
            weight.copy_(other)
            other.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "others": self.others}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates, self.others = state["updates"], [other.clone() for other in state["others"]]


def alpha_bars(schedule: str) -> list[float]:
    """Return alpha_bar at each time from 0 to T. Source: Ho et al., section 4; Nichol and Dhariwal, Eq. 17."""
    if schedule == "linear":
        betas = [1e-4 + (0.02 - 1e-4) * t / (T - 1) for t in range(T)]
    else:
        f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in pairwise(f)]
    return list(accumulate((1 - beta for beta in betas), mul, initial=1.0))


def clipped(x_NCHW: Tensor, slope: float) -> Tensor:
    """Return the values clipped to [-1, 1], with a gradient of `slope` outside."""
    inside_NCHW = x_NCHW.clamp(-1, 1)
    if slope == 0:
        return inside_NCHW
    outside_NCHW = x_NCHW - inside_NCHW
    return inside_NCHW + slope * (outside_NCHW - outside_NCHW.detach())


def _again(step: Callable[..., Tensor], *given: Any) -> Tensor:
    """Return the result of a step, which is computed again in the backward pass; a step draws no random numbers."""
    return cast(Tensor, checkpoint(step, *given, use_reentrant=False, preserve_rng_state=False))


def _noise(x_NCHW: Tensor, draws: int) -> Tensor:
    sizes = (len(x_NCHW), draws, *x_NCHW.shape[1:])
    return torch.randn(sizes, device=x_NCHW.device, dtype=x_NCHW.dtype)
