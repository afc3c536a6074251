"""An audit of any model says what its accuracy under attack is, whether to believe it, and what to do otherwise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import search
from attacks.audit.audit import audit
from attacks.black_box import BlackBoxAttacker
from attacks.gradient_view import bare, gradients, openings, stochastic
from attacks.threat import ThreatModel
from defenses.base import Defended
from defenses.identity import Identity
from search.auditing import audit_report, images, run
from search.auditing.advice import ADVICE
from search.auditing.audit_report import AuditReport
from search.auditing.protocol import METHODS, adapted
from search.auditing.source import Source
from search.auditing.words import verdict
from spaces.exceptions import InputError
from tests.search.auditing.conftest import DATA, Heard, audited
from tests.search.cli.test_cli import launch
from tests.support.page import Page
from tests.support.paths import ROOT

WHITE = ThreatModel("Linf", 0.1, "white-box")


def failed(evidence: dict[str, Any]) -> set[str]:
    return {gate["name"] for gate in evidence["gates"] if not gate["passed"]}


def test_a_plain_net_passes_and_its_figure_is_that_of_the_audit_of_exports(
    heard: Callable[[str], Heard], home: Path, digits: tuple[Tensor, Tensor], classifier: nn.Module
) -> None:
    told, evidence, _ = heard("plain")
    assert told.code == 0 and failed(evidence) == set() and evidence["alarms"] == []
    given = images.images(str(home / "digits.npz"), "white-box")
    x, y = given.first(32)
    assert torch.equal(given.x_NCHW.sum(), (digits[0][1400:] * 255).round().div(255).sum())
    found = audit(classifier, x, y, WHITE, seed=1)
    assert evidence["attacks"]["audit"] == dict(found.robustness.trail)
    assert evidence["attacked_accuracy"] == found.robustness.attacked.accuracy
    ours = [gate.name for gate in found.gates if gate.name != "inner-loop"]
    assert [gate["name"] for gate in evidence["gates"]] == ["named", *ours, "confirmed"]
    assert "All 31 measurement checks passed: the figure can be believed, whatever it is." in told.out


def test_a_rounding_net_is_said_to_keep_too_much_and_why(heard: Callable[[str], Heard]) -> None:
    told, evidence, _ = heard("rounding")
    assert told.code == 1
    assert failed(evidence) >= {"gradient", "completeness", "square", "estimated"}
    assert evidence["attacked_accuracy"] > heard("plain")[1]["attacked_accuracy"] + 0.1
    assert "checks failed (gradient, " in told.out and ": the figure is likely too high, because images" in told.out
    assert "**What to do:** Split the model into purify and classify" in told.out


def test_split_in_two_the_same_net_is_attacked_around_its_rounding(heard: Callable[[str], Heard]) -> None:
    told, evidence, _ = heard("purifying")
    plain, rounding = (heard(name)[1]["attacked_accuracy"] for name in ("plain", "rounding"))
    assert evidence["attacked_accuracy"] < rounding and evidence["attacked_accuracy"] <= plain + 0.05
    assert "white-box/pgd-40 (bpda)" in evidence["attacks"]["audit"] and "gradient" in failed(evidence)
    assert evidence["model"]["methods"] == ["purify", "classify"] and set(evidence["baselines"]) == {"undefended"}
    assert evidence["latency_ms_p50"] >= 0 and heard("plain")[1]["latency_ms_p50"] is None
    assert "Give the model a surrogate" in told.out


def test_with_a_stand_in_only_the_help_of_the_defense_is_doubted(heard: Callable[[str], Heard]) -> None:
    told, evidence, _ = heard("guided")
    assert failed(evidence) == {"baseline"} and told.code == 1
    assert "white-box/pgd-40 (surrogate)" in evidence["attacks"]["audit"]
    assert "It can be believed, but the defense does not help: without it" in told.out


def test_a_purifier_without_any_gradient_is_gone_around(heard: Callable[[str], Heard]) -> None:
    _, evidence, _ = heard("numpy")
    assert "stand-in" in failed(evidence) and not any("(exact)" in name for name in evidence["attacks"]["audit"])
    assert evidence["attacked_accuracy"] == heard("purifying")[1]["attacked_accuracy"]


def test_noise_is_found_by_asking_and_averaged(heard: Callable[[str], Heard]) -> None:
    _, evidence, folder = heard("noisy")
    assert "| oblivious (" not in (folder / "card.md").read_text(), "there is no defense to know"
    assert evidence["draws"] == 10 and evidence["baselines"] == {}
    assert evidence["attacked_accuracy_worst_draw"] <= evidence["attacked_accuracy"]


def test_a_detectors_rejections_are_counted_apart(heard: Callable[[str], Heard]) -> None:
    _, evidence, _ = heard("detecting")
    assert evidence["rejects"] and any("selective" in name for name in evidence["attacks"]["audit"])
    rest = evidence["attacked_accuracy"] + evidence["attacked_error"] + evidence["attacked_rejection"]
    assert rest == pytest.approx(1)


def test_a_model_that_changes_with_what_it_was_asked_is_not_confirmed_by_one_built_anew(
    heard: Callable[[str], Heard],
) -> None:
    told, evidence, _ = heard("counting")
    assert "confirmed" in failed(evidence) and told.code == 1


@pytest.mark.parametrize("function", ["plain", "rounding", "guided", "detecting"])
def test_what_is_written_is_whole_and_needs_no_network(function: str, heard: Callable[[str], Heard]) -> None:
    told, evidence, out = heard(function)
    assert {path.name for path in out.iterdir()} == {"evidence.json", "card.md", "report.html"}
    assert told.out.startswith("auditing net-") and told.out.endswith(f"written    {out}\n")
    text, card = (out / "report.html").read_text(), (out / "card.md").read_text()
    page = Page(text)
    for words in (evidence["verdict"], *(row[0] for row in evidence["attacks"]["audit"].items())):
        assert words in page.words.replace("\u00a0", " ") and words in card
    assert evidence["reproduce"] in page.words and evidence["reproduce"] in card
    assert not re.search(r"(?:src|href|url\()\s*=?\s*[\"']?(?:https?:)?//", text) and "<script" not in text
    assert "default-src 'none'" in text
    for name in failed(evidence):
        assert ADVICE[name].because in page.words and ADVICE[name].because in card and ADVICE[name].because in told.out


def test_of_two_audits_into_one_folder_the_second_says_so(
    heard: Callable[[str], Heard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, folder, unused = AuditReport(heard("plain")[1]), tmp_path / "out", audit_report.unused

    def late(asked: Path) -> None:
        unused(asked)
        asked.mkdir()
        (asked / "card.md").write_text("of the other")

    monkeypatch.setattr(audit_report, "unused", late)
    with pytest.raises(InputError, match="must be new, but .*out exists: choose another --out"):
        report.write(folder)
    assert [path.read_text() for path in folder.iterdir()] == ["of the other"] and len(list(tmp_path.iterdir())) == 1


def test_names_from_outside_are_text_on_the_page(heard: Callable[[str], Heard], tmp_path: Path) -> None:
    report = AuditReport(heard("plain")[1] | {"data": "<script>alert(1)</script>.npz"})
    page = (report.write(tmp_path / "out") / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_json_alone_is_printed_and_is_the_evidence(at_home: Path, tmp_path: Path) -> None:
    told = audited(f"net.py:plain {DATA} --json --threat oblivious --suite quick", tmp_path / "out")
    assert told.code == 0 and "auditing net-plain on 32 images, oblivious, Linf eps 0.1" in told.err
    evidence = json.loads(told.out)
    assert evidence == json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert evidence["threat"] == {"norm": "Linf", "eps": 0.1, "knowledge": "oblivious"}
    assert set(evidence["attacks"]) == {"audit", "quick"} <= set(evidence["budgets"])
    assert evidence["attacked_accuracy"] >= evidence["white_box_accuracy"]
    assert evidence["verdict"].startswith("Under oblivious Linf 0.1 the model keeps ")


def test_the_black_box_attacker_starts_from_images_that_are_not_attacked(
    at_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "BlackBoxAttacker", partial(BlackBoxAttacker, rounds=1))
    told = audited(f"net.py:plain {DATA} --threat black-box --json", tmp_path / "out")
    evidence = json.loads(told.out)
    assert evidence["black_box_queries"] > 0 and evidence["black_box_accuracy"] == evidence["attacked_accuracy"]
    given = images.images("digits.npz", "black-box")
    assert given.attackable == len(given.y_N) - len(given.y_N) // 4


def test_of_a_file_with_few_of_the_classes_a_substitute_has_those_of_the_model_and_the_command_names_it(
    at_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "BlackBoxAttacker", partial(BlackBoxAttacker, rounds=2))
    words = "net.py:plain --weights net.pt --data first.npz --threat black-box --substitute advae-A"
    told = audited(f"{words} --json --data-dir {tmp_path}", tmp_path / "out")
    assert told.code in (0, 1), told.err
    evidence = json.loads(told.out)
    assert evidence["black_box_queries"] > 0
    assert evidence["reproduce"].endswith(
        f" --data {at_home / 'first.npz'} --norm Linf --eps 0.1 --threat black-box --seed 1 --images 32 "
        f"--data-dir {tmp_path} --substitute advae-A"
    )


@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "u8", "i1", ">i4"])
def test_labels_and_pixels_may_be_of_any_type_and_order_of_bytes(kind: str) -> None:
    x, y = np.linspace(0, 1, 128).reshape(2, 1, 8, 8)[::-1], np.array([3, 250 if kind == "u1" else 100])
    for pixels in ("f2", ">f4", "f8", "g"):
        x_NCHW, y_N = images.labelled(x.astype(pixels), y.astype(kind))
        assert (x_NCHW.dtype, y_N.tolist()) == (torch.float32, y.tolist())
        assert torch.allclose(x_NCHW, torch.tensor(x.copy(), dtype=torch.float32), atol=1e-3)
    assert images.labelled(torch.rand(2, 1, 8, 8), torch.tensor([1, 2], dtype=torch.uint16))[1].tolist() == [1, 2]


@pytest.mark.parametrize("weights", ["net.safetensors", "net.pt", "checkpoint.pt"])
def test_weights_come_from_safetensors_or_a_state_dict(weights: str, at_home: Path) -> None:
    model, (x, _) = Source.of("net.py:plain", Path(weights)).build(), images.images("last.npz", "white-box").first(32)
    assert torch.equal(model(x), Source.of("net.py:trained").build()(x)) and not model.training


def test_an_audit_is_one_command_from_any_folder(at_home: Path) -> None:
    done = launch("audit", "net.py:trained", *"--data digits --norm L2 --eps 1/2 --images 32".split(), cwd=at_home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("written    audit-net-trained\n") and "Under white-box L2 0.5 the model" in done.stdout
    again = launch("audit", "net.py:trained", *"--data digits --norm L2 --eps 1/2".split(), cwd=at_home)
    assert again.returncode == 2 and "the folder of an audit must be new, but audit-net-trained exists" in again.stderr


def test_a_notebook_audits_a_module_and_leaves_it_as_it_was(
    digits: tuple[Tensor, Tensor], classifier: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.console.EVERY_S", 0.05)
    x, y = np.asarray(digits[0][-40:, 0]), digits[1][-40:].tolist()
    classifier.train()
    with Console(width=200, file=(tmp_path / "said").open("w")) as console:
        report = search.audit(classifier, x, y, search.ThreatModel("Linf", 0.1, "white-box"), console=console)
    assert classifier.training and all(not part.requires_grad for part in classifier.parameters())
    assert report.failed == [] and report.verdict in str(report) == report._repr_markdown_()
    assert report.evidence["model"]["file"] is None and "confirmed" not in {g["name"] for g in report.evidence["gates"]}
    lines = (tmp_path / "said").read_text().splitlines()
    shares = [int(share) for share in re.findall(r"eps 0.1: (\d+)%, 0:00:\d\d so far", "\n".join(lines))]
    assert len(shares) > 3 and shares == sorted(shares) and shares[-1] > 50, lines
    assert report.write(tmp_path / "out") and (tmp_path / "out" / "report.html").exists()


def test_a_notebook_needs_an_attacker_for_a_black_box(digits: tuple[Tensor, Tensor], classifier: nn.Module) -> None:
    x, y, blind = digits[0][:32], digits[1][:32], ThreatModel("Linf", 0.1, "black-box")
    with pytest.raises(ValueError, match="black-box threat model needs an attacker"):
        search.audit(classifier, x, y, blind)
    attacker = BlackBoxAttacker(digits[0][100:130], lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), rounds=1)
    assert search.audit(classifier, x, y, blind, attacker=attacker).evidence["black_box_queries"] > 0


def test_four_methods_say_all_that_attacks_ask_of_a_defense(at_home: Path, digits: tuple[Tensor, Tensor]) -> None:
    assert len(METHODS) == 4
    x, y = digits[0][:32], digits[1][:32]

    def of(name: str) -> Defended:
        return adapted(Source.of(f"net.py:{name}", Path("net.pt")).build(), x, y)

    assert gradients(of("plain")) == ("exact",) and bare(of("plain")) is not None
    assert gradients(of("purifying")) == ("bpda", "exact")
    assert gradients(of("guided")) == ("surrogate", "bpda", "exact")
    assert openings(of("detecting")) == ("rejection",) and not of("guided").defense.rejects()
    assert stochastic(of("noisy")) and not stochastic(of("guided"))
    alone = of("plain")
    assert bare(alone) is alone, "a plain module defends nothing"
    ours = Defended(Identity({}, {}, alone.defense.shape), nn.Identity())
    assert adapted(ours, x, y) is ours


def test_there_is_advice_for_every_check_and_two_sentences_for_every_outcome(heard: Callable[[str], Heard]) -> None:
    _, evidence, _ = heard("plain")
    names = {gate["name"] for gate in evidence["gates"]} | {gate["name"] for gate in heard("guided")[1]["gates"]}
    assert names <= set(ADVICE)
    for name in names:
        gates = [gate | {"passed": gate["name"] != name} for gate in evidence["gates"]]
        said = verdict(evidence | {"gates": gates})
        assert said.count(". ") == 1 and (name in said or name == "baseline")
    page = (ROOT / "docs" / "audit.md").read_text()
    for name, advice in ADVICE.items():
        assert f"| {name} | {advice.because} |" in page, f"docs/audit.md has another row of {name}"


def test_importing_the_audit_starts_no_ray(at_home: Path) -> None:
    script = "import search, sys; search.audit; print({'ray', 'wandb', 'plotly'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
