"""Black-box attacker: trains a substitute on the class predictions of the defended classifier and attacks that.

Shapes: N images, C channels, H x W pixels, K classes; images lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.algorithms.base import slope
from attacks.seeding import evaluating, seeded
from attacks.suites import Suite, craft_oblivious
from attacks.threat import ThreatModel
from spaces.exceptions import InputError

STEP = 0.1
"""Step size of the Jacobian augmentation, in pixel units. Papernot et al. 2017 and CleverHans alternate its sign; the
negative sign, which crosses the substitute's boundary, was stronger in every measurement (docs/decisions.md)."""


QUERY_BATCH = 256
TRAIN_BATCH = 128


@dataclass(frozen=True)
class BlackBoxAttacker:
    """A black-box attacker.

    Args:
        x_NCHW: the attacker's initial images; none of them is attacked.
        build: returns an untrained substitute.
        rounds: rounds of augmentation.
        asked: the model whose classes are queried; None: the attacked model.
    """

    x_NCHW: Tensor
    build: Callable[[], nn.Module]
    rounds: int = 6
    asked: nn.Module | None = None

    def craft(
        self, suite: Suite, target: nn.Module, x_NCHW: Tensor, y_N: Tensor, threat: ThreatModel, seed: int
    ) -> tuple[dict[str, Tensor], int]:
        """Return the adversarial examples of each attack of the suite on the substitute, and the number of queries."""
        substitute = self.substitute(target, seed)
        return craft_oblivious(suite, substitute.network, x_NCHW, y_N, threat, seed), substitute.queries

    def substitute(self, target: nn.Module, seed: int) -> Substitute:
        """Return a substitute trained on the classes that the target, or the model `asked`, returns."""
        asked = target if self.asked is None else self.asked
        return train_substitute(asked, self.x_NCHW, self.build, rounds=self.rounds, step=-STEP, seed=seed)


@dataclass(frozen=True)
class Substitute:
    """A trained substitute.

    Args:
        network: the substitute, in eval mode, frozen; attacks on it are transferred to the target.
        queries: number of images whose class the attacker queried, rejected ones included.
        agreement: share of the accepted images, all of them training images, on which substitute and target
            agree; 0 where none was accepted. On unseen images it may be lower: on digits 0.97 on both with a step of
            -0.1, but 1.00 and 0.78 with a step of 0.1.
    """

    network: nn.Module
    queries: int
    agreement: float


