"""What a failed check says about the figure, and what to do about it; docs/audit.md has the same words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import NamedTuple


class Effect(StrEnum):
    """What follows for the figure, the worst first."""

    HIGH = "the figure is likely too high"
    UNSURE = "the figure may not hold"
    USELESS = "the defense does not help"


class Advice(NamedTuple):
    """What a failed check says.

    Args:
        effect: what follows for the figure.
        because: what was found, the end of a sentence that begins with `effect`.
        remedy: what to do, a sentence; empty: as `_STAND_IN` says.
    """

    effect: Effect
    because: str
    remedy: str


_STAND_IN = {
    "": "Split the model into purify and classify, so that attacks go around what hides the gradient (BPDA).",
    "suspicion": "Let suspicion be a score that has a gradient, minus its threshold; else split the model.",
    "purify": "Give the model a surrogate, a differentiable stand-in for purify, to attack through.",
    "surrogate": "Give the model a surrogate that is closer to purify, or remove what hides the gradient.",
}
"""By the last method of these that a model has."""
_BY_STAND_IN = ""
_STRONGER = "Add `--suite standard` (AutoAttack), whose verdicts count too, and look for what hides the gradient."
_STATE = "Let the answer depend on the image alone: no counters, caches or batch statistics."
HIGH, UNSURE, USELESS = Effect
ADVICE: Mapping[str, Advice] = {
    "named": Advice(UNSURE, "an attack behind it has no name or budget", "This is a fault of ours: please report it."),
    "determinism": Advice(UNSURE, "the model answers the same images otherwise each time", _STATE),
    "logits": Advice(HIGH, "it returns probabilities, on which attacks stall", "Return what goes into the softmax."),
    "saturation": Advice(
        HIGH,
        "its logits lie so far apart that the softmax has no gradient",
        "Divide the logits by a constant: the classes stay the same.",
    ),
    "gradient": Advice(HIGH, "images have no usable gradient (rounding, a threshold, detach)", _BY_STAND_IN),
    "completeness": Advice(HIGH, "its gradient does not add up to what the logits do", _BY_STAND_IN),
    "prediction": Advice(HIGH, "short steps change its logits otherwise than its gradient says", _BY_STAND_IN),
    "stand-in": Advice(HIGH, "purify has no gradient, and no surrogate to attack through", "Give it a surrogate."),
    "inner-loop": Advice(HIGH, "the optimisation inside purify has not converged", "Take more steps in purify."),
    "batch": Advice(UNSURE, "an image's logits depend on the images beside it", _STATE),
    "order": Advice(UNSURE, "an image's class depends on its place in the batch", _STATE),
    "jump": Advice(
        HIGH,
        "clean images moved by 1/255 make its logits jump, as if it looked for untouched ones",
        "Remove what reacts to exact pixel values.",
    ),
    "noise": Advice(HIGH, "random signs of size eps break what the attacks left", _STRONGER),
    "single-step": Advice(HIGH, "one step breaks what many steps left", _STRONGER),
    "transfer": Advice(HIGH, "images made on the bare classifier break what white-box attacks left", _BY_STAND_IN),
    "square": Advice(HIGH, "an attack without gradients (Square) breaks what gradient attacks left", _BY_STAND_IN),
    "estimated": Advice(HIGH, "a gradient estimated from its answers breaks what its own gradient left", _BY_STAND_IN),
    "convergence": Advice(HIGH, "twice the steps break more", _STRONGER),
    "trajectory": Advice(HIGH, "the attacks' loss still rises at the last step", _STRONGER),
    "budget": Advice(HIGH, "a larger eps leaves more images than a smaller one", _STRONGER),
    "unbounded": Advice(HIGH, "attacks that may choose any image still leave more than chance", _BY_STAND_IN),
    "sources": Advice(HIGH, "a gradient source was not tried", "This is a fault of ours: please report it."),
    "draws": Advice(UNSURE, "two draws of its noise disagree on clean images", "Lower the noise, or average draws."),
    "randomness": Advice(
        HIGH,
        "its noise saves many images from an attacker who does not know it",
        "Report the figure with the noise fixed too, or average more draws in the model.",
    ),
    "planted": Advice(HIGH, "the attacks miss an adversarial neighbour that was put there", _BY_STAND_IN),
    "baseline": Advice(
        USELESS,
        "without it the classifier errs on hardly more attacked images",
        "Compare at a smaller eps; a defense that passes errs on five points less.",
    ),
    "tailored": Advice(HIGH, "no attack made for this kind of defense ran", "Use the norm Linf."),
    "regular": Advice(HIGH, "attacked images on the levels of clean ones break what was left", "See `jump`."),
    "batch-size": Advice(UNSURE, "images alone get other answers or gradients than in a batch", _STATE),
    "as-used": Advice(UNSURE, "asked as a user asks it answers otherwise than in an audit", _STATE),
    "replayed": Advice(UNSURE, "a copy that is asked in another order answers otherwise", _STATE),
    "unpatched": Advice(HIGH, "code of attacks or of torch was replaced", "Let the model leave other modules alone."),
    "confirmed": Advice(
        UNSURE,
        "the model, built anew in a new process, answers otherwise or not at all",
        "Let FUNCTION and weights fix all of it.",
    ),
}
"""By the name of the gate."""


def advice(gate: str, methods: Collection[str]) -> Advice:
    """Return what a failed check says of a model that has some of the four methods (search/auditing/protocol.py)."""
    found = ADVICE[gate]
    last = next((name for name in ("surrogate", "purify", "suspicion") if name in methods), "")
    return found if found.remedy else found._replace(remedy=_STAND_IN[last])
