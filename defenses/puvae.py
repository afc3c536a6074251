"""PuVAE: a conditional VAE that projects an image on the manifold of each class and keeps the closest projection.

Source: Hwang et al., PuVAE: A Variational Autoencoder to Purify Adversarial Examples, IEEE Access 7, 2019, section IV.
Shapes: N images, C channels, H x W pixels, K classes, L latent dimensions, D dense units, F flattened features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import Batches, Defense, Knobs, Metrics
from defenses.layers.deconvolution import Doubling
from defenses.layers.posterior import collapse
from spaces.space import knob

SOFT_CHOICE = 0.01
"""Temperature of the surrogate's class choice, in RMSE of pixel units: about the gap between neighbouring classes."""


@dataclass(frozen=True)
class Train(Knobs):
    lambda_rc: float = knob(0.01, FloatDistribution(1e-4, 1e4, log=True), "weight of the reconstruction, Eq. 19")
    lambda_kl: float = knob(0.1, FloatDistribution(1e-4, 1e4, log=True), "weight of the KL divergence, Eq. 19")
    lambda_ce: float = knob(10.0, FloatDistribution(1e-4, 1e4, log=True), "weight of M_s's cross-entropy, Eq. 19")
    conv_maps: int = knob(32, IntDistribution(1, 256), "maps of the dilated convolutions, Table 2", latency=True)
    decoder_maps: int = knob(32, IntDistribution(1, 256), "maps of the decoder, Table 2", latency=True)
    dense: int = knob(1024, IntDistribution(8, 4096), "units of the two dense layers, Table 2", latency=True)
    latent: int = knob(32, IntDistribution(1, 512), "latent dimensions, section V", latency=True)
    label_injection: str = knob(
        "dense",
        CategoricalDistribution(("dense", "planes")),
        "where the label enters the encoder (inferred): beside the features, or as planes beside the image",
        latency=True,
    )
    reduction: str = knob(
        "sum",
        CategoricalDistribution(("sum", "mean")),
        "each loss over the dimensions (inferred); batch: mean",
    )
    kl_warmup: float = knob(
        0.0,
        FloatDistribution(0.0, 1.0),
        "share of the steps in which lambda_kl rises from 0; not in the paper (Bowman et al., 2016)",
    )
    free_nats: float = knob(
        0.0,
        FloatDistribution(0.0, 100.0),
        "nats of each latent dimension that L_KL leaves alone; not in the paper (Kingma et al., 2016, Eq. 15)",
    )
    learning_rate: float = knob(1e-3, FloatDistribution(1e-5, 1e-1, log=True), "Adam's (the paper does not say)")
    batch_size: int = knob(128, IntDistribution(1, 4096), "images a step (the paper does not say)")
    epochs: int = knob(20, IntDistribution(1, 1000), "passes over the training images (the paper does not say)")


@dataclass(frozen=True)
class Inference(Knobs):
    sigma_eps: float = knob(0.1, FloatDistribution(0.0, 1000.0), "magnitude of the latent noise, Eq. 13")


