"""Exports: what is written is what was trained, and its number holds against an attacker who did not write our code."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import defenses
import launch
from attacks.audit.audit import Audit, audit
from attacks.catalog import NES_30
from attacks.suites import SUITES, Suite
from defenses.base import Defended
from defenses.puvae import PuVAE
from search.data import splits
from search.data.datasets import DATASETS
from search.engine.run import run
from search.exceptions import AlarmError
from search.export import evidence, exporter, provenance
from search.export.attack import attack, page
from search.export.exporter import export, export_all
from search.export.loader import load
from search.export.model_card import card
from search.formatting import spoken_device
from search.optimizer.history import SearchHistory, pick
from search.storage.seal import FILES, SEAL
from search.study.candidate import Candidate
from search.study.catalog import open_search
from search.study.study import Study
from search.study.verdict import verdict_of_audit
from search.study.winner import audits
from spaces.exceptions import InputError
from tests.attacks.test_ambient import hostile
from tests.conftest import digits_study
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

EPS, IMAGES = 0.1, 100


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A search of two trainings on digits, long enough to purify; each setting has noise."""
    more: dict[str, object] = {"epochs": 12, "eps": EPS, "eval_images": IMAGES, "classifier_epochs": 12, "trials": 1}
    more["precision"] = "float32"
    knobs = {
        "knobs": {
            "conv_maps": 8,
            "decoder_maps": 16,
            "dense": 128,
            "lambda_rc": 1,
            "lambda_kl": 0.1,
            "sigma_eps": [0.1, 0.2],
        }
    }
    study = digits_study(tmp_path_factory.mktemp("runs"), **more, **knobs)
    assert run(study, [], debug=True) == "finished"
    return study


@pytest.fixture(scope="module")
def audited(searched: Study) -> Iterator[list[Audit]]:
    """The audit of the best candidate, which takes a while, and is made by the first export alone."""
    found: list[Audit] = []

    def once(*images: object, **more: object) -> Audit:
        found[:] = found or [audit(*images, **more)]  # type: ignore[arg-type]
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "audit", once)
        yield found


@pytest.fixture(scope="module")
def folder(searched: Study, audited: list[Audit]) -> Path:
    best = pick(searched, pareto=False, top=1, candidate=None)[0][0]
    return export(searched, best, searched.store, searched.folder / "export", despite_alarms=True)


