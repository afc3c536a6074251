"""Exports: what is written is what was trained, and its number holds against an attacker who did not write our code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import Defended
from defenses.puvae import PuVAE
from search import export as exports
from search import session, tasks
from search.export import AlarmError, export, load
from search.record import Record
from search.run import run
from search.score import Candidate
from search.session import export_all, pick
from search.study import Study
from search.trial import store_of
from spaces.space import InputError
from tests.conftest import digits_study

EPS, IMAGES = 0.1, 150


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A search of two trainings on digits, long enough to purify."""
    more = {"epochs": 12, "eps": EPS, "eval_images": IMAGES, "classifier_epochs": 12, "trials": 1}
    knobs = {"knobs": {"conv_maps": 8, "decoder_maps": 16, "dense": 128, "lambda_rc": 1, "lambda_kl": 0.1}}
    study = digits_study(tmp_path_factory.mktemp("runs"), **more, **knobs)
    assert run(study, [], debug=True) == "finished"
    return study


@pytest.fixture(scope="module")
def folder(searched: Study) -> Path:
    best = pick(searched, pareto=False, top=1, candidate=None)[0][0]
    return export(searched, best, store_of(searched), searched.folder / "export", despite_alarms=True)


def independent_pgd(model: Defended, x: Tensor, y: Tensor) -> Tensor:
    """Projected gradient descent written from Madry et al. 2017, Eq. 4, sharing nothing with attacks/.

    Four gradients are tried, from several starts: through the purifier, with the identity in its place, through soft
    class choices, and of the bare classifier.
    """
    defense, classifier = model.defense, model.classifier
    assert isinstance(defense, PuVAE)

    def soft(z: Tensor, temperature: float) -> Tensor:
        projections = defense.candidates(z)
        distance = (projections - z.unsqueeze(1)).square().mean(dim=(2, 3, 4)).sqrt()
        return classifier((distance.div(-temperature).softmax(1)[..., None, None, None] * projections).sum(1))

    def straight(z: Tensor) -> Tensor:
        with torch.no_grad():
            shift = defense.purify(z) - z
        return classifier(z + shift)

    robust = model(x).argmax(1) == y
    paths: list[Callable[[Tensor], Tensor]] = [model, straight, classifier]
    paths += [partial(soft, temperature=temperature) for temperature in (0.03, 0.01, 0.003)]
    for path in paths:
        for start in range(2):
            torch.manual_seed(100 + start)
            delta = (2 * torch.rand_like(x) - 1) * EPS
            for step in range(60):
                z = (x + delta).clamp(0, 1).requires_grad_()
                loss = F.cross_entropy(path(z), y)
                with torch.no_grad():
                    moved = z + EPS / 8 * torch.autograd.grad(loss, z)[0].sign()
                    delta = (moved - x).clamp(-EPS, EPS)
                    if step % 10 == 9:
                        robust &= model((x + delta).clamp(0, 1)).argmax(1) == y
    return robust


def test_an_independent_attacker_finds_the_exported_accuracy(folder: Path) -> None:
    evidence = json.loads((folder / "evidence.json").read_text())
    assert evidence["threat"] == {"norm": "Linf", "eps": EPS, "knowledge": "white-box"}
    x, y = tasks.load("digits", "validation", None, IMAGES)
    found = float(independent_pgd(load(folder), x, y).double().mean())
    print(f"independent PGD {found:.3f}, exported {evidence['attacked_accuracy']:.3f}")
    assert abs(found - evidence["attacked_accuracy"]) <= 0.05
    assert evidence["clean_accuracy"] - evidence["attacked_accuracy"] > 0.1  # neither is trivially the clean accuracy
    assert evidence["attacked_accuracy"] > 0.05  # nor trivially zero


def test_an_export_is_a_plain_module_with_the_searchs_clean_accuracy(folder: Path) -> None:
    model = load(folder)
    assert isinstance(model, nn.Module) and not model.training
    x, y = tasks.load("digits", "validation", None, IMAGES)
    logits = model(x)
    assert logits.shape == (IMAGES, 10)
    evidence = json.loads((folder / "evidence.json").read_text())
    assert float((logits.argmax(1) == y).double().mean()) == pytest.approx(evidence["clean_accuracy"], abs=0.03)