class PuVAE(Defense):
    """Purify by the candidate of the class whose projection is nearest to the input."""

    Train: ClassVar[type[Knobs]] = Train
    Inference: ClassVar[type[Knobs]] = Inference
    consults: ClassVar[Literal["target", "partner"]] = "partner"

    @property
    def stochastic(self) -> bool:
        return self.inference_knobs.sigma_eps > 0

    @property
    def candidates_each(self) -> int:
        return self.shape.classes

    def build(self) -> None:
        k, s = self.train_knobs, self.shape
        self.planes = k.label_injection == "planes"
        inputs = s.channels + (s.classes if self.planes else 0)
        self.trunk = nn.Sequential(
            *_dilated(inputs, k.conv_maps),
            *_dilated(k.conv_maps, k.conv_maps),
            *_dilated(k.conv_maps, k.conv_maps),
        )
        self.features = k.conv_maps * s.height * s.width
        self.dense_1 = nn.Linear(self.features + (0 if self.planes else s.classes), k.dense)
        self.dense_2 = nn.Linear(k.dense, k.dense)
        self.dense_3 = nn.Linear(k.dense, 2 * k.latent)
        # Sizes of the decoder's four maps; each deconvolution doubles the size, cropped where too large: 4, 7, 14, 28.
        self.sizes = [(-(-s.height // 2**i), -(-s.width // 2**i)) for i in (3, 2, 1, 0)]
        (height, width), maps = self.sizes[0], k.decoder_maps
        self.dense_4 = nn.Linear(k.latent + s.classes, maps * height * width)
        self.deconvolutions = nn.ModuleList(
            Doubling(maps, out, kernel=7, padding=3) for out in (maps, maps, s.channels)
        )
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(part.weight)  # TensorFlow 1.12's default, which the paper used
                assert part.bias is not None
                nn.init.zeros_(part.bias)

    # Training: section IV-A.

    def encode(self, x_NCHW: Tensor, y_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu_NL and sigma_NL of the images for their one-hot labels. Source: Eq. 11."""
        if self.planes:
            planes_NKHW = y_NK[:, :, None, None].expand(-1, -1, *x_NCHW.shape[2:])
            return self._head(self.dense_1(self._features(torch.cat((x_NCHW, planes_NKHW), dim=1))))
        return self._head(self.dense_1(torch.cat((self._features(x_NCHW), y_NK), dim=1)))

    def decode(self, z_NL: Tensor, y_NK: Tensor) -> Tensor:
        """Return the logits of the image decoded from latent vectors and one-hot labels. Source: Eq. 14."""
        return self._deconvolve(self.dense_4(torch.cat((z_NL, y_NK), dim=1)))

    def losses(self, x_NCHW: Tensor, y_N: Tensor, source: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Return L_RC, L_KL of each latent dimension (L), and L_CE, averaged over the batch.

        Source: Eq. 15 to 18, with sigma_eps = 1 (section IV-A). L_CE is the element-wise binary cross-entropy; it and
        L_RC are reduced over the dimensions.
        """
        y_NK = F.one_hot(y_N, self.shape.classes).to(x_NCHW.dtype)
        mu_NL, sigma_NL = self.encode(x_NCHW, y_NK)
        logits_NCHW = self.decode(mu_NL + torch.randn_like(mu_NL) * sigma_NL, y_NK)
        log_ys_NK = F.log_softmax(source(logits_NCHW.sigmoid()), dim=1)
        rest_NK = log_ys_NK.exp().clamp(max=1 - 1e-6)  # log(1 - y_s) stays finite where y_s rounds to 1
        rc = F.binary_cross_entropy_with_logits(logits_NCHW, x_NCHW, reduction="none")
        ce = -y_NK * log_ys_NK - (1 - y_NK) * torch.log1p(-rest_NK)
        return self._reduced(rc), _divergence(mu_NL, sigma_NL).mean(dim=0), self._reduced(ce)

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        k = self.train_knobs
        adam = torch.optim.Adam(self.parameters(), lr=k.learning_rate, fused=True)
        self.track(adam=adam)
        each = -(-len(batches.x_NCHW) // k.batch_size)
        rise = k.kl_warmup * k.epochs * each
        for number, epoch in enumerate(batches, start=batches.start):
            self.train()
            sums_4, images = torch.zeros(4, device=batches.x_NCHW.device), 0
            for step, (x_NCHW, y_N) in enumerate(epoch, start=1 + number * each):
                rc, kl_L, ce = self.losses(x_NCHW, y_N, classifier)
                kl, weighed = self._reduced(kl_L[None]), self._reduced(kl_L[None].clamp(min=2 * k.free_nats))
                lambda_kl = k.lambda_kl * (min(1.0, step / rise) if rise else 1.0)
                total = k.lambda_rc * rc + lambda_kl * weighed + k.lambda_ce * ce  # Eq. 19
                adam.zero_grad(set_to_none=True)
                total.backward()
                adam.step()
                sums_4 += torch.stack((total, rc, kl, ce)).detach() * len(x_NCHW)
                images += len(x_NCHW)
            yield dict(zip(("loss", "rc", "kl", "ce"), (sums_4 / images).tolist(), strict=True))

    def remarks(self, x_NCHW: Tensor, y_N: Tensor) -> tuple[str, ...]:
        """Say if the posterior collapsed: by the KL divergence of Eq. 16, with the 1/2 that the paper leaves out."""
        y_NK = F.one_hot(y_N, self.shape.classes).to(x_NCHW.dtype)
        nats = float(_divergence(*self.encode(x_NCHW, y_NK)).sum(dim=1).mean()) / 2
        return collapse(nats, "each projection is little but a class mean")

    # Inference: section IV-B.

    def candidates(self, x_NCHW: Tensor, noise_NKL: Tensor | None = None) -> Tensor:
        """Return the projections of each image on the manifold of each class, x_NKCHW. Source: Eq. 20, 12, 13.

        Computed once per image: the convolutions, and the image's part of the first dense layer, since
        W[h; y] = W_h h + W_y y. Everything else is computed K times, as one batch.

        Args:
            noise_NKL: standard normal noise; drawn if not given and sigma_eps > 0.
        """
        images, classes = len(x_NCHW), self.shape.classes
        if self.planes:
            eye_NKK = torch.eye(classes, device=x_NCHW.device).repeat(images, 1)
            mu, sigma = self.encode(x_NCHW.repeat_interleave(classes, dim=0), eye_NKK)
        else:
            image_D, label_KD = (
                self.dense_1.weight[:, : self.features],
                self.dense_1.weight[:, self.features :].T,
            )
            once_ND = F.linear(self._features(x_NCHW), image_D, self.dense_1.bias)
            mu, sigma = self._head((once_ND[:, None] + label_KD).flatten(0, 1))
        z = mu
        if self.stochastic:
            noise = torch.randn_like(mu) if noise_NKL is None else noise_NKL.flatten(0, 1)
            z = mu + self.inference_knobs.sigma_eps * noise * sigma
        latent = self.train_knobs.latent
        dense = F.linear(z, self.dense_4.weight[:, :latent], self.dense_4.bias).unflatten(0, (images, classes))
        logits = self._deconvolve((dense + self.dense_4.weight[:, latent:].T).flatten(0, 1))
        return logits.sigmoid().unflatten(0, (images, classes))

    def purify(self, x_NCHW: Tensor) -> Tensor:
        """Return the candidate of the class with the lowest RMSE. Source: Eq. 21, 22."""
        candidates_NKCHW = self.candidates(x_NCHW)
        nearest_N = rmse(x_NCHW, candidates_NKCHW).argmin(dim=1)
        return candidates_NKCHW[torch.arange(len(x_NCHW), device=x_NCHW.device), nearest_N]

    def surrogate(self, x_NCHW: Tensor) -> Tensor:
        """Return the average of the candidates under a soft choice, which has a gradient unlike the argmin."""
        candidates_NKCHW = self.candidates(x_NCHW)
        weight_NK = F.softmax(-rmse(x_NCHW, candidates_NKCHW) / SOFT_CHOICE, dim=1)
        return (weight_NK[:, :, None, None, None] * candidates_NKCHW).sum(dim=1)

    def strain(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        """Return how much farther the label's candidate is than the nearest other one, in units of SOFT_CHOICE, N.

        Source: the distances of Eq. 21.
        """
        distance_NK, y_N1 = rmse(x_NCHW, self.candidates(x_NCHW)), y_N[:, None]
        others_NK = distance_NK.scatter(1, y_N1, torch.inf)
        return (distance_NK.gather(1, y_N1)[:, 0] - others_NK.amin(dim=1)) / SOFT_CHOICE

    def _features(self, x_NCHW: Tensor) -> Tensor:
        return self.trunk(x_NCHW).flatten(1)

    def _head(self, first_ND: Tensor) -> tuple[Tensor, Tensor]:
        both_N2L = self.dense_3(F.relu(self.dense_2(F.relu(first_ND))))
        mu_NL, raw_NL = both_N2L.chunk(2, dim=1)
        return mu_NL, F.softplus(raw_NL)  # sigma itself, not a log-variance

    def _deconvolve(self, dense: Tensor) -> Tensor:
        """Return image logits from the pre-activation of the decoder's dense layer. Source: Table 2."""
        maps = F.relu(dense).unflatten(1, (-1, *self.sizes[0])).contiguous(memory_format=torch.channels_last)
        for i, deconvolution in enumerate(self.deconvolutions):
            height, width = self.sizes[i + 1]
            maps = deconvolution(F.relu(maps) if i else maps)[:, :, :height, :width]
        return maps

    def _reduced(self, loss: Tensor) -> Tensor:
        per_image_N = loss.flatten(1)
        return (per_image_N.sum(1) if self.train_knobs.reduction == "sum" else per_image_N.mean(1)).mean()


def _divergence(mu_NL: Tensor, sigma_NL: Tensor) -> Tensor:
    """Return twice the KL divergence to the standard normal distribution in each dimension, NL. Source: Eq. 16."""
    return mu_NL**2 + sigma_NL**2 - (sigma_NL**2).clamp(min=1e-30).log() - 1


def rmse(x_NCHW: Tensor, candidates_NKCHW: Tensor) -> Tensor:
    """Return the root mean squared error of each candidate to its image, NK. Source: D of Eq. 21."""
    squared_NK = (candidates_NKCHW - x_NCHW[:, None]).pow(2).flatten(2).mean(2)
    return squared_NK.clamp(min=1e-12).sqrt()  # the root has no gradient at zero


def _dilated(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    """Return a 7 x 7 convolution of dilation 2 that keeps the size, and its ReLU. Source: Table 2."""
    return nn.Conv2d(inputs, outputs, 7, padding=6, dilation=2), nn.ReLU()
