"""An attack with its budget: runs an attack class of torchattacks or of this project and verifies its output.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
import torchattacks
from torch import Tensor, nn

from attacks.algorithms.base import lengths
from attacks.gradient_view import BATCH, Opening, rows
from attacks.seeding import Draws, reproducible
from attacks.threat import Norm, ThreatModel
from spaces.exceptions import InputError

ROWS = 2560
"""Most images in one forward and backward pass; each noise draw and each candidate of an image counts as one."""
ROUNDING = 1e-6
"""Tolerance on the bounds of a pixel, since float32 rounds x + eps."""
BOTH: tuple[Norm, ...] = get_args(Norm)


class AttackError(RuntimeError):
    """Raised when an attack returns images outside its threat model."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack of a suite.

    Args:
        name: name shown in tables.
        family: the attack class, of torchattacks or of this project.
        source: the paper.
        steps: number of gradient steps; None where the class takes no such argument.
        pace: step size as a fraction of eps; None where the class takes no such argument.
        targeted: whether to aim at a random wrong label, drawn from the seed.
        settings: further arguments of the class, by name.
        portions: further arguments of the class that are fractions of eps, by name.
        norms: norms in which the attack can be bounded.
        unbounded: whether the attack ignores eps and minimises the L2 norm of the perturbation. Under an L2 threat
            model results beyond eps are discarded; under an L-inf one they are reported but not part of the worst case.
        through: gradient sources to run through: `each`, the defense's `first`, or the `exact` model alone.
        aims: attack surface that the attack targets; it is run only on defenses that have it.
    """

    name: str
    family: type[torchattacks.attack.Attack]
    source: str
    steps: int | None = None
    pace: float | None = None
    targeted: bool = False
    settings: tuple[tuple[str, float | str], ...] = ()
    portions: tuple[tuple[str, float], ...] = ()
    norms: tuple[Norm, ...] = ("Linf",)
    unbounded: bool = False
    through: Literal["each", "first", "exact"] = "each"
    aims: Opening | None = None

    def __repr__(self) -> str:
        """Return the budget; the class without its module, so that moving it does not change a fingerprint."""
        given = {field.name: getattr(self, field.name) for field in fields(self)} | {"family": self.family.__name__}
        return f"Attack({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def options(self, threat: ThreatModel) -> dict[str, Any]:
        """Return the arguments of the attack class under a threat model."""
        bound = {} if self.unbounded else {"eps": threat.eps}
        norm = {"norm": threat.norm} if self.norms == BOTH and not self.unbounded else {}
        steps = {} if self.steps is None else {"steps": self.steps}
        pace = {} if self.pace is None else {"alpha": self.pace * threat.eps}
        portions = {name: share * threat.eps for name, share in self.portions}
        return {**bound, **norm, **pace, **steps, **portions, **dict(self.settings)}

    def budget(self, threat: ThreatModel) -> dict[str, Any]:
        """Return everything that must be reported with a result of this attack, as JSON."""
        family = f"{self.family.__module__.partition('.')[0]}.{self.family.__name__}"
        norm = "L2, least, not bounded by eps" if self.exceeds(threat) else threat.norm
        return {"attack": self.name, "class": family, "norm": norm, **self.options(threat), "targeted": self.targeted}

    def spoken(self) -> str:
        """Return the parameters as text; those that scale with eps as multiples of it."""
        pace = {} if self.pace is None else {"alpha": f"{self.pace:g} eps"}
        steps = {} if self.steps is None else {"steps": self.steps}
        portions = {name: f"{share:g} eps" for name, share in self.portions}
        words = {**steps, **pace, **portions, **dict(self.settings), **({"targeted": "yes"} if self.targeted else {})}
        return ", ".join(f"{name} {value}" for name, value in words.items())

    def exceeds(self, threat: ThreatModel) -> bool:
        """Return whether the attack's images may lie outside the threat model."""
        return self.unbounded and threat.norm == "Linf"

    def craft(
        self,
        model: nn.Module,
        x_NCHW: Tensor,
        y_N: Tensor,
        threat: ThreatModel,
        seed: int,
        *,
        ids_N: Tensor | None = None,
        stops: bool = False,
    ) -> Tensor:
        """Return adversarial examples of `x_NCHW`, each within the threat model.

        Args:
            model: the attacker's view of the target; returns logits.
            seed: seed of the random starts, the target classes and the defense's noise.
            ids_N: ids of the images, which with the seed determine their random numbers; None: places in the batch.
            stops: see `attacks.algorithms.base.CorrectedAttack`.

        Raises:
            AttackError: the attack left the eps ball or [0, 1].
            InputError: the attack cannot be bounded in the threat model's norm.
        """
        if threat.norm not in self.norms:
            raise InputError(f"{self.name} must be run in {' or '.join(self.norms)}, but the norm is {threat.norm}")
        if len(x_NCHW) == 0:
            return x_NCHW
        attack = self.family(model, **self.options(threat))
        attack.stops = stops
        if self.targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        seed = seed + zlib.crc32(self.name.encode())
        ids_N = torch.arange(len(y_N), device=x_NCHW.device) if ids_N is None else ids_N
        with reproducible(model, seed), torch.enable_grad():
            labels_N = wrong_labels(y_N, _classes(model, x_NCHW), Draws(seed + 1, ids_N)) if self.targeted else y_N
            adversarial = []
            size = max(1, min(BATCH, ROWS // rows(model)))
            for x, labels, ids in zip(x_NCHW.split(size), labels_N.split(size), ids_N.split(size), strict=True):
                attack.draws = Draws(seed, ids)
                adversarial.append(attack(x, labels).detach())
        return self._verified(torch.cat(adversarial), x_NCHW, threat)

    def _verified(self, adversarial_NCHW: Tensor, x_NCHW: Tensor, threat: ThreatModel) -> Tensor:
        step_NCHW = adversarial_NCHW - x_NCHW
        if self.unbounded and threat.norm == "L2":
            beyond_N111 = lengths(step_NCHW) > threat.eps
            adversarial_NCHW = torch.where(beyond_N111, x_NCHW, adversarial_NCHW)
            step_NCHW = torch.where(beyond_N111, 0, step_NCHW)
        moved = float(step_NCHW.abs().max() if threat.norm == "Linf" else lengths(step_NCHW).max())
        low, high = (float(edge) for edge in adversarial_NCHW.aminmax())
        # Negated, so that NaN also raises.
        reach = 1.0 if self.exceeds(threat) else threat.eps * (1 + ROUNDING)
        if not (moved <= reach + ROUNDING and low >= -ROUNDING and high <= 1 + ROUNDING):
            raise AttackError(
                f"{self.name} must stay within {threat} and [0, 1], but moved by {moved:g} into [{low:g}, {high:g}]"
            )
        return adversarial_NCHW


def wrong_labels(y_N: Tensor, classes: int, draws: Draws) -> Tensor:
    """Return a wrong label for each image, drawn uniformly."""
    return (y_N + 1 + draws.below(classes - 1)) % classes


@torch.no_grad()
def _classes(model: nn.Module, x_NCHW: Tensor) -> int:
    return int(model(x_NCHW[:1]).shape[1])
