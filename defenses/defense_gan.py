"""Defense-GAN: projects an image on the range of a generator of clean images, by gradient descent on its latent vector.

Source: Samangouei et al., Defense-GAN: Protecting Classifiers Against Adversarial Attacks Using Generative Models, ICLR
2018, as the PuVAE and Defense-VAE papers evaluate it; training: Gulrajani et al., Improved Training of Wasserstein
GANs, 2017, Algorithm 1. "The code" is kabkabm/defensegan.
Shapes: N images, C channels, H x W pixels, Z latent dimensions, R restarts, L step counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

import torch
from optuna.distributions import FloatDistribution, IntDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import Batches, Defense, Knobs, Metrics
from defenses.layers.deconvolution import Doubling
from spaces.space import knob

ROWS = 2560
"""Most latent vectors optimised at once, which bounds the memory: 128 images with 20 restarts."""

DAMPING = 0.01
"""Damping of the surrogate's Gauss-Newton step, as a fraction of the mean of J^T J's diagonal."""


@dataclass(frozen=True)
class Train(Knobs):
    latent: int = knob(128, IntDistribution(1, 1024), "dimensions of z", latency=True)
    maps: int = knob(64, IntDistribution(1, 512), "maps of the narrowest hidden layers", latency=True)
    lambda_gp: float = knob(10.0, FloatDistribution(1e-2, 1e3, log=True), "weight of the gradient penalty, Alg. 1")
    critic_steps: int = knob(5, IntDistribution(1, 50), "critic steps a generator step, Alg. 1")
    learning_rate: float = knob(1e-4, FloatDistribution(1e-6, 1e-1, log=True), "Adam's, of both networks")
    beta_1: float = knob(0.5, FloatDistribution(0.0, 0.99), "Adam's; 0 in Alg. 1, 0.5 in the code; beta_2 is 0.9")
    batch_size: int = knob(50, IntDistribution(1, 4096), "images a critic step")
    epochs: int = knob(926, IntDistribution(1, 10_000), "passes over the images: 200,000 x 5 x 50 over MNIST's 54,000")


@dataclass(frozen=True)
class Inference(Knobs):
    steps: int = knob(200, IntDistribution(1, 10_000), "L, steps of descent on z", latency=True)
    restarts: int = knob(10, IntDistribution(1, 1000), "R, random starts of each image", latency=True)
    rate: float = knob(10.0, FloatDistribution(1e-3, 1e4, log=True), "learning rate, on an image's mean squared error")
    momentum: float = knob(0.7, FloatDistribution(0.0, 0.999), "momentum of the descent")
    spread: float = knob(
        1.0, FloatDistribution(1e-3, 10.0, log=True), "std of the starts: 1 as in training, 1 / sqrt(Z) in the code"
    )


class DefenseGAN(Defense):
    """Purify by the nearest image found in the generator's range."""

    Train = Train
    Inference = Inference
    differentiable = False

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def descends(self) -> str | None:
        return "steps"

    @property
    def candidates_each(self) -> int:
        return int(self.inference_knobs.restarts)

    def build(self) -> None:
        """Build the generator: a dense layer to 4 x 4, then transposed convolutions that double it. Source: the code.

        The sizes are 4, 8 cropped to 7, 14, 28, or 4, 8, 16, 32. Larger images get further layers of `maps`, like the
        code's generator for 64 pixels; smaller ones start below 4 x 4.
        """
        k, s = self.train_knobs, self.shape
        doublings = max(3, math.ceil(math.log2(max(s.height, s.width) / 4)))
        self.sizes = [(-(-s.height // 2**i), -(-s.width // 2**i)) for i in range(doublings, -1, -1)]
        self.widths = [4 * k.maps, 2 * k.maps, *[k.maps] * (doublings - 2), s.channels]
        self.dense = nn.Linear(k.latent, self.widths[0] * math.prod(self.sizes[0]))
        self.deconvolutions = nn.ModuleList(
            Doubling(narrow, wide, kernel=5, padding=2) for narrow, wide in pairwise(self.widths)
        )
        _initialise(self)

    def generate(self, z_NZ: Tensor) -> Tensor:
        """Return G(z), x_NCHW."""
        # Channels last, as in the code, makes the descent 1.6 times as fast (CPU, 16 and 64 maps).
        maps = self.dense(z_NZ).unflatten(1, (*self.sizes[0], -1)).movedim(-1, 1)
        for deconvolution, (height, width) in zip(self.deconvolutions, self.sizes[1:], strict=True):
            maps = deconvolution(F.relu(maps))[:, :, :height, :width]
        return maps.sigmoid()

    # Training: WGAN-GP, Algorithm 1.

    def critic(self, seed: int) -> nn.Module:
        """Return a critic D that mirrors the generator, its initial weights drawn only from `seed`."""
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(reversed(self.widths)):
            layers += [nn.Conv2d(inputs, outputs, 5, stride=2, padding=2), nn.LeakyReLU(0.2)]
        network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(self.dense.out_features, 1), nn.Flatten(0))
        _initialise(network, torch.Generator().manual_seed(seed))
        return network

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        """Train generator and critic on the clean images; the classifier is not used.

        Every batch is a critic step, and every fifth one (`critic_steps`), counted over all epochs, is followed by a
        generator step. As in the code, each of 200,000 iterations is a generator step and five critic batches of 50.
        """
        k, betas = self.train_knobs, (self.train_knobs.beta_1, 0.9)
        critic = self.critic(batches.seed).to(batches.x_NCHW.device)
        adam_g = torch.optim.Adam(self.parameters(), lr=k.learning_rate, betas=betas, fused=True)
        adam_d = torch.optim.Adam(critic.parameters(), lr=k.learning_rate, betas=betas, fused=True)
        self.track(critic=critic, adam_g=adam_g, adam_d=adam_d)
        # The step count of a resumed fit follows from the epoch and needs no stored state.
        steps = count(1 + batches.start * math.ceil(len(batches.x_NCHW) / batches.batch_size))
        for epoch in batches:
            self.train()
            sums_3 = torch.zeros(3, device=batches.x_NCHW.device)
            for x_NCHW, _ in epoch:
                real, fake, penalty = self.losses(critic, x_NCHW)
                adam_d.zero_grad(set_to_none=True)
                (fake - real + k.lambda_gp * penalty).backward()
                adam_d.step()
                if next(steps) % k.critic_steps == 0:
                    adam_g.zero_grad(set_to_none=True)
                    loss = -critic(self.generate(self._noise(x_NCHW))).mean()
                    loss.backward(inputs=list(self.parameters()))
                    adam_g.step()
                sums_3 += torch.stack((real, fake, penalty)).detach() * len(x_NCHW)
            real_mean, fake_mean, gp = (sums_3 / len(batches.x_NCHW)).tolist()
            yield {
                "critic": fake_mean - real_mean + k.lambda_gp * gp,
                "generator": -fake_mean,  # on the critic's batches: an epoch may have no generator step
                "penalty": gp,
                "wasserstein": real_mean - fake_mean,
            }

    def losses(self, critic: nn.Module, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the means of D(x) and D(G(z)), and the gradient penalty, for the critic. Source: Alg. 1.

        As in the paper, the gradient's norm is over the whole image; in the code it is over one axis only.
        """
        with torch.no_grad():
            fake_NCHW = self.generate(self._noise(x_NCHW))
        real_N, fake_N = critic(torch.cat((x_NCHW, fake_NCHW))).chunk(2)
        alpha_N111 = torch.rand(len(x_NCHW), 1, 1, 1, device=x_NCHW.device, dtype=x_NCHW.dtype)
        between_NCHW = torch.lerp(x_NCHW, fake_NCHW, alpha_N111).requires_grad_()
        (slope_NCHW,) = torch.autograd.grad(critic(between_NCHW).sum(), between_NCHW, create_graph=True)
        return real_N.mean(), fake_N.mean(), (slope_NCHW.flatten(1).norm(dim=1) - 1).pow(2).mean()

    def _noise(self, x_NCHW: Tensor, *each: int) -> Tensor:
        """Return latent vectors from N(0, I) for each image: one, or an array of shape `each`."""
        sizes = (len(x_NCHW), *each, self.train_knobs.latent)
        return torch.randn(sizes, device=x_NCHW.device, dtype=x_NCHW.dtype)

    # Inference: gradient descent on z.

    def errors(self, x_NCHW: Tensor, z_NRZ: Tensor) -> Tensor:
        """Return the mean squared error of G(z) to the image for each of its latent vectors, NR."""
        made_NRCHW = self.generate(z_NRZ.flatten(0, 1)).unflatten(0, z_NRZ.shape[:2])
        return (made_NRCHW - x_NCHW[:, None]).pow(2).flatten(2).mean(2)

    @torch.no_grad()
    def latents(self, x_NCHW: Tensor, at: Sequence[int]) -> Tensor:
        """Return the best latent vector of each image after each number of steps in `at`, z_LNZ.

        Best means the lowest error over all restarts and all steps so far; the code takes the best restart of the last
        step. Steps do not depend on L: the code means to divide the rate by ten after 0.8 L steps, but never counts.
        """
        k, images = self.inference_knobs, max(1, ROWS // self.inference_knobs.restarts)
        start_NRZ = k.spread * self._noise(x_NCHW, k.restarts)
        chunks = zip(x_NCHW.detach().split(images), start_NRZ.split(images), strict=True)
        return torch.cat([self._descend(x, z, at) for x, z in chunks], dim=1)

    def _descend(self, x_NCHW: Tensor, z_NRZ: Tensor, at: Sequence[int]) -> Tensor:
        k, images_N, last = self.inference_knobs, torch.arange(len(x_NCHW), device=x_NCHW.device), max(at)
        velocity_NRZ, best_NRZ, best_NR = torch.zeros_like(z_NRZ), z_NRZ, torch.full_like(z_NRZ[..., 0], torch.inf)
        found: dict[int, Tensor] = {}
        for step in range(last + 1):
            with torch.enable_grad():
                z_NRZ = z_NRZ.detach().requires_grad_()
                error_NR = self.errors(x_NCHW, z_NRZ)
            better_NR = error_NR < best_NR
            best_NR = torch.where(better_NR, error_NR, best_NR)
            best_NRZ = torch.where(better_NR[..., None], z_NRZ, best_NRZ)
            if step in at:
                found[step] = best_NRZ[images_N, best_NR.argmin(dim=1)]
            if step < last:
                # Each error depends only on its own z, so that images are independent.
                (slope_NRZ,) = torch.autograd.grad(error_NR, z_NRZ, torch.ones_like(error_NR))
                velocity_NRZ = k.momentum * velocity_NRZ + slope_NRZ
                z_NRZ = z_NRZ - k.rate * velocity_NRZ
        return torch.stack([found[step] for step in at])

    def latent(self, x_NCHW: Tensor) -> Tensor:
        """Return z* of the projection, NZ; no gradient flows through the descent."""
        return self.latents(x_NCHW, [self.inference_knobs.steps])[0]

    @torch.no_grad()
    def trajectory(self, x_NCHW: Tensor, at: Sequence[int]) -> Tensor:
        """Return the output of `purify` after each number of steps in `at`, x_LNCHW, from one descent.

        Args:
            at: numbers of steps, 0 for the best random start; they may exceed the knob `steps`.
        """
        return torch.stack([self.generate(z_NZ) for z_NZ in self.latents(x_NCHW, at)])

    def purify(self, x_NCHW: Tensor) -> Tensor:
        """Return the projection on the generator's range: G(z) of the lowest error over R descents of L steps."""
        return self.trajectory(x_NCHW, [self.inference_knobs.steps])[0]

    def surrogate(self, x_NCHW: Tensor) -> Tensor:
        """Return the projection with the gradient of an exact one, along the tangent of the generator's range.

        The value is G(z*), as in `purify`. With J = dG/dz at z*, the derivative is J (J^T J + damping)^-1 J^T: that of
        one Gauss-Newton step from z*. The derivative of a gradient step, J J^T, favours directions in which G is steep.
        """
        (z_NZ,) = self.latents(x_NCHW, [self.inference_knobs.steps])
        gram_NZZ = torch.func.vmap(self._gram, chunk_size=max(1, ROWS // self.train_knobs.latent))(z_NZ).detach()
        with torch.enable_grad():
            half = (self.generate(z_NZ.requires_grad_()) - x_NCHW).square().sum() / 2
            (slope_NZ,) = torch.autograd.grad(half, z_NZ, create_graph=True)  # J^T (G(z) - x)
        return self.generate(z_NZ.detach() - torch.linalg.solve(gram_NZZ, slope_NZ - slope_NZ.detach()))

    def _gram(self, z_Z: Tensor) -> Tensor:
        """Return J^T J + damping of one image, ZZ."""
        j_PZ = torch.func.jacfwd(lambda z: self.generate(z[None]).flatten())(z_Z)
        gram_ZZ = j_PZ.T @ j_PZ
        damping = DAMPING * gram_ZZ.diagonal().mean() + 1e-12  # a flat G has no tangent
        return gram_ZZ + damping * torch.eye(len(z_Z), dtype=z_Z.dtype, device=z_Z.device)


def _initialise(network: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw weights by Glorot's rule, with sqrt(2) times the range for convolutions; zero biases. Source: the code."""
    for part in network.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            # A stride of 2 divides the fan of the larger maps' pixels by 4: fan-in going up, fan-out going down.
            outer, inner = part.weight.shape[:2]
            fans = 2 * (inner + outer) if isinstance(part, nn.Linear) else 25 * (inner + outer / 4)
            nn.init.uniform_(part.weight, -math.sqrt(12 / fans), math.sqrt(12 / fans), generator=generator)
            assert part.bias is not None
            nn.init.zeros_(part.bias)
