"""Defense-VAE: a VAE that maps an adversarial image to its clean version in one pass, without a label or a search.

Source: Li and Ji, Defense-VAE, 2018 (arXiv 1812.06570), sections 2.2 and 4.1, Table 6; "the code" is its authors',
lxuniverse/defense-vae. Shapes: N images, V adversarial versions of each, C channels, H x W pixels, L latent dimensions.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from typing import Any, Literal

import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.gradient_view import BATCH, Gradient
from attacks.seeding import reproducible
from defenses.base import Batches, Defense, Knobs, Metrics, Tensors
from defenses.layers.posterior import collapse
from spaces.exceptions import InputError
from spaces.space import Condition, knob

EPS = {"paper": (0.25, 0.3, 0.35, 0.4), "code": (0.2, 0.25, 0.3, 0.35)}
"""Values of eps of FGSM and RAND+FGSM, in pixel units of [0, 1]. Source: section 4.1, and the code."""
ALPHA = 0.05  # RAND+FGSM's random step, in pixel units of [0, 1]. Source: Table 1
CW_RATES = (6.0, 8.0, 10.0, 12.0)  # CW's learning rates. Source: section 4.1
ATTACKS = ("fgsm+rand+cw", "fgsm+rand", "fgsm+cw", "rand+cw", "fgsm+rand+deepfool", "fgsm+rand+cw+clean")
"""The paper's; Table 2's, with an attack left out or DeepFool for CW; and ours, with the clean image itself."""
WITH_CW: Condition = {"attacks": tuple(named for named in ATTACKS if "cw" in named)}
RETRAINED: Condition = {"variant": ("rec", "e2e", "scratch")}
PHASED: Condition = {"variant": ("rec", "e2e")}
END_TO_END: Condition = {"variant": ("e2e", "scratch")}
TUNED: Condition = {"variant": ("e2e",)}
EDGE = 0.01  # bn_relu pixels are clamped this far from 0 and 1, where the BCE is infinite; with less it did not train
Phase = Literal["vae", "rec", "e2e"]


@dataclass(frozen=True)
class Train(Knobs):
    variant: str = knob(
        "plain",
        CategoricalDistribution(("plain", "rec", "e2e", "scratch")),
        "who classifies: the protected classifier, a copy retrained on reconstructions, one then tuned end to end, or "
        "one trained end to end from random weights",
    )
    attacks: str = knob(
        "fgsm+rand+cw", CategoricalDistribution(ATTACKS), "whose images are mapped to clean ones, section 4.1"
    )
    eps_set: str = knob("paper", CategoricalDistribution(tuple(EPS)), "whose eps FGSM and RAND+FGSM have")
    eps_scale: float = knob(1.0, FloatDistribution(0.01, 2.0), "factor on these eps and on alpha; below 1 for colour")
    cw_steps: int = knob(
        100, IntDistribution(1, 10_000), "steps of CW (the code's; the paper does not say)", given=WITH_CW
    )
    cw_c: float = knob(
        100.0, FloatDistribution(1e-3, 1e4, log=True), "weight of CW's class term (the code's)", given=WITH_CW
    )
    epoch_share: float = knob(1.0, FloatDistribution(0.001, 1.0), "share of the V N pairs an epoch shows, drawn anew")
    kl_weight: float = knob(1.0, FloatDistribution(0.0, 1e3), "of the KL divergence: Eq. 4 has 1, the code 0")
    lambda_ce: float = knob(
        1.0, FloatDistribution(1e-4, 1e5, log=True), "lambda of Eq. 5 (the paper does not say)", given=END_TO_END
    )
    rec_share: float = knob(
        0.2, FloatDistribution(0.0, 0.9), "share of the epochs that retrain the copy (not said)", given=PHASED
    )
    e2e_share: float = knob(
        0.2, FloatDistribution(0.0, 0.9), "share that then tunes end to end (not said)", given=TUNED
    )
    maps: int = knob(64, IntDistribution(1, 512), "base width of the convolutions, Table 6", latency=True)
    latent: int = knob(128, IntDistribution(1, 1024), "latent dimensions, Table 6", latency=True)
    deeper: int = knob(0, IntDistribution(0, 2), "3 x 3 layers on the smallest maps, appendix A", latency=True)
    last_layer: str = knob(
        "sigmoid",
        CategoricalDistribution(("sigmoid", "bn_relu")),
        "what emits the pixels: the code's sigmoid, or Table 6's BN and ReLU, cut off at 1",
        latency=True,
    )
    learning_rate: float = knob(5e-4, FloatDistribution(1e-6, 1e-1, log=True), "Adam's on the VAE (the code's)")
    rec_learning_rate: float = knob(
        1e-3, FloatDistribution(1e-6, 1e-1, log=True), "Adam's on the copy, section 4.3", given=RETRAINED
    )
    batch_size: int = knob(16, IntDistribution(1, 4096), "pairs a step (the code's)")
    epochs: int = knob(5, IntDistribution(1, 1000), "of all phases together; section 4.1 has 5 for the VAE")


@dataclass(frozen=True)
class Inference(Knobs):
    bn_eval: str = knob(
        "running",
        CategoricalDistribution(("running", "batch")),
        "statistics of the batch norms; batch (the code's) is transductive: images purified together change each other",
        latency=True,
    )


class DefenseVAE(Defense):
    """Purify by decoding the mean of q(z | x_hat)."""

    Train = Train
    Inference = Inference
    own: nn.Module

    @property
    def retrains(self) -> bool:
        return bool(self.train_knobs.variant != "plain")

    @property
    def gradients(self) -> tuple[Gradient, ...]:
        return ("exact",) if self.retrains else ("bpda", "exact")  # BPDA would use the protected classifier

    def build(self) -> None:
        """Build the networks of Table 6, adapted to other image sizes.

        Stride-2 layers follow until the longer side is at most 4; widths double up to 4 `maps`; the decoder mirrors it.
        For CelebA and CIFAR-10 the paper is "1 or 2 layers deeper": a side of 64 adds one, `deeper` adds more.
        """
        k, channels, sides = self.train_knobs, self.shape.channels, (self.shape.height, self.shape.width)
        depth = max(1, math.ceil(math.log2(max(sides) / 4)))  # 3 at 28 and 32 pixels, 1 at 8, 5 at 128
        self.size = tuple(math.ceil(side / 2**depth) for side in sides)
        lacking = [2**depth * small - side for small, side in zip(self.size, sides, strict=True)]
        first = tuple(math.ceil(lack / 2) + 1 for lack in lacking), tuple(lack % 2 for lack in lacking)
        encoder, decoder = [*_layer(nn.Conv2d(channels, k.maps, 5, 1, 2, bias=False))], list[nn.Module]()
        widths = [k.maps, *(k.maps * min(2**i, 4) for i in range(depth))]
        for i, (thin, wide) in enumerate(pairwise(widths)):
            pad, uneven = ((1, 1), (0, 0)) if i else first  # `first` pads what the strides do not divide: 3 at 28 -> 16
            encoder += _layer(nn.Conv2d(thin, wide, 4, 2, pad, bias=False))
            decoder = [*_layer(nn.ConvTranspose2d(wide, thin, 4, 2, pad, uneven, bias=False)), *decoder]
        for _ in range(k.deeper):  # inferred: of stride 1
            encoder += _layer(nn.Conv2d(widths[-1], widths[-1], 3, 1, 1, bias=False))
            decoder = [*_layer(nn.ConvTranspose2d(widths[-1], widths[-1], 3, 1, 1, bias=False)), *decoder]
        decoder.append(nn.ConvTranspose2d(k.maps, channels, 5, 1, 2, bias=False))
        if k.last_layer == "bn_relu":
            decoder.append(nn.BatchNorm2d(channels))
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        features = widths[-1] * math.prod(self.size)
        self.fc1, self.fc2 = nn.Linear(features, k.latent), nn.Linear(features, k.latent)
        self.fc3 = nn.Linear(k.latent, features)
        for part in self.modules():  # section 4.1
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
                nn.init.normal_(part.weight, float(isinstance(part, nn.BatchNorm2d)), 0.02)
        rec, e2e = (max(1, round(share * k.epochs)) for share in (k.rec_share, k.e2e_share))
        spent = {"rec": rec, "e2e": rec + e2e}.get(k.variant, 0)
        if k.epochs <= spent:
            raise InputError(f"epochs must exceed the {spent} that variant {k.variant} retrains, but is {k.epochs}")
        self.rec_from = k.epochs - spent if k.variant in PHASED["variant"] else math.inf
        self.e2e_from = {"e2e": k.epochs - e2e, "scratch": 0}.get(k.variant, math.inf)  # section 4.1's two ways

    def adopt(self, classifier: nn.Module) -> None:
        if self.retrains:
            self.own = copy.deepcopy(classifier).requires_grad_(True)

    def pairs(self, batches: Batches, classifier: nn.Module) -> Batches:
        """Return batches of adversarial images, float16, each with the index of its clean image."""
        forms = versions(self.train_knobs)
        x_hat_VNCHW = batches.x_NCHW.new_empty((len(forms), *batches.x_NCHW.shape), dtype=torch.float16)
        for x_hat_NCHW, (family, options) in zip(x_hat_VNCHW, forms, strict=True):
            words = f"{family.__name__} {options}"
            make = partial(_craft, family(classifier, **options), classifier, batches, zlib.crc32(words.encode()))
            x_hat_NCHW.copy_(batches.once(words, make)["x_hat"])
        index_VN = torch.arange(len(batches.y_N), device=batches.y_N.device).repeat(len(forms))
        return replace(batches, x_NCHW=x_hat_VNCHW.flatten(0, 1), y_N=index_VN)

    def phase(self, epoch: int) -> Phase:
        """Return what an epoch (from 0) trains: the VAE, Eq. 4; then in rec and e2e a copy; then in e2e both, Eq. 5."""
        return "e2e" if epoch >= self.e2e_from else "rec" if epoch >= self.rec_from else "vae"

    def encode(self, x_NCHW: Tensor, together: bool = False) -> tuple[Tensor, Tensor]:
        """Return mu_NL and log sigma^2_NL of q(z | x). Source: Eq. 3; `together`: see `_through`."""
        features_NF = _through(self.encoder, x_NCHW, together).flatten(1)
        return self.fc1(features_NF), self.fc2(features_NF)

    def decode(self, z_NL: Tensor, together: bool = False) -> Tensor:
        """Return the image before its last nonlinearity; `together`: see `_through`."""
        return _through(self.decoder, F.relu(self.fc3(z_NL)).unflatten(1, (-1, *self.size)), together)

    def emit(self, raw_NCHW: Tensor) -> Tensor:
        """Return the image in [0, 1] from the output of `decode`."""
        return raw_NCHW.sigmoid() if self.train_knobs.last_layer == "sigmoid" else raw_NCHW.clamp(0, 1)

    def losses(self, phase: Phase, x_hat_NCHW: Tensor, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        """Return a phase's loss, BCE, KL and cross-entropy (unused: 0), summed over an image, batch-averaged, 4."""
        k, none = self.train_knobs, x_NCHW.new_zeros(())
        if phase == "rec":
            with torch.no_grad():
                rebuilt_NCHW = self.rebuild(x_hat_NCHW)
            ce = F.cross_entropy(self.own(rebuilt_NCHW), y_N)  # of the copy, on reconstructions
            return torch.stack((ce, none, none, ce))
        mu_NL, log_var_NL = self.encode(x_hat_NCHW)
        raw_NCHW = self.decode(mu_NL + torch.randn_like(mu_NL) * (log_var_NL / 2).exp())  # one draw of z
        if k.last_layer == "sigmoid":
            bce_NCHW = F.binary_cross_entropy_with_logits(raw_NCHW, x_NCHW, reduction="none")
        else:
            bce_NCHW = F.binary_cross_entropy(raw_NCHW.clamp(EDGE, 1 - EDGE), x_NCHW, reduction="none")
        bce = bce_NCHW.flatten(1).sum(1).mean()
        kl = (mu_NL**2 + log_var_NL.exp() - log_var_NL - 1).sum(1).mean() / 2
        ce = F.cross_entropy(self.own(self.emit(raw_NCHW)), y_N) if phase == "e2e" else none
        return torch.stack((bce + k.kl_weight * kl + k.lambda_ce * ce, bce, kl, ce))  # Eq. 4; with ce, Eq. 5

    def fit(self, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        k, x_NCHW, y_N = self.train_knobs, batches.x_NCHW, batches.y_N
        vae = [weight for name, weight in self.named_parameters() if not name.startswith("own.")]
        groups: list[dict[str, Any]] = [{"params": vae, "lr": k.learning_rate}]
        if self.retrains:
            groups.append({"params": list(self.own.parameters()), "lr": k.rec_learning_rate})
            if batches.start == 0:
                self.own.load_state_dict(classifier.state_dict())  # inferred: start from the protected weights
        adam = torch.optim.Adam(groups, fused=True)  # skips the weights without a gradient in a phase
        self.track(adam=adam)
        pairs = self.pairs(batches, classifier)
        steps = math.ceil(k.epoch_share * len(pairs.x_NCHW) / batches.batch_size)
        for number, epoch in enumerate(pairs, start=batches.start):
            if number == 0 and k.variant == "scratch":  # here, so that the weights follow from the epoch's seed
                for part in self.own.modules():
                    getattr(part, "reset_parameters", lambda: None)()
            phase = self.phase(number)
            self.train(phase != "rec")  # there the VAE is fixed, its running statistics too
            if phase == "rec":
                self.own.train()
            sums_4, images = torch.zeros(4, device=x_NCHW.device), 0
            for x_hat_NCHW, clean_N in islice(epoch, steps):
                losses_4 = self.losses(phase, x_hat_NCHW.to(x_NCHW.dtype), x_NCHW[clean_N], y_N[clean_N])
                adam.zero_grad(set_to_none=True)
                losses_4[0].backward()
                adam.step()
                sums_4 += losses_4.detach() * len(clean_N)
                images += len(clean_N)
            yield dict(zip(("loss", "bce", "kl", "ce"), (sums_4 / images).tolist(), strict=True))

    @property
    def together(self) -> bool:
        """Whether batch norms use the batch's own statistics at inference; see `_through`."""
        return bool(self.inference_knobs.bn_eval == "batch")

    def rebuild(self, x_NCHW: Tensor, together: bool = False) -> Tensor:
        """Return the image decoded from z = mu, Figure 3; `together`: see `_through`."""
        return self.emit(self.decode(self.encode(x_NCHW, together)[0], together))

    def purify(self, x_NCHW: Tensor) -> Tensor:
        return self.rebuild(x_NCHW, self.together)

    def remarks(self, x_NCHW: Tensor, y_N: Tensor) -> tuple[str, ...]:
        return collapse(float(self.losses("vae", x_NCHW, x_NCHW, y_N)[2]), "all images are purified to much the same")

    def latent(self, x_NCHW: Tensor) -> Tensor:
        return self.encode(x_NCHW, self.together)[0]

    def generate(self, z_NZ: Tensor) -> Tensor:
        return self.emit(self.decode(z_NZ, self.together))

    def classify(self, x_NCHW: Tensor, classifier: nn.Module) -> Tensor:
        return (self.own if self.retrains else classifier)(self.purify(x_NCHW))


def versions(k: Train) -> list[tuple[Any, dict[str, float]]]:
    """Return the attacks that craft an image's V adversarial versions, with options. Source: sections 4.1, 4.2."""
    import torchattacks  # only a training needs it and what is made of it

    from attacks.algorithms.carlini_wagner import CW
    from attacks.algorithms.deepfool import DeepFool
    from attacks.algorithms.rand_fgsm import RandFGSM

    eps = [k.eps_scale * eps for eps in EPS[k.eps_set]]
    forms: dict[str, list[tuple[Any, dict[str, float]]]] = {
        "fgsm": [(torchattacks.FGSM, {"eps": e}) for e in eps],
        "rand": [(RandFGSM, {"eps": e, "alpha": k.eps_scale * ALPHA}) for e in eps],
        "cw": [(CW, {"c": k.cw_c, "steps": k.cw_steps, "lr": rate}) for rate in CW_RATES],
        "deepfool": [(DeepFool, {"steps": 50, "overshoot": 0.02})],  # its authors' (inferred: section 4.2 names none)
        "clean": [(torchattacks.VANILA, {})],
    }
    return [form for name in k.attacks.split("+") for form in forms[name]]


def _craft(attack: Any, classifier: nn.Module, batches: Batches, salt: int) -> Tensors:
    """Return one adversarial version of every training image, crafted against its true label."""
    made = []
    with reproducible(classifier, batches.seed + salt), torch.enable_grad():
        for x_NCHW, y_N in zip(batches.x_NCHW.split(BATCH), batches.y_N.split(BATCH), strict=True):
            batches.boundary()
            made.append(attack(x_NCHW, y_N).detach().half())
    return {"x_hat": torch.cat(made)}


def _layer(convolution: nn.Conv2d | nn.ConvTranspose2d) -> tuple[nn.Module, nn.Module, nn.Module]:
    return convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()


def _through(layers: nn.Sequential, maps_NCHW: Tensor, together: bool = False) -> Tensor:
    """Run the layers; `together` normalises by the batch's own statistics and does not update the running ones."""
    for layer in layers:
        if together and isinstance(layer, nn.BatchNorm2d):
            maps_NCHW = F.batch_norm(maps_NCHW, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
        else:
            maps_NCHW = layer(maps_NCHW)
    return maps_NCHW
