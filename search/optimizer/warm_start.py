"""Warm starts: settings and candidates of an earlier search or an export that lie in a new search's space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from search.optimizer.history import SearchHistory
from search.study.candidate import Candidate
from search.study.catalog import open_search, search_names
from search.study.ranking import feasible
from search.study.study import ResolvedStudy, Study
from spaces.domain import contains
from spaces.exceptions import InputError, choose
from spaces.space import Params

FIRST = 5
"""How many settings of another search are tried first."""


@dataclass(frozen=True)
class WarmStart:
    """The settings and candidates that a new search takes over.

    Args:
        settings: settings to try first, the best before the others.
        candidates: those evaluated under the same conditions, for the sampler to learn from.
        said: one line for the user.
    """

    settings: Sequence[Params]
    candidates: Sequence[Candidate]
    said: str


def warm_start_of(study: Study, source: str) -> WarmStart:
    """Return the settings and candidates of a search of the same storage, or of an export's folder, for a study.

    Raises:
        InputError: the source is neither of them.
    """
    if (Path(source) / "config.yaml").is_file():
        return _of_export(study, Path(source))
    known = [name for name in search_names(study.storage) if name != study.name]
    if not known:
        raise InputError(
            f"warm_start must be the folder of an export or a search of {study.storage}, but is {source!r}"
        )
    choose("warm_start, where it is no folder of an export,", source, known)
    return _of_search(study, source)


def _of_search(study: Study, source: str) -> WarmStart:
    other, resolved = open_search(source, study.storage), study.resolved
    found = SearchHistory(other).candidates()
    inside = [c for c in found if c.defense == study.defense and _lies_in(resolved, c.params)]
    # One setting for each fit, since a fit's other inference settings are scored in any case.
    fits: dict[str, Params] = {}
    for candidate in feasible(study, inside):
        fits.setdefault(str(candidate.params.train), candidate.params)
    settings = list(fits.values())[:FIRST]
    same = _evaluated_by(other) == _evaluated_by(study)
    other_way = "evaluated in another way, so the sampler learns from none"
    learnt = f"the sampler learns from all {len(inside)}" if same else other_way
    return WarmStart(
        settings,
        inside if same else [],
        f"warm start from {source}: {len(inside)} of its {len(found)} candidates lie in this space, "
        f"the settings of the best {len(settings)} trainings are tried first; {learnt}",
    )


def _of_export(study: Study, folder: Path) -> WarmStart:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        defense, params = config["defense"], Params(config["train"], config["inference"])
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise InputError(f"warm_start must be an export with a whole config.yaml, but {folder}: {error}") from None
    inside = defense == study.defense and _lies_in(study.resolved, params)
    taken = "1 of 1 settings lies in this space and is tried first" if inside else "0 of 1 settings lie in this space"
    return WarmStart([params] if inside else [], [], f"warm start from {folder}, an export of {defense}: {taken}")


def _lies_in(resolved: ResolvedStudy, params: Params) -> bool:
    """Return whether a setting lies in the space; searched thresholds may lie anywhere, since a curve picks them."""
    space, values = resolved.space, params.flat()
    picked = {name for name in resolved.defense.thresholds() if not space.inference[name].single()}
    return values.keys() == space.flat().keys() and all(
        contains(domain, values[name])
        for name, domain in space.flat().items()
        if name not in picked and space.matters(name, values)
    )


def _evaluated_by(study: Study) -> tuple[object, ...]:
    """Return what a candidate's figures depend on besides its setting; on the precision they hardly do (engine.md)."""
    resolved = study.resolved
    substitute = resolved.substitute if study.threat == "black-box" else None
    trained = (study.train_images, study.classifier_epochs, study.seed)
    return (study.defense, study.label, resolved.threat, study.suite, resolved.eval_images, substitute, *trained)
