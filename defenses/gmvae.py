"""GMVAE: a VAE with one Gaussian per class in latent space; it classifies by the nearest mean and rejects outliers.

Source: Ghosh, Losalka and Black, Resisting Adversarial Attacks Using Gaussian Mixture Variational Autoencoders, AAAI
2019. Shapes: N images, C channels, H x W pixels, K classes, L latent dimensions, 2 detector scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.special import chdtri
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.gradient_view import Opening
from defenses.base import Batches, Defense, Knobs, Metrics
from spaces.exceptions import InputError
from spaces.space import knob

THREE_SIGMA = 0.9973
"""Share of a normal variable within three sigma; section 3.4 rejects beyond the chi-square quantile at it."""
LOGIT_SCALE = 5.0
"""Logits per squared distance: at its own mean a class leads by 10. It is neither a knob nor alpha: a search over the
scale of the logits would saturate the attacker's softmax and so mask the gradient."""
RIDGE = 1e-3
"""Share of the mean variance added to a class's covariance: unused dimensions would make it singular (inferred)."""
PIXELS = 2**21
"""Most pixels decoded at once in reclassification: about 2 GB with the paper's maps."""
RECLASSIFIED = {"reclassify": (True,)}
ENC, DEC = FloatDistribution(0.0, 1e9), FloatDistribution(-10.0, 1e9)


@dataclass(frozen=True)
class Train(Knobs):
    alpha: float = knob(4.5, FloatDistribution(1e-3, 1e5, log=True), "weight of the prior, Eq. 7 (not said)")
    latent_variance: float = knob(1 / 3000, FloatDistribution(1e-8, 1.0, log=True), "of the training noise, section 4")
    variable_entropy: bool = knob(
        False, CategoricalDistribution((False, True)), "the encoder emits a factor on this variance, Fig. 5"
    )
    latent: int = knob(0, IntDistribution(0, 1024), "latent dimensions; 0: as many as classes, section 4", latency=True)
    maps: int = knob(32, IntDistribution(1, 256), "maps of the outer convolutions; the inner have twice", latency=True)
    dense: int = knob(128, IntDistribution(4, 4096), "units of the dense layers", latency=True)
    labels_per_class: int = knob(0, IntDistribution(0, 10**6), "labels seen, the first of each class; 0: all")
    learning_rate: float = knob(1e-3, FloatDistribution(1e-5, 1e-1, log=True), "Adam's (the paper does not say)")
    batch_size: int = knob(128, IntDistribution(1, 4096), "images a step (the paper does not say)")
    epochs: int = knob(50, IntDistribution(1, 1000), "passes over the training images (the paper does not say)")


@dataclass(frozen=True)
class Inference(Knobs):
    tau_enc: float = knob(
        1.0, ENC, "most squared Mahalanobis distance, in chi-square quantiles at 0.9973, section 3.4", threshold=True
    )
    tau_dec: float = knob(
        3.0, DEC, "most reconstruction error, in sigmas over the training images' mean (inferred)", threshold=True
    )
    reclassify: bool = knob(
        False, CategoricalDistribution((False, True)), "search a code for doubted images, section 3.5", latency=True
    )
    doubt_enc: float = knob(
        1.0, ENC, "beyond it an image is doubted; the paper's tau_enc", latency=True, given=RECLASSIFIED
    )
    doubt_dec: float = knob(
        3.0, DEC, "beyond it an image is doubted; the paper's tau_dec", latency=True, given=RECLASSIFIED
    )
    reclassify_steps: int = knob(
        30, IntDistribution(1, 10_000), "steps of that search (not said)", latency=True, given=RECLASSIFIED
    )
    reclassify_rate: float = knob(
        3e-3,
        FloatDistribution(1e-5, 1.0, log=True),
        "Adam's in that search, in latent units (not said)",
        given=RECLASSIFIED,
    )