def independent_pgd(model: Defended, x: Tensor, y: Tensor, draws: int = 20) -> Tensor:
    """Projected gradient descent written from Madry et al. 2017, Eq. 4, sharing nothing with attacks/.

    Four gradients are tried, from several starts: through the purifier, with the identity in its place, through soft
    class choices, and of the bare classifier. Returns what withstands all in each draw of the noise, DN.
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

    versions = [x]
    paths: list[Callable[[Tensor], Tensor]] = [model, straight, classifier]
    paths += [partial(soft, temperature=temperature) for temperature in (0.03, 0.01, 0.003)]
    for path in paths:
        for start in range(2):
            torch.manual_seed(100 + start)
            delta = (2 * torch.rand_like(x) - 1) * EPS
            for _ in range(60):
                z = (x + delta).clamp(0, 1).requires_grad_()
                loss = F.cross_entropy(path(z), y)
                with torch.no_grad():
                    moved = z + EPS / 8 * torch.autograd.grad(loss, z)[0].sign()
                    delta = (moved - x).clamp(-EPS, EPS)
            versions.append((x + delta).clamp(0, 1))
    robust = torch.ones(draws, len(x), dtype=torch.bool)
    for draw in range(draws):
        for version in versions:
            torch.manual_seed(draw)  # one noise for all versions
            robust[draw] &= model(version).argmax(1) == y
    return robust


def test_an_independent_attacker_finds_the_exported_accuracy(folder: Path) -> None:
    said = json.loads((folder / "evidence.json").read_text())
    assert said["threat"] == {"norm": "Linf", "eps": EPS, "knowledge": "white-box"}
    x, y = splits.load("digits", "validation", None, IMAGES)
    found = float(independent_pgd(load(folder), x, y).double().mean())
    print(f"independent PGD {found:.3f}, exported {said['attacked_accuracy']:.3f}")
    assert abs(found - said["attacked_accuracy"]) <= 0.05
    assert said["clean_accuracy"] - said["attacked_accuracy"] > 0.1  # neither is trivially the clean accuracy
    assert said["attacked_accuracy"] > 0.05  # nor trivially zero


def test_an_export_is_a_plain_module_with_the_searchs_clean_accuracy(folder: Path) -> None:
    model = load(folder)
    assert isinstance(model, nn.Module) and not model.training
    x, y = splits.load("digits", "validation", None, IMAGES)
    logits = model(x)
    assert logits.shape == (IMAGES, 10)
    said = json.loads((folder / "evidence.json").read_text())
    assert float((logits.argmax(1) == y).double().mean()) == pytest.approx(said["clean_accuracy"], abs=0.03)


@pytest.mark.parametrize("inference", [False, True])
def test_an_export_answers_as_it_was_judged_whatever_the_caller_has_set(small: Path, inference: bool) -> None:
    x_NCHW = torch.rand(4, 1, 8, 8)
    judged = load(small)
    with hostile(inference=inference):
        model = load(small)
        logits_NK, accept_N = model(x_NCHW), model.accept(x_NCHW)
    assert torch.equal(logits_NK, judged(x_NCHW)) and torch.equal(accept_N, judged.accept(x_NCHW))
    assert not logits_NK.is_inference()


def test_the_evidence_says_all_that_a_number_needs(folder: Path, searched: Study) -> None:
    said = json.loads((folder / "evidence.json").read_text())
    assert next(iter(said)) == "alarms"
    best = pick(searched, pareto=False, top=1, candidate=None)[0][0]
    assert said["candidate"] == best.candidate == folder.name
    assert best.score.attacked_accuracy == said["attacked_accuracy_of_the_search"]
    assert said["attacked_accuracy_worst_draw"] <= said["attacked_accuracy"]
    assert said["draws"] > 1 and 0 <= said["known_noise_accuracy"] <= said["white_box_accuracy"] + 0.05
    assert [attack["attack"] for attack in said["budgets"]["audit"]["known_noise"]] == ["pgd-40"]
    assert said["attacked_accuracy"] <= best.score.attacked_accuracy + 1 / IMAGES  # other draws of the noise
    low, high = said["attacked_accuracy_interval"]
    assert low < said["attacked_accuracy"] < high
    assert set(said["baselines"]) == {"undefended"}
    assert said["white_box_accuracy"] <= said["oblivious_accuracy"] <= said["clean_accuracy"]
    assert said["seeds"]["search"] != said["seeds"]["audit"]
    assert "validation" in said["split"] and len(said["data_sha256"]) == 64
    assert {gate["check"] for gate in said["gates"]} == set(range(1, 14))
    pgd, *others = said["budgets"]["audit"]["white_box"]
    assert "choice-40" in {other["attack"] for other in others}
    alpha = pgd.pop("alpha")
    assert alpha == pytest.approx(EPS / 10)
    fixed = {"attack": "pgd-40", "class": "attacks.PGD", "norm": "Linf", "targeted": False}
    assert pgd == {**fixed, "eps": EPS, "steps": 40}
    assert said["versions"]["torch"] == torch.__version__
    card = (folder / "card.md").read_text()
    assert "white-box, Linf eps 0.1" in card and "sigma_eps" in card


def test_the_evidence_says_which_code_data_and_libraries_made_the_number(folder: Path, searched: Study) -> None:
    said = json.loads((folder / "evidence.json").read_text())
    assert said["search"] == searched.name
    assert said["data"] == "digits" and said["data_licence"].startswith("CC BY 4.0")
    assert len(said["code"]["sha256"]) == 64 and said["code"]["commit"] == provenance.code()["commit"]
    assert {"python", "torch", "safetensors", "pydantic", "wandb"} <= set(said["versions"])
    assert said["model"]["source"].startswith("Hwang et al., PuVAE")
    assert searched.storage not in (folder / "evidence.json").read_text() + (folder / "config.yaml").read_text()


def test_code_outside_a_repository_is_named_by_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = provenance.code()
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert provenance.code() == {"commit": None, "changed_since": False, "sha256": known["sha256"]}


def test_every_data_set_names_its_licence() -> None:
    assert all(data.licence for data in DATASETS.values())


def test_the_card_reads_as_a_model_card(folder: Path) -> None:
    said, page = json.loads((folder / "evidence.json").read_text()), (folder / "card.md").read_text()
    assert page == card(said)  # nothing stands in it that does not stand in the evidence
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert headings == [
        *("What it is", "Intended use", "How it was trained", "Data", "Threat model", "Evaluation", "Audit"),
        *("Limits and known failures", "Latency", "How to load", "How to reproduce", "Citation"),
    ]
    low, high = said["attacked_accuracy_interval"]
    assert f"{100 * low:.1f} to {100 * high:.1f}" in page and "white-box, Linf eps 0.1" in page
    for word in (
        said["data_sha256"],
        "CC BY 4.0",
        "undefended",
        "IEEE Access",
        spoken_device(said["device"]),
        torch.__version__,
    ):
        assert word in page
    assert "None" not in page and "{{" not in page
    assert said["model"]["consulted"] == ["B"] and "trained with the classifier `B`, and protects `A`" in page


def test_a_card_says_what_a_black_box_attacker_asked_and_who_was_refused(folder: Path) -> None:
    said = json.loads((folder / "evidence.json").read_text())
    threat = said["threat"] | {"knowledge": "black-box"}
    more = {"black_box_accuracy": 0.25, "black_box_queries": 9600, "refused_before_it": 2, "rejects": True}
    page = card(said | more | {"threat": threat})
    assert "black-box (9600 queries) | 25.0 %" in page and "model.accept(x)" in page
    assert "2 candidate(s) that ranked higher were refused" in page


def test_the_command_of_the_card_makes_the_candidate_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.loads((folder / "evidence.json").read_text())
    storage = str(folder.parents[2])
    words = shlex.split(said["reproduce"])
    monkeypatch.setattr("sys.argv", [*words[1:], "--storage", storage, "--wandb", "disabled", "--debug"])
    assert launch.main() == 0
    (again,) = SearchHistory(open_search("smoke-again", storage)).candidates()
    assert (again.candidate, again.fit) == (said["candidate"], said["fit"])
    assert again.score.attacked_accuracy == said["attacked_accuracy_of_the_search"]


def test_an_export_holds_no_pickle(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {*FILES, SEAL}
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes()[8:9] == b"{"


@pytest.mark.parametrize("place", [0, 0.5, -1])
@pytest.mark.parametrize("name", [*FILES, SEAL])
def test_a_changed_byte_is_found(folder: Path, name: str, place: float) -> None:
    good = (folder / name).read_bytes()
    at = int(place * len(good)) % len(good)
    try:
        (folder / name).write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(InputError, match="an export must be as it was written") as refused:
            load(folder)
        assert name == SEAL or f"another {name} than" in str(refused.value)
    finally:
        (folder / name).write_bytes(good)


def test_a_figure_that_was_edited_by_hand_is_found(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    said = json.loads((copy / "evidence.json").read_text())
    (copy / "evidence.json").write_text(json.dumps(said | {"attacked_accuracy": 0.99}, indent=1))
    with pytest.raises(InputError, match="has another evidence.json than its SHA256SUMS says"):
        load(copy)
    (copy / "pictures.png").unlink()
    with pytest.raises(InputError, match="pictures.png: No such file or directory; export it anew"):
        load(copy)


BARRED = """
import pickle, runpy, sys
class Bar:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {barred}:
            raise ModuleNotFoundError(name + " is barred", name=name)
