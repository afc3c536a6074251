"""Broken defenses: each raises its own alarm and none is exported; honest defenses raise none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor, nn

import defenses
from attacks.audit.audit import Audit, audit
from attacks.audit.quick_gates import quick_gates
from attacks.threat import ThreatModel
from benchmarks.broken import BROKEN, HONEST, LABELS, Member
from benchmarks.cheats import CHEATS
from defenses.base import Defended
from defenses.gmvae import GMVAE
from defenses.magnet import MagNet
from defenses.puvae import PuVAE
from search.data import splits
from search.engine.run import run
from search.exceptions import AlarmError
from search.export.exporter import export
from search.optimizer.history import SearchHistory, pick
from search.study.candidate import Candidate
from search.study.study import Study
from spaces.exceptions import InputError
from tests.conftest import digits_study

WHITE = ThreatModel("Linf", 0.1, "white-box")
Digits = tuple[Tensor, Tensor]
CAGED = {**BROKEN, **CHEATS}
SLOW = "unconverged Defense-GAN"


@pytest.fixture(scope="module")
def caged(digits: Digits, classifier: nn.Module) -> Iterator[Callable[[str], Defended]]:
    """Return a broken or honest defense by its name, made once; one may see the labels of the held-out images."""
    made: dict[str, Defended] = {}

    def member(name: str) -> Defended:
        LABELS[:] = [held_out(digits)[1]]
        if name not in made:
            made[name] = BROKEN[name].before(classifier, digits[0][:1400], digits[1][:1400])
        return made[name]

    yield member
    LABELS.clear()


def alarms(found: Audit) -> set[str]:
    return {gate.name for gate in found.gates if not gate.passed}


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_defense_raises_its_own_alarm(name: str, digits: Digits, caged: Callable[[str], Defended]) -> None:
    x, y = held_out(digits)
    images = 8 if name == SLOW else 100
    found = audit(caged(name), x[:images], y[:images], WHITE, seed=1)
    assert BROKEN[name].alarm in alarms(found)
    assert len(found.alarms) == len(alarms(found))


@pytest.mark.parametrize("name", BROKEN)
def test_a_search_raises_the_alarms_that_need_no_attack(
    name: str, digits: Digits, caged: Callable[[str], Defended]
) -> None:
    """A no-op and noise that is announced are caught by what their attacked images are compared with: the audit."""
    gates = quick_gates(caged(name), *held_out(digits), WHITE, seed=0)
    assert (BROKEN[name].alarm in {gate.name for gate in gates if not gate.passed}) is BROKEN[name].quick


def test_a_descent_that_has_arrived_raises_no_alarm(digits: Digits, caged: Callable[[str], Defended]) -> None:
    defended = caged(SLOW)
    defended.defense.at({"steps": 50, "restarts": 1})
    gates = {gate.name: gate for gate in quick_gates(defended, *held_out(digits), WHITE, seed=0)}
    defended.defense.at(BROKEN[SLOW].inference)
    assert gates["inner-loop"].passed and gates["inner-loop"].figure > 0


def held_out(digits: Digits) -> Digits:
    return digits[0][1400:1500], digits[1][1400:1500]


@pytest.fixture(scope="module")
def shelter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The storage that the searches share, with one classifier."""
    yield tmp_path_factory.mktemp("runs")
    LABELS.clear()


def searched(name: str, shelter: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Study, Candidate]:
    """Return a finished search of a member as if it were a file among the defenses, and its candidate."""
    find = defenses.find
    monkeypatch.setattr(defenses, "find", lambda wanted: CAGED[wanted].kind if wanted in CAGED else find(wanted))
    LABELS[:] = [splits.load("digits", "validation", None, 60)[1]]
    study = digits_study(shelter, name=re.sub("[ ,]+", "-", name), defense=name, space="default", trials=1, eps=0.1)
    if not study.folder.exists():
        assert run(study, [], debug=True) == "finished"
    return study, SearchHistory(study).candidates()[0]


@pytest.mark.parametrize(
    "name", ["no-op", "peeks at the label", "remembers its queries", "straight through, with noise"]
)
def test_none_is_exported(name: str, shelter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, candidate = searched(name, shelter, monkeypatch)
    if CAGED[name].quick:
        assert CAGED[name].alarm in candidate.score.alarms
        with pytest.raises(InputError, match="needs a candidate that meets all constraints"):
            pick(study, pareto=False, top=1, candidate=None)
    with pytest.raises(AlarmError, match=CAGED[name].alarm):
        export(study, candidate, study.store, study.folder / "export")
    assert not (study.folder / "export").exists()


def test_what_is_exported_in_spite_of_alarms_names_them_first(shelter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, candidate = searched("peeks at the label", shelter, monkeypatch)
    written = export(study, candidate, study.store, study.folder / "export", despite_alarms=True)
    evidence = json.loads((written / "evidence.json").read_text())
    assert next(iter(evidence)) == "alarms" and evidence["alarms"][0].startswith("order: ")


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_defense_raises_no_alarm(name: str, digits: Digits, classifier: nn.Module) -> None:
    """Both err on far fewer images than the undefended classifier: the audit asks for 5 points."""
    target = HONEST[name].before(classifier, digits[0][:1400], digits[1][:1400])
    found = audit(target, *held_out(digits), WHITE, seed=1)
    assert found.alarms == ()
    assert found.robustness.attacked.accuracy > found.baselines["undefended"].attacked.accuracy + 0.05


OF_LITTLE_USE = {
    "MagNet": Member(kind=MagNet, train={"maps": 8, "learning_rate": 2e-2, "batch_size": 16, "epochs": 3}),
    "GMVAE": Member(kind=GMVAE, train={"maps": 8, "dense": 32, "learning_rate": 3e-3, "batch_size": 32, "epochs": 3}),
    "PuVAE": Member(
        kind=PuVAE,
        train={"conv_maps": 8, "decoder_maps": 8, "dense": 64, "latent": 8, "batch_size": 32, "epochs": 6}
        | {"lambda_rc": 1.0, "lambda_kl": 0.1, "lambda_ce": 10.0, "learning_rate": 2e-3},
        inference={"sigma_eps": 0.1},
    ),
}


@pytest.mark.parametrize("eps", [0.1, 0.3])
@pytest.mark.parametrize("name", OF_LITTLE_USE)
def test_a_defense_of_little_use_is_refused_for_that_alone(
    name: str, eps: float, digits: Digits, classifier: nn.Module
) -> None:
    """No attack of a gate may be too weak for a detector, a class choice or a slow descent."""
    target = OF_LITTLE_USE[name].before(classifier, digits[0][:1400], digits[1][:1400])
    x, y = held_out(digits)
    assert alarms(audit(target, x[:50], y[:50], ThreatModel("Linf", eps, "white-box"), seed=1)) <= {"baseline"}
