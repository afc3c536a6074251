"""The verdict on a winner: one sentence that says what the defense is worth, the same in every place that shows one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attacks.confidence import difference
from attacks.threat import ThreatModel
from search.formatting import percent, spoken_eps, spoken_threat
from search.study.candidate import Candidate

UNDEFENDED, TRAINED = "undefended", "adversarially trained"
"""The names of the models that a winner is compared with: the bare classifier, and one that adversarial training at the
study's own norm and eps made, to convergence."""
IGNORANT = {
    "oblivious": "where the attacker does not know the defense",
    "black-box": "where the attacker sees only the model's answers",
}


@dataclass(frozen=True)
class Figures:
    """What a verdict compares of a model: fractions in [0, 1].

    Args:
        attacked: images of which every version is accepted and right, under the study's threat model.
        error: images of which some version is accepted and wrong, under the same.
        white_box: as `attacked`, by an attacker who knows the defense.
        clean: accuracy without an attack.
    """

    attacked: float
    error: float
    white_box: float
    clean: float

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Figures:
        """Return the figures of a score, of evidence, or of a baseline in it, which rejects nothing."""
        attacked = known["attacked_accuracy"]
        error = known.get("attacked_error", 1 - attacked)
        return cls(attacked, error, known["white_box_accuracy"], known["clean_accuracy"])

    @property
    def rejects(self) -> bool:
        """Whether attacked images are rejected, more than a table shows as 0.0 %."""
        return self.attacked + self.error < 0.9995


def verdict(
    threat: ThreatModel, images: int, winner: Figures, undefended: Figures, trained: Figures | None = None
) -> str:
    """Return what a defense is worth: beside no defense, in clean accuracy, and beside adversarial training.

    A difference within the 95 % interval (Newcombe) is said to be one that the images cannot tell. The images of two
    models are the same, which the interval does not use, so it is wider than need be. Where a defense rejects, errors
    are compared, as the search does; otherwise accuracies.

    Args:
        threat: of the study; `attacked` and `error` hold for it.
        images: how many were attacked.
        trained: the adversarially trained classifier, if there is one.
    """
    parts = [_beside_no_defense(threat, images, winner, undefended)]
    if _compared(winner.clean, undefended.clean, images) == "worse":
        parts.append(f"costs {round(100 * (undefended.clean - winner.clean), 1):g} points of clean accuracy")
    if trained is not None:
        how = {"better": "better than", "worse": "worse than", "equal": "about as good as"}
        found = how[_compared(1 - winner.error, 1 - trained.error, images)]
        parts.append(f"{found} adversarial training ({_share(trained, winner.rejects)})")
    return "; ".join(parts)


def verdict_of_search(winner: Candidate, undefended: Candidate) -> str:
    """Return the verdict by the search's own figures; a heavier audit may find less."""
    found, bare = Figures.of(vars(winner.score)), Figures.of(vars(undefended.score))
    return verdict(winner.score.threat, winner.score.images, found, bare)


def verdict_of_audit(evidence: Mapping[str, Any]) -> str:
    """Return the verdict by the audited figures.

    Args:
        evidence: of an export (docs/evidence.schema.json).
    """
    baselines = {name: Figures.of(known) for name, known in evidence["baselines"].items()}
    threat, images = ThreatModel(**evidence["threat"]), evidence["images"]
    return verdict(threat, images, Figures.of(evidence), baselines[UNDEFENDED], baselines.get(TRAINED))


def _beside_no_defense(threat: ThreatModel, images: int, winner: Figures, undefended: Figures) -> str:
    found = _compared(1 - winner.error, 1 - undefended.error, images)
    doubt = f", as far as {images:,} images can tell"
    said = {"better": "better than no defense", "worse": "worse than no defense", "equal": "no better than no defense"}
    figures, budget = _pair(winner, undefended), f"{threat.norm} eps {spoken_eps(threat.eps)}"
    if threat.knowledge == "white-box":
        return f"{said[found]}{doubt if found == 'equal' else ''}: {figures} ({spoken_threat(threat)})"
    known = _compared(winner.white_box, undefended.white_box, images)
    where = IGNORANT[threat.knowledge]
    there = f"{percent(winner.white_box, ' %')} against {percent(undefended.white_box, ' %')}"
    if found == "better" and winner.rejects:  # of how many images it is wrong white-box is not known
        return f"{said[found]} {where}: {figures}; where the attacker knows it, right on {there} ({budget})"
    if found == "better" and known == "better":
        return f"{said[found]}: {figures} {where}, {there} where the attacker knows it ({budget})"
    if found == "better":
        return f"better only {where}: {figures}; where the attacker knows it, {there} ({budget})"
    return f"{said[found]}{doubt if found == 'equal' else ''}, even {where}: {figures} ({budget})"


def _pair(winner: Figures, undefended: Figures) -> str:
    against = f"{_share(winner, winner.rejects)} against {_share(undefended, winner.rejects, again=True)} undefended"
    return against + (f", right on {percent(winner.attacked, ' %')}, the others rejected" if winner.rejects else "")


def _share(of: Figures, wrong: bool, again: bool = False) -> str:
    if not wrong:
        return percent(of.attacked, " %")
    return ("" if again else "wrong on ") + percent(of.error, " %")


def _compared(one: float, other: float, images: int) -> Literal["better", "worse", "equal"]:
    """Return how the first of two shares compares with the second, `equal` where chance explains the difference."""
    low, high = difference(one, images, other, images)
    return "better" if low > 0 else "worse" if high < 0 else "equal"