class GMVAE(Defense):
    """Classify by the nearest mean, and reject images that lie far from it or are badly reconstructed.

    The encoder is the classifier; the protected one is not used.
    """

    Train = Train
    Inference = Inference
    means_KL: Tensor
    precision_KLL: Tensor
    error_mean: Tensor
    error_sigma: Tensor

    @property
    def openings(self) -> tuple[Opening, ...]:
        return (*super().openings, "mixture")

    def build(self) -> None:
        k, s = self.train_knobs, self.shape
        latent = k.latent or s.classes
        if latent < s.classes:
            raise InputError(f"latent must be 0 or at least the number of classes, {s.classes}, but is {latent}")
        if min(s.height, s.width) < 8:
            raise InputError(f"GMVAE halves images three times: sides must be at least 8, but are {s.height}x{s.width}")
        self.sizes = [(s.height // 2**i, s.width // 2**i) for i in range(4)]  # 28, 14, 7, 3
        maps = (s.channels, k.maps, k.maps, *[2 * k.maps] * 4)
        features = maps[-1] * self.sizes[-1][0] * self.sizes[-1][1]
        down, up = list[nn.Module](), list[nn.Module]()
        for i, (outer, inner) in enumerate(pairwise(maps)):
            down += [nn.Conv2d(outer, inner, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if i % 2 else [])]
            enlarge = [nn.Upsample(self.sizes[i // 2])] if i % 2 else []
            up = [*enlarge, nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU() if i else nn.Sigmoid(), *up]
        self.down, self.up = nn.Sequential(*down), nn.Sequential(*up)
        last = nn.Linear(k.dense, (1 + k.variable_entropy) * latent)
        self.to_latent = nn.Sequential(nn.Linear(features, k.dense), nn.ReLU(), last)
        self.from_latent = nn.Sequential(nn.Linear(latent, k.dense), nn.ReLU(), nn.Linear(k.dense, features), nn.ReLU())
        for part in self.parameters():
            # With PyTorch's default, the decoder long returns the mean image, and training on few labels fails.
            nn.init.zeros_(part) if part.ndim == 1 else nn.init.kaiming_normal_(part, nonlinearity="relu")
        self.quantile = float(chdtri(latent, 1 - THREE_SIGMA))
        self.register_buffer("means_KL", torch.eye(s.classes, latent))
        self.register_buffer("precision_KLL", torch.eye(latent, dtype=torch.float64).repeat(s.classes, 1, 1))
        self.register_buffer("error_mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("error_sigma", torch.ones((), dtype=torch.float64))

    def encode(self, x_NCHW: Tensor) -> Tensor:
        """Return f(x), the mean of Q(z|x), NL. Source: section 3.3."""
        return self.posterior(x_NCHW)[0]

    def posterior(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance of Q(z|x), NL each."""
        f_NL = self.to_latent(self.down(x_NCHW).flatten(1))
        f_NL, log_NL = f_NL.chunk(2, dim=1) if self.train_knobs.variable_entropy else (f_NL, torch.zeros_like(f_NL))
        return f_NL, self.train_knobs.latent_variance * log_NL.exp()

    def decode(self, z_NL: Tensor) -> Tensor:
        """Return g(z), NCHW."""
        maps = self.from_latent(z_NL).unflatten(1, (-1, *self.sizes[-1]))
        return self.up(maps.contiguous(memory_format=torch.channels_last))

    def distances(self, z_NL: Tensor) -> Tensor:
        """Return ||z - mu_i||^2 to each mean, NK."""
        return (z_NL[:, None] - self.means_KL).square().sum(dim=2)

    def errors(self, x_NCHW: Tensor, z_NL: Tensor) -> Tensor:
        """Return the reconstruction error ||x - g(z)||^2, N."""
        return (x_NCHW - self.decode(z_NL)).square().flatten(1).sum(dim=1)

    # Training: sections 3.2 and 3.3.

    def losses(self, x_NCHW: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean reconstruction error and the mean prior term, alpha included; a label of -1 is unknown.

        Source: Eq. 7 where the label is known, else Eq. 3 under the mixture. Eq. 7's second term is -log of a Gaussian
        around mu_y of variance 1 / (2 alpha), up to a constant; so the mixture's is minus the log-sum-exp of such
        terms (inferred; the default alpha makes sigma 1/3, as in the first author's ParthaEth/DeepClustering). Images
        with and without labels are averaged separately (inferred): otherwise the many unlabelled ones collapse to one
        mean (digits, ten labels per class: 9 instead of 84 % correct). A variable entropy adds what a fixed one drops:
        -H(Q(z|x)), and the cross entropy's share of the variance, alpha times its sum (inferred from Eq. 2).
        """
        k, (f_NL, variance_NL) = self.train_knobs, self.posterior(x_NCHW)
        epsilon_NL = variance_NL**0.5 * torch.randn_like(f_NL)
        terms_NK = k.alpha * self.distances(f_NL)
        own_N = terms_NK.gather(1, y_N.clamp(min=0)[:, None])[:, 0]
        terms_2N = torch.stack((own_N, -torch.logsumexp(-terms_NK, dim=1)))
        which_2N = torch.stack((y_N >= 0, y_N < 0))
        prior_2 = (terms_2N * which_2N).sum(dim=1) / which_2N.sum(dim=1).clamp(min=1)
        own = (k.alpha * variance_NL - variance_NL.log() / 2).sum(dim=1).mean() if k.variable_entropy else 0.0
        return self.errors(x_NCHW, f_NL + epsilon_NL).mean(), prior_2.sum() + own

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        batches = replace(batches, y_N=self.seen(batches.y_N))
        adam = torch.optim.Adam(self.parameters(), lr=self.train_knobs.learning_rate, fused=True)
        self.track(adam=adam)
        for epoch in batches:
            self.train()
            sums_2, images = torch.zeros(2, device=batches.x_NCHW.device), 0
            for x_NCHW, y_N in epoch:
                losses_2 = torch.stack(self.losses(x_NCHW, y_N))
                adam.zero_grad(set_to_none=True)
                losses_2.sum().backward()
                adam.step()
                sums_2 += losses_2.detach() * len(x_NCHW)
                images += len(x_NCHW)
            self.calibrate(batches)
            rc, prior = (sums_2 / images).tolist()
            yield {"loss": rc + prior, "rc": rc, "prior": prior}

    def seen(self, y_N: Tensor) -> Tensor:
        """Return the labels, with -1 for those that are hidden in training."""
        if self.train_knobs.labels_per_class == 0:
            return y_N
        place_N = F.one_hot(y_N, self.shape.classes).cumsum(dim=0).gather(1, y_N[:, None])[:, 0]
        return torch.where(place_N <= self.train_knobs.labels_per_class, y_N, -1)

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> None:
        """Store each class's covariance around its mean and the mean and spread of the errors, on all training images.

        Codes have no noise, as at inference; an image with a hidden label is assigned to the nearest mean.
        """
        outer_KLL, images_K, errors = torch.zeros_like(self.precision_KLL), torch.zeros_like(self.means_KL[:, 0]), []
        for x_NCHW, y_N in zip(batches.x_NCHW.split(512), batches.y_N.split(512), strict=True):
            batches.boundary()
            f_NL = self.encode(x_NCHW)
            errors.append(self.errors(x_NCHW, f_NL).double())
            class_N = torch.where(y_N >= 0, y_N, self.distances(f_NL).argmin(dim=1))
            member_NK = F.one_hot(class_N, self.shape.classes)
            off_NL = (f_NL - self.means_KL[class_N]).double()
            outer_KLL += torch.einsum("nkl,nm->klm", member_NK[:, :, None] * off_NL[:, None], off_NL)
            images_K += member_NK.sum(dim=0)
        covariance_KLL = outer_KLL / images_K.clamp(min=1)[:, None, None]
        # The floor is for a class without images: every image assigned to it is rejected.
        ridge_K = (RIDGE * covariance_KLL.diagonal(dim1=1, dim2=2).mean(dim=1)).clamp(min=1e-9)
        eye_LL = torch.eye(off_NL.shape[1]).to(off_NL)
        self.precision_KLL.copy_(torch.linalg.inv(covariance_KLL + ridge_K[:, None, None] * eye_LL))
        error_N = torch.cat(errors)
        self.error_mean.copy_(error_N.mean())
        self.error_sigma.copy_(error_N.std(correction=0).clamp(min=1e-9))

    # Inference: sections 3.3 to 3.5.

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        """Return logits_NK, the greatest for the nearest mean. Source: section 3.3."""
        return -LOGIT_SCALE * self.distances(self.codes(x_NCHW))

    def purify(self, x_NCHW: Tensor) -> Tensor:
        """Return the reconstruction."""
        return self.decode(self.codes(x_NCHW))

    def suspicion(self, x_NCHW: Tensor) -> Tensor:
        """Return the distance and the reconstruction error, N2, in the units of tau_enc and tau_dec.

        With `reclassify`, they are those of z* where f(x) is doubted. The paper doubts what tau_enc and tau_dec reject,
        and applies them to z* again. Here two further knobs, with the paper's values, decide what is doubted, so that
        scores, class and latency do not depend on the thresholds, which can still be swept exactly.
        """
        return self._columns(x_NCHW, self.codes(x_NCHW))

    def codes(self, x_NCHW: Tensor) -> Tensor:
        """Return z_NL: f(x), or with `reclassify` z* in its place where f(x) is doubted.

        The gradient is that of f in both cases (straight-through over the search), so that an attacker always has one.
        """
        f_NL, k = self.encode(x_NCHW), self.inference_knobs
        if not k.reclassify:
            return f_NL
        with torch.no_grad():
            enc_N, dec_N = self._columns(x_NCHW, f_NL).T
            doubted_N = (enc_N > k.doubt_enc) | (dec_N > k.doubt_dec)
            at_once = max(1, PIXELS // (self.shape.classes * self.shape.height * self.shape.width))
            z_NL = f_NL.clone()
            z_NL[doubted_N] = torch.cat([self.recode(part) for part in x_NCHW[doubted_N].split(at_once)])
        return f_NL + (z_NL - f_NL).detach()

    def recode(self, x_NCHW: Tensor) -> Tensor:
        """Return z*_NL, the code of lowest reconstruction error found from the K means, with all starts as one batch.

        Each start keeps its best code, the start included. Source: Eq. 9 with p = 2, section 3.5.
        """
        images, (classes, latent) = len(x_NCHW), self.means_KL.shape
        x, z = x_NCHW.detach().repeat_interleave(classes, dim=0), self.means_KL.repeat(images, 1).requires_grad_()
        best, least = z.detach().clone(), z.new_full((len(z),), torch.inf)
        adam = torch.optim.Adam([z], lr=self.inference_knobs.reclassify_rate)
        with torch.enable_grad():
            for _ in range(self.inference_knobs.reclassify_steps + 1):
                error = self.errors(x, z)
                (z.grad,) = torch.autograd.grad(error.sum(), z)
                better = error.detach() < least
                best = torch.where(better[:, None], z.detach(), best)
                least = torch.where(better, error.detach(), least)
                adam.step()
        winner_N = least.view(images, classes).argmin(dim=1)
        return best.view(images, classes, latent)[torch.arange(images, device=z.device), winner_N]

    def mahalanobis(self, z_NL: Tensor, y_N: Tensor) -> Tensor:
        """Return (mu_y - z)^T Sigma_y^-1 (mu_y - z), N, in float64."""
        off_NL = (z_NL - self.means_KL[y_N]).double()
        return torch.einsum("nl,nlm,nm->n", off_NL, self.precision_KLL[y_N], off_NL)

    def ratios(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        """Return ||x - g(f(x))||^2 / tau_dec and the distance to mu_y / tau_enc, N2, the terms of Eq. 10 and 11.

        The taus are the paper's, in pixels and latent units. A threshold looser than its default counts as the default:
        even if nothing is rejected, the class must change. Each is at least a hundredth of its default, hence positive.
        """
        usual, k, f_NL = Inference(), self.inference_knobs, self.encode(x_NCHW)
        dec, dec_usual = (self.error_mean + knob * self.error_sigma for knob in (k.tau_dec, usual.tau_dec))
        tau_dec = torch.clamp(dec, dec_usual / 100, dec_usual)
        tau_enc = self.quantile * min(max(k.tau_enc, usual.tau_enc / 100), usual.tau_enc)
        errors_N = self.errors(x_NCHW, f_NL).double()
        return torch.stack((errors_N / tau_dec, self.mahalanobis(f_NL, y_N) / tau_enc), dim=1).to(x_NCHW.dtype)

    def _columns(self, x_NCHW: Tensor, z_NL: Tensor) -> Tensor:
        """Return both scores of `suspicion` for given codes. Source: section 3.4."""
        distance_N = self.mahalanobis(z_NL, self.distances(z_NL).argmin(dim=1))
        sigmas_N = (self.errors(x_NCHW, z_NL).double() - self.error_mean) / self.error_sigma
        return torch.stack((distance_N / self.quantile, sigmas_N), dim=1).to(x_NCHW.dtype)
