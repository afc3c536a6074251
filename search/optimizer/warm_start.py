"""Warm starts: settings and candidates of an earlier search or an export that lie in a new search's space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from search.formatting import brief
from search.optimizer.history import SearchHistory
from search.study.candidate import Candidate
from search.study.catalog import open_search, search_names
from search.study.loading import FROM_YAML
from search.study.ranking import feasible, refusals_in_words
from search.study.study import Study
from spaces.domain import contains, only, spoken, written
from spaces.exceptions import InputError, choose
from spaces.space import Params

FIRST = 5
"""How many settings of another search are tried first."""
FEW = 3
"""How many values outside the space are named."""


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
    other = open_search(source, study.storage)
    found = SearchHistory(other).candidates()
    inside = [c for c in found if not any(_outside(study, c.defense, c.params))]
    # One setting for each fit, since a fit's other inference settings are scored in any case.
    fits: dict[str, Params] = {}
    for candidate in feasible(study, inside):
        fits.setdefault(str(candidate.params.train), candidate.params)
    settings = list(fits.values())[:FIRST]
    same = _evaluated_by(other) == _evaluated_by(study)
    other_way = "evaluated in another way, so the sampler learns from none"
    learnt = f"the sampler learns from all {len(inside)}" if same else other_way
    lie = f"warm start from {source}: {len(inside)} of its {len(found)} candidates lie in this space"
    if not inside:
        why = _reasons(study, [(c.defense, c.params) for c in found]) if found else "it has none yet"
        return WarmStart([], [], f"{lie}, so nothing of it is used: {why}")
    first = f"the settings of the best {len(settings)} trainings are tried first"
    if not settings:
        first = f"none is tried first, since none keeps to the constraints: {refusals_in_words(study, inside)}"
    return WarmStart(settings, inside if same else [], f"{lie}, {first}; {learnt}")


def _of_export(study: Study, folder: Path) -> WarmStart:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_bytes())
        defense, params = config["defense"], Params(config["train"], config["inference"])
    except (OSError, yaml.YAMLError, *FROM_YAML) as error:
        raise InputError(f"warm_start must be an export with a whole config.yaml, but {folder}: {error}") from None
    why = _reasons(study, [(defense, params)])
    taken = f"0 of 1 settings lie in this space, so nothing of it is used: {why}" if why else ""
    taken = taken or "1 of 1 settings lies in this space and is tried first"
    return WarmStart([] if why else [params], [], f"warm start from {folder}, an export of {defense}: {taken}")


def _outside(study: Study, defense: str, params: Params) -> Iterator[tuple[str, str]]:
    """Yield what a setting of the study's space must be, and what this one is instead; nothing if it lies in it.

    Searched thresholds may lie anywhere, since a curve picks them.
    """
    resolved, values = study.resolved, params.flat()
    space, knobs = resolved.space, resolved.space.flat()
    if defense != study.defense:
        yield f"the defense must be {study.defense}", defense
        return
    if values.keys() != knobs.keys():  # of another version
        yield f"the knobs must be those of {defense} now", f"{', '.join(sorted(values.keys() ^ knobs.keys()))} besides"
        return
    picked = {name for name in resolved.defense.thresholds() if not space.inference[name].single()}
    for name, domain in knobs.items():
        if name not in picked and space.matters(name, values) and not contains(domain, values[name]):
            law = written(only(name, domain)) if domain.single() else spoken(domain)
            yield f"{name} must be {law}", brief(values[name])


def _reasons(study: Study, found: Sequence[tuple[str, Params]]) -> str:
    """Return why settings lie outside the study's space, with the values of the first few, the commonest reason first.

    Example: `conv_maps must be one of 16, 32, not 4, 8 (24 of 24)`
    """
    instead: dict[str, list[str]] = {}
    for defense, params in found:
        for law, value in _outside(study, defense, params):
            instead.setdefault(law, []).append(value)
    each = []
    for law, values in sorted(instead.items(), key=lambda one: -len(one[1])):
        distinct = list(dict.fromkeys(values))
        more = ", ..." if len(distinct) > FEW else ""
        each.append(f"{law}, not {', '.join(distinct[:FEW])}{more} ({len(values)} of {len(found)})")
    return "; ".join(each)


def _evaluated_by(study: Study) -> tuple[object, ...]:
    """Return what a candidate's figures depend on besides its setting; on the precision they hardly do (engine.md)."""
    resolved = study.resolved
    substitute = resolved.substitute if study.threat == "black-box" else None
    partner = resolved.partner if resolved.defense.consults == "partner" else None
    trained = (study.train_images, study.classifier_epochs, study.classifier_recipe, partner, study.weights, study.seed)
    return (study.defense, study.label, resolved.threat, study.suite, resolved.eval_images, substitute, *trained)
