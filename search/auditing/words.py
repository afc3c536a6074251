"""What an audit found, in words: the verdict, the table of attacks, the failed checks; the same in every place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from attacks.confidence import wilson
from search.auditing.advice import Effect, advice
from search.export.checks import checks, passed, sizes
from search.formatting import percent, spoken_eps

UNSEEN = (
    "attacks that nobody has thought of",
    "whether the model was trained on these images",
    "an optimisation inside purify that has not converged",
    "other norms, corruptions, images from elsewhere",
)
"""What no gate of such an audit can see."""
KNOWS = {
    "white-box": "sees the whole model, differentiates through it (or around its purifier, BPDA) and averages over its "
    "noise (EOT)",
    "oblivious": "sees the classifier and not the purifier",
    "black-box": "sees neither: it asks the model for classes, trains a substitute on the answers and attacks that",
}
CUMULATIVE = (
    "White-box rows are cumulative; those on the levels of clean images (levels, extremes, regular) begin anew."
)
_percent = partial(percent, unit=" %")


class Failed(NamedTuple):
    """A check that failed, what it says about the figure, and what to do about it."""

    name: str
    law: str
    figure: float
    limit: float
    effect: Effect
    because: str
    remedy: str

    @property
    def meaning(self) -> str:
        """A sentence: what follows for the figure, and why."""
        return f"{self.effect.capitalize()}, because {self.because}."


class Row(NamedTuple):
    """An attack, and the accuracy after it with its 95 % interval."""

    attack: str
    left: float
    interval: tuple[float, float]


def threat(evidence: Mapping[str, Any]) -> str:
    """Return the threat model, such as `white-box Linf 8/255`."""
    told = evidence["threat"]
    return f"{told['knowledge']} {told['norm']} {spoken_eps(told['eps'])}"


def failed(evidence: Mapping[str, Any]) -> list[Failed]:
    """Return the failed checks, those that say most about the figure first."""
    methods = evidence["model"]["methods"]
    found = [
        Failed(gate["name"], gate["law"], gate["figure"], gate["limit"], *advice(gate["name"], methods))
        for gate in evidence["gates"]
        if not gate["passed"]
    ]
    return sorted(found, key=lambda one: [*Effect].index(one.effect))


def verdict(evidence: Mapping[str, Any]) -> str:
    """Return two sentences: the figure, and whether it can be believed."""
    left = _percent(evidence["attacked_accuracy"])
    low, high = (percent(edge, unit="") for edge in evidence["attacked_accuracy_interval"])
    figure = f"Under {threat(evidence)} the model keeps {left} ({low} to {high}) of {evidence['images']} images."
    wrong, total = failed(evidence), len(evidence["gates"])
    if not wrong:
        return f"{figure} {passed(checks(evidence['gates']))}."
    names, first = ", ".join(one.name for one in wrong), wrong[0]
    if first.effect == Effect.USELESS:
        return f"{figure} It can be believed, but {first.effect}: {first.because} (check {first.name})."
    many = f"{len(wrong)} of {total} checks failed ({names})" if len(wrong) > 1 else f"The check {names} failed"
    return f"{figure} {many}: {first.effect}, because {first.because}."


def rows(evidence: Mapping[str, Any]) -> Iterator[Row]:
    """Yield what is left after each attack; white-box accuracies are cumulative, the others each alone."""
    for trail in evidence["attacks"].values():
        for attack, left in trail.items():
            yield Row(attack, left, wilson(left, evidence["images"]))


def page(evidence: Mapping[str, Any]) -> str:
    """Return the verdict, the table of attacks and the failed checks, in markdown."""
    found = checks(evidence["gates"])
    table = "\n".join(f"| {row.attack} | {_percent(row.left)} | {_span(row.interval)} |" for row in rows(evidence))
    return f"""{verdict(evidence)}

| after | accuracy left | 95 % interval |
| --- | --- | --- |
| clean | {_percent(evidence["clean_accuracy"])} | {_span(evidence["clean_accuracy_interval"])} |
{table}
| **all, {threat(evidence)}** | {_percent(evidence["attacked_accuracy"])} | \
{_span(evidence["attacked_accuracy_interval"])} |

Checked on {sizes(found)}. {CUMULATIVE}
{problems(evidence)}"""


def problems(evidence: Mapping[str, Any]) -> str:
    """Return the failed checks in markdown, those with one remedy together; empty if all passed."""
    together = dict[str, list[Failed]]()
    for one in failed(evidence):
        together.setdefault(one.remedy, []).append(one)
    return "".join(f"\n{''.join(map(_problem, ones))}\n**What to do:** {remedy}\n" for remedy, ones in together.items())


def _problem(one: Failed) -> str:
    return f"- **{one.name}** failed ({one.figure:.3g}, at most {one.limit:.3g}): {one.because}.\n"


def _span(interval: tuple[float, float]) -> str:
    return " to ".join(_percent(edge) for edge in interval)