def train_substitute(
    target: nn.Module,
    x_NCHW: Tensor,
    build: Callable[[], nn.Module],
    *,
    rounds: int = 6,
    epochs: int = 10,
    step: float = 0.1,
    seed: int,
) -> Substitute:
    """Train a substitute for the target by Jacobian-based dataset augmentation.

    The attacker queries the classes of its images and trains on them; then, `rounds` times, it moves every accepted
    image along the Jacobian, queries the moved images and trains on all. This takes N * 2 ** rounds queries (150
    images, 6 rounds: 9,600), fewer where images are rejected: these are neither trained on nor moved. Reservoir
    sampling and a step whose sign changes every few rounds are left out.

    Algorithm 1 only names train(F, D): as in CleverHans 2 and Defense-GAN, it is 10 epochs of a new Adam (1e-3, batch
    128) that continue from the previous round's weights. They run a round less: their `data_aug=6` is `rounds=5` here.

    Args:
        target: the whole pipeline, logits_NK from images in [0, 1], with `accept` where it can reject. Its gradient is
            not used.
        x_NCHW: the attacker's own images, held out from everything else; no labels are needed.
        build: returns the untrained substitute, of any architecture, that maps images to logits_NK.
        epochs: passes over the images in each round.
        step: lambda, in pixel units of [0, 1]. Positive moves towards the class that the target returned, as in the
            paper; negative moves away from it, over the boundary, which gives a much stronger attacker. On MNIST
            (convolutional target, substitute of two dense layers of 200) 0.1 agrees with the target on 78 % of unseen
            images, -0.1 on 92 %; PGD-20 at eps 0.15 on the substitute fools the target on 20 % and on 44 %.
        seed: seed of the substitute's weights, the order of the images and the target's noise.

    Raises:
        InputError: fewer than 2 images, images outside [0, 1], or fewer than 0 rounds.

    Source: Papernot et al., Practical Black-Box Attacks against Machine Learning, 2017, Algorithm 1.
    """
    if len(x_NCHW) < 2:
        raise InputError(f"a substitute starts from at least 2 images, but is given {len(x_NCHW)}")
    if not bool(((x_NCHW >= 0) & (x_NCHW <= 1)).all()):
        low, high = (float(edge) for edge in x_NCHW.aminmax())
        raise InputError(f"images must lie in [0, 1], but a substitute's start in [{low:g}, {high:g}]")
    if rounds < 0:
        raise InputError(f"a substitute is trained for at least 0 rounds of augmentation, but rounds is {rounds}")

    new_NCHW, queries = x_NCHW.detach(), 0
    S_NCHW, O_N = new_NCHW[:0], torch.zeros(0, dtype=torch.long, device=x_NCHW.device)
    with evaluating(target), seeded(seed), torch.enable_grad():
        network = build().to(x_NCHW.device)
        for rho in range(rounds + 1):
            queries += len(new_NCHW)
            answered_NCHW, answers_N = _ask(target, new_NCHW)
            S_NCHW, O_N = torch.cat([S_NCHW, answered_NCHW]), torch.cat([O_N, answers_N])
            if len(S_NCHW) == 0:
                break
            _train(network, S_NCHW, O_N, epochs)
            if rho < rounds:
                new_NCHW = augmented(network, S_NCHW, O_N, step)
    network.zero_grad()
    network.eval().requires_grad_(False)
    said_N = torch.cat([network(x).argmax(1) for x in S_NCHW.split(QUERY_BATCH)])
    return Substitute(network, queries, float((said_N == O_N).sum()) / max(1, len(O_N)))


def augmented(network: nn.Module, x_NCHW: Tensor, y_N: Tensor, step: float) -> Tensor:
    """Return x + lambda sgn(J_F[O(x)]) of each image, clipped to [0, 1].

    J_F[y] is the gradient of the probability of y. The gradient of its log-odds, used here, has the same signs and does
    not vanish where float32 rounds the probability to 1.

    Args:
        network: F, in eval mode; returns logits_NK.
        y_N: O(x), the classes that the target returned.
        step: lambda, in pixel units of [0, 1].

    Source: Papernot et al. 2017, the last step of each round of Algorithm 1.
    """
    moved = []
    for x, y in zip(x_NCHW.split(QUERY_BATCH), y_N.split(QUERY_BATCH), strict=True):
        x = x.detach().requires_grad_()
        logits_NK, y_N1 = network(x), y[:, None]
        odds_N = logits_NK.gather(1, y_N1)[:, 0] - logits_NK.scatter(1, y_N1, -torch.inf).logsumexp(1)
        moved.append((x + step * slope(odds_N, x).sign()).clamp(0, 1).detach())
    return torch.cat(moved)


@torch.no_grad()
def _ask(target: nn.Module, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images that the target accepts, and their predicted classes."""
    accept = getattr(target, "accept", lambda x: torch.ones(len(x), dtype=torch.bool, device=x.device))
    answers, accepted = [], []
    for x in x_NCHW.split(QUERY_BATCH):
        answers.append(target(x).argmax(1))
        accepted.append(accept(x))
    accepted_N = torch.cat(accepted)
    return x_NCHW[accepted_N], torch.cat(answers)[accepted_N]


def _train(network: nn.Module, x_NCHW: Tensor, y_N: Tensor, epochs: int) -> None:
    """Continue training the network from its present weights, and leave it in eval mode."""
    adam = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    network.train()
    batches = -(-len(x_NCHW) // TRAIN_BATCH)
    for _ in range(epochs):
        # Batches of almost equal size: batch norm fails on a last batch of one image.
        for chosen in torch.randperm(len(x_NCHW)).to(x_NCHW.device).tensor_split(batches):
            adam.zero_grad()
            F.cross_entropy(network(x_NCHW[chosen]), y_N[chosen]).backward()
            adam.step()
    network.eval()