sys.meta_path.insert(0, Bar())
import torch
def never(*args, **options):
    raise AssertionError("a pickle was run")
torch.load = pickle.load = pickle.loads = pickle.Unpickler = never
from search import load
model = load(sys.argv[1])
logits = model(torch.full((2, 1, 8, 8), 0.5))
print(logits.shape[1], [name for name in {barred} if name in sys.modules])
import defenses
print(len([defenses.find(name) for name in defenses.names() if name != "gmvae"]))
"""


def test_an_export_loads_where_no_more_is_installed_than_its_card_says(folder: Path) -> None:
    (line,) = (line for line in (folder / "card.md").read_text().splitlines() if line.startswith("pip install"))
    asked = [word.partition("==")[0] for word in line.split()[2:]]
    assert asked == ["torch", "safetensors", "numpy", "optuna"] and "+" not in line, "no registry has a local build"
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = {plain(line.partition("==")[0]) for line in lines}
    owners = {name: set(map(plain, found)) for name, found in packages_distributions().items()}
    modules = {name for name, found in owners.items() if found & locked}
    needed = set().union(*map(needs_of, asked))
    kept = {name for name, found in owners.items() if found & needed}
    barred = sorted(modules - kept)
    assert {"ray", "torchattacks", "pydantic", "pandas", "wandb", "scipy", "plotly", "rich"} <= set(barred)
    script = BARRED.replace("{barred}", repr(set(barred)))
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    logits, found = done.stdout.splitlines()
    assert logits == "10 []" and found == str(len(defenses.names()) - 1)


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needs_of(name: str) -> set[str]:
    """Return a distribution and all that it needs."""
    found, left = set[str](), [name]
    while left:
        found.add(one := left.pop())
        with suppress(PackageNotFoundError):  # on another platform
            asked = {plain(re.split(r"[^\w.-]", line)[0]) for line in requires(one) or () if "extra ==" not in line}
            left += asked - found
    return found


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(3, 8, 8), "but are 3 x 8 x 8"),
        (torch.rand(3, 1, 9, 8), "but are 3 x 1 x 9 x 8"),
        (torch.rand(3, 1, 8, 8).double(), "torch.float64"),
        (torch.ones(3, 1, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (torch.full((3, 1, 8, 8), 255.0), "but go from 255 to 255"),
        (torch.full((3, 1, 8, 8), -0.5), "but go from -0.5"),
        (torch.full((1, 1, 8, 8), torch.nan), "but go from nan"),
        ([0.5], "but are a list"),
    ],
)
def test_what_is_no_image_of_the_task_is_refused(folder: Path, images: Any, words: str) -> None:
    model = load(folder)
    for ask in (model, model.accept):
        with pytest.raises(InputError, match=re.escape("images must be a tensor N x 1 x 8 x 8, torch.float32")) as said:
            ask(images)
        assert words in str(said.value)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10) and model(torch.rand(0, 1, 8, 8)).shape == (0, 10)


def test_what_is_no_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an export must be a folder with whole files"):
        load(tmp_path)


def test_an_export_never_overwrites_another(folder: Path, searched: Study) -> None:
    best = pick(searched, pareto=False, top=1, candidate=None)[0][0]
    with pytest.raises(InputError, match="an export must be a new folder"):
        export(searched, best, searched.store, folder.parent)


def test_a_candidate_whose_fit_is_another_by_now_is_not_exported(searched: Study, tmp_path: Path) -> None:
    best = pick(searched, pareto=False, top=1, candidate=None)[0][0]
    with pytest.raises(InputError, match="an export needs the fit that was scored"):
        export(searched, replace(best, fit="0" * 16), searched.store, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_alarm_refuses_the_export_and_despite_writes_it(
    searched: Study, audited: list[Audit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = pick(searched, pareto=False, top=1, candidate=None)[0][0]
    with monkeypatch.context() as patch, pytest.raises(AlarmError, match="reproduced"):
        patch.setattr(evidence, "REPRODUCED", -1.0)  # a gate that cannot pass
        patch.setattr(exporter, "_refused_before", lambda *_: None)  # its own tests are in test_refused.py
        export(searched, best, searched.store, tmp_path)
    assert list(tmp_path.iterdir()) == []
    noted = json.loads((searched.folder / "audits" / f"{best.candidate}.json").read_text())
    assert any("reproduced" in alarm for alarm in noted["alarms"])
    exported = searched.folder / "export" / best.candidate / "evidence.json"  # by another test
    counts = json.loads(exported.read_text()) if exported.exists() else noted
    assert audits(searched, [best])[best.candidate]["refused"] is bool(counts["alarms"])
    written = export(searched, best, searched.store, tmp_path, despite_alarms=True)
    assert f"**Verdict: {verdict_of_audit(noted)}.**" in (written / "card.md").read_text()
    assert (written / "evidence.json").read_text().splitlines()[1].startswith(' "alarms": [')
    assert "FAILED CHECK" in (written / "card.md").read_text()


def test_the_best_that_passes_is_exported_where_a_better_one_is_refused(
    searched: Study, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked, wanted = pick(searched, pareto=False, top=1, candidate=None)

    def strict(study: Study, candidate: Candidate, store: object, out: Path, **options: object) -> Path:
        if candidate == ranked[0]:
            raise AlarmError(f"{candidate.candidate} failed 1 audit check: gradient")
        return Path(shutil.copytree(folder, out / candidate.candidate))

    monkeypatch.setattr(exporter, "export", strict)
    for check in ("_worthless", "_refuse"):  # their own tests are in test_refused.py
        monkeypatch.setattr(exporter, check, lambda *_: "")
    console = Console(record=True, width=200)
    refused, written = exporter.export_all(searched, ranked, wanted, tmp_path, console, despite_alarms=False)
    assert refused["folder"] is None and "gradient" in refused["refused"]
    assert written["folder"] == str(tmp_path / ranked[1].candidate)
    known = json.loads((folder / "evidence.json").read_text())
    assert known.items() >= written["audited"].items() >= {"attacked_accuracy": known["attacked_accuracy"]}.items()
    assert [path.name for path in tmp_path.iterdir()] == [ranked[1].candidate]
    said = console.export_text()
    assert "refused: " in said and f"exported   {tmp_path}" in said
    assert written["verdict"] == verdict_of_audit(known) and f"verdict    {written['verdict']}" in said
    assert "attacked accuracy (white-box, Linf eps 0.1; the search's lighter attacks left" in said
    assert len(exporter.export_all(searched, ranked[:1], 1, tmp_path, console, despite_alarms=False)) == 1


def test_candidates_are_picked_by_rank_front_or_name(searched: Study) -> None:
    every: list[Candidate] = SearchHistory(searched).candidates()
    assert pick(searched, pareto=False, top=3, candidate=None) == (SearchHistory(searched).feasible(), 2)
    assert pick(searched, pareto=False, top=None, candidate=every[-1].candidate) == ([every[-1]], 1)
    front, wanted = pick(searched, pareto=True, top=None, candidate=None)
    assert wanted == len(front) and {c.candidate for c in front} <= {c.candidate for c in every}
    assert pick(searched, pareto=False, top=None, candidate=every[-1].candidate[:-1]) == ([every[-1]], 1)
    with pytest.raises(InputError, match="a candidate must be one of the 2 in"):
        pick(searched, pareto=False, top=None, candidate="nobody")


def test_the_export_of_another_search_is_not_taken_for_ones_own(searched: Study, folder: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["study"]["name"] = "another"
    (tmp_path / folder.name).mkdir()
    (tmp_path / folder.name / "config.yaml").write_text(yaml.safe_dump(config))
    candidates, wanted = pick(searched, pareto=False, top=1, candidate=None)
    with pytest.raises(InputError, match="is of another: choose another --out"):
        export_all(searched, candidates, wanted, tmp_path, Console(), despite_alarms=True)


def test_a_folder_that_cannot_be_written_is_named_before_an_audit_is_paid_for(searched: Study, tmp_path: Path) -> None:
    candidates, wanted = pick(searched, pareto=False, top=1, candidate=None)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        with pytest.raises(InputError, match=f"a folder of exports must be one that can be written, but {out}: "):
            export_all(searched, candidates, wanted, out, Console(), despite_alarms=True)


def test_an_export_that_was_changed_is_not_exported_again(searched: Study, folder: Path, tmp_path: Path) -> None:
    candidates, wanted = pick(searched, pareto=False, top=1, candidate=None)
    copy = shutil.copytree(folder, tmp_path / folder.name)
    assert export_all(searched, candidates, wanted, tmp_path, Console(quiet=True), despite_alarms=True)[0]["folder"]
    (copy / "card.md").write_text("It withstands everything.")
    with pytest.raises(InputError, match="has another card.md than its SHA256SUMS says: export it anew"):
        export_all(searched, candidates, wanted, tmp_path, Console(quiet=True), despite_alarms=True)


def test_an_export_is_attacked_by_any_suite(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["launch.py", "attack", str(folder), "--suite", "quick", "--images", "40", "--json"]
    )
    assert launch.main() == 0
    table = json.loads(capsys.readouterr().out)
    assert table["threat"] == {"norm": "Linf", "eps": EPS, "knowledge": "white-box"}
    assert (table["images"], table["draws"], table["split"]) == (40, 20, "validation")
    shares = table["attacked"]
    assert shares["worst"] <= shares["accuracy"] <= table["clean"]["accuracy"]
    assert shares["accuracy"] + shares["error"] + shares["rejection"] == pytest.approx(1)
    assert shares["interval"][0] < shares["accuracy"] < shares["interval"][1]
    sources = {f"white-box/pgd-5 ({source})" for source in ("surrogate", "bpda", "exact")}
    assert set(table["trail"]) == {"oblivious/ifgsm-targeted"} | sources
    assert {budget["attack"] for budget in table["budgets"]} == {"ifgsm-targeted", "pgd-5"}
    kept = folder / "attacks" / "quick-white-box-Linf-0.1-images-40-seed-1"
    assert json.loads(kept.with_name(kept.name + ".json").read_text()) == table
    assert "white-box, Linf eps 0.1" in kept.with_name(kept.name + ".md").read_text()
    load(folder)  # which the tables have not changed


def test_an_attack_that_asks_beyond_the_pixels_range_is_answered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimated = Suite(name="estimated", oblivious=(), white_box=(NES_30,), draws=1)
    monkeypatch.setitem(SUITES, "estimated", estimated)
    assert set(attack(folder, "estimated", images=2)["trail"]) == {"white-box/nes-30"}


def test_a_black_box_attacker_asks_the_whole_pipeline_and_is_weaker(folder: Path) -> None:
    table = attack(folder, "quick", knowledge="black-box")
    assert table["black_box_queries"] == 150 * 2**6
    by = table["substitute"]
    assert f"trained a {by} on 9600 answers" in page(table)
    assert (folder / "attacks" / f"quick-black-box-by-{by}-Linf-0.1-images-30-seed-1.json").exists()
    assert table["images"] == 30  # of 180; the attacker starts from the others
    assert set(table["trail"]) == {"black-box/ifgsm-targeted"}
    white = json.loads((folder / "attacks" / "quick-white-box-Linf-0.1-images-40-seed-1.json").read_text())
    assert white["attacked"]["accuracy"] < table["attacked"]["accuracy"] <= table["clean"]["accuracy"] + 0.05


def test_an_attack_on_other_data_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.data.splits.checksum", lambda *given: "another")
    with pytest.raises(InputError, match="^the data must be those of the export.* digits have another$"):
        attack(folder, "quick")


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"norm": "L2"}, "eps must be given where the norm is not the export's, Linf"),
        ({"images": 0}, "images must be from 1 to"),
        ({"images": 10**6}, "images must be from 1 to"),
        ({"eps": 2.0, "norm": "linf"}, r"eps must be from 0 to 1 in Linf, .* but is 2.0; did you mean 2/255\?"),
        ({"knowledge": "grey-box"}, "the threat model must be one of"),
        ({"knowledge": "black-box", "substitute": "Z"}, "must be one of A, B, C, D"),
    ],
)
def test_an_attack_outside_its_law_is_refused(folder: Path, wish: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        attack(folder, "quick", **wish)