def test_the_evidence_says_all_that_a_number_needs(folder: Path, searched: Study) -> None:
    evidence = json.loads((folder / "evidence.json").read_text())
    assert next(iter(evidence)) == "alarms"
    best = pick(searched, pareto=False, top=1, candidate=None)[0][0]
    assert evidence["candidate"] == best.candidate == folder.name
    assert evidence["attacked_accuracy"] <= best.score.attacked_accuracy == evidence["attacked_accuracy_of_the_search"]
    assert evidence["white_box_accuracy"] <= evidence["oblivious_accuracy"] <= evidence["clean_accuracy"]
    assert evidence["seeds"]["search"] != evidence["seeds"]["audit"]
    assert "validation" in evidence["split"] and len(evidence["data_sha256"]) == 64
    assert {gate["name"] for gate in evidence["gates"]} >= {"determinism", "gradient", "convergence", "unbounded"}
    (pgd,) = evidence["budgets"]["audit"]["white_box"]
    alpha = pgd.pop("alpha")
    assert alpha == pytest.approx(EPS / 10)
    fixed = {"attack": "pgd-40", "class": "torchattacks.PGD", "norm": "Linf", "targeted": False}
    assert pgd == {**fixed, "eps": EPS, "steps": 40}
    assert evidence["versions"]["torch"] == torch.__version__
    card = (folder / "card.md").read_text()
    assert "white-box, Linf eps 0.1" in card and "sigma_eps" in card


def test_an_export_holds_no_pickle(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} == {".yaml", ".safetensors", ".json", ".md", ".png"}
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes()[8:9] == b"{"


@pytest.mark.parametrize("name", ["weights.safetensors", "classifier.safetensors", "config.yaml"])
def test_a_changed_byte_is_found(folder: Path, name: str) -> None:
    good = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{name} must have the SHA-256"):
            load(folder)
    finally:
        (folder / name).write_bytes(good)


def test_what_is_no_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an export must be a folder with whole files"):
        load(tmp_path)


def test_an_export_never_overwrites_another(folder: Path, searched: Study) -> None:
    best = pick(searched, pareto=False, top=1, candidate=None)[0][0]
    with pytest.raises(InputError, match="an export must be a new folder"):
        export(searched, best, store_of(searched), folder.parent)


def test_a_candidate_whose_fit_is_another_by_now_is_not_exported(searched: Study, tmp_path: Path) -> None:
    best = pick(searched, pareto=False, top=1, candidate=None)[0][0]
    with pytest.raises(InputError, match="an export needs the fit that was scored"):
        export(searched, replace(best, fit="0" * 16), store_of(searched), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_alarm_refuses_the_export_and_despite_writes_it(
    searched: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = pick(searched, pareto=False, top=1, candidate=None)[0][0]
    monkeypatch.setattr(exports, "REPRODUCED", -1.0)  # a gate that cannot pass
    with pytest.raises(AlarmError, match="reproduced"):
        export(searched, best, store_of(searched), tmp_path)
    assert list(tmp_path.iterdir()) == []
    written = export(searched, best, store_of(searched), tmp_path, despite_alarms=True)
    assert (written / "evidence.json").read_text().splitlines()[1].startswith(' "alarms": [')
    assert "ALARM" in (written / "card.md").read_text()


def test_the_best_that_passes_is_exported_where_a_better_one_is_refused(
    searched: Study, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked, wanted = pick(searched, pareto=False, top=1, candidate=None)

    def strict(study: Study, candidate: Candidate, store: object, out: Path, **options: object) -> Path:
        if candidate == ranked[0]:
            raise AlarmError(f"{candidate.candidate} raised 1 alarm(s): gradient")
        return Path(shutil.copytree(folder, out / candidate.candidate))

    monkeypatch.setattr(session, "export", strict)
    console = Console(record=True, width=200)
    assert session.export_all(searched, ranked, wanted, tmp_path, console, despite_alarms=False) == 0
    assert [path.name for path in tmp_path.iterdir()] == [ranked[1].candidate]
    said = console.export_text()
    assert "refused: " in said and f"exported {tmp_path}" in said
    assert "attacked accuracy (white-box, Linf eps 0.1; the search's lighter attacks left" in said
    assert session.export_all(searched, ranked[:1], 1, tmp_path, console, despite_alarms=False) == 1


def test_candidates_are_picked_by_rank_front_or_name(searched: Study) -> None:
    every: list[Candidate] = Record(searched).candidates()
    assert pick(searched, pareto=False, top=3, candidate=None) == (Record(searched).feasible(), 3)
    assert pick(searched, pareto=False, top=None, candidate=every[-1].candidate) == ([every[-1]], 1)
    front, wanted = pick(searched, pareto=True, top=None, candidate=None)
    assert wanted == len(front) and {c.candidate for c in front} <= {c.candidate for c in every}
    assert pick(searched, pareto=False, top=None, candidate=every[-1].candidate[:-1]) == ([every[-1]], 1)
    with pytest.raises(InputError, match="a candidate must be one of the 6 in"):
        pick(searched, pareto=False, top=None, candidate="nobody")


def test_the_export_of_another_search_is_not_taken_for_ones_own(searched: Study, folder: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["study"]["name"] = "another"
    (tmp_path / folder.name).mkdir()
    (tmp_path / folder.name / "config.yaml").write_text(yaml.safe_dump(config))
    candidates, wanted = pick(searched, pareto=False, top=1, candidate=None)
    with pytest.raises(InputError, match="is of another: choose another --out"):
        export_all(searched, candidates, wanted, tmp_path, Console(), despite_alarms=True)
