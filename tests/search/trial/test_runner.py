"""One trial on real digits: trained once, resumed bit for bit, scored at every inference setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import attacks.suites
from attacks.suites import SUITES
from attacks.verdicts import Observation
from defenses.base import Batches, Defended, Metrics
from defenses.puvae import PuVAE
from search.exceptions import TrialError
from search.storage.fingerprint import code_digests
from search.study.candidate import Candidate
from search.study.study import Study
from search.trial import evaluator, latency, scoring
from search.trial.evaluator import Evaluator
from search.trial.pictures import caption, png
from search.trial.runner import TrialRunner, baseline, run_trial
from search.trial.scoring import SAMPLE
from spaces.space import Params
from tests.conftest import brief_study, digits_study

CPU = torch.device("cpu")
PARAMS = Params({"conv_maps": 2, "decoder_maps": 2, "dense": 8}, {})


def silent(epoch: int, metrics: Metrics) -> None:
    """Report to nobody."""


@pytest.fixture
def single(tmp_path: Path) -> Study:
    """A search that scores each training at one inference setting, without noise."""
    return digits_study(tmp_path, suite="quick", knobs={"sigma_eps": 0})


def setting(study: Study, **knobs: object) -> Params:
    space = study.resolved.space
    first = {name: domain.choices[0] for name, domain in space.searched().items()}  # type: ignore[attr-defined]
    return space.complete(first | knobs)


def fits(study: Study) -> list[Path]:
    return sorted((Path(study.storage) / ".store" / "fits").glob("[!.]*"))


def test_a_fit_is_scored_at_all_six_sigma_eps_the_proposed_one_first(study: Study) -> None:
    candidates = run_trial(study, setting(study, sigma_eps=1.0), study.store, silent)
    sigmas = [c.params.inference["sigma_eps"] for c in candidates]
    assert sigmas[0] == 1.0 and sorted(map(float, sigmas)) == [0, 0.01, 0.1, 1, 10, 100]
    assert len({c.candidate for c in candidates}) == 6 and len({c.fit for c in candidates}) == 1
    assert len(fits(study)) == 1
    for candidate in candidates:
        score = candidate.score
        assert 0 <= score.white_box_accuracy <= score.oblivious_accuracy <= score.clean_accuracy <= 1
        assert score.attacked_accuracy == score.white_box_accuracy and score.images == 60
        assert 0 <= score.latency_ms_p50 <= score.latency_ms_p95
        assert score.latency_images == candidate.row()["latency_images"] != ""
        assert Candidate.from_json(candidate.to_json()) == candidate
    assert len({c.score.latency_ms_p50 for c in candidates}) == 1  # sigma_eps cannot change it


def test_noise_that_the_attacker_knows_is_scored_beside_the_rest_where_it_is_asked_for(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All inference settings race on the first images, where the known noise is not yet asked about."""
    study = study.model_copy(update={"knobs": {**study.knobs, "sigma_eps": [1.0, 0]}})
    asked = study.model_copy(update={"noise": "known"})
    plain = run_trial(study, setting(study, sigma_eps=1.0), study.store, silent)
    assert plain[0].row()["known_noise_accuracy"] is None and plain[0].row()["worst_draw_accuracy"] is None
    noisy, still = run_trial(asked, setting(asked, sigma_eps=1.0), asked.store, silent)
    for candidate in (noisy, still):
        row, score = candidate.row(), candidate.score
        assert Candidate.from_json(candidate.to_json()) == candidate
        assert row["worst_draw_accuracy"] <= score.attacked_accuracy  # type: ignore[operator]
        assert score.known_noise_accuracy == row["known_noise_accuracy"]
    assert any(name.startswith("known-noise/pgd-20 (") for name in noisy.row())
    assert still.score.known_noise_accuracy == still.score.white_box_accuracy
    assert not any(name.startswith("known-noise") for name in still.row())
    begun = TrialRunner(asked, asked.store).assets.evaluator.begin
    monkeypatch.setattr("attacks.evaluation.under_known_noise", None)
    runner = TrialRunner(asked, asked.store)
    _, defense = runner.trainer.fit(setting(asked, sigma_eps=1.0), silent)
    assert begun(Defended(defense, runner.assets.target)).known is None


def test_the_second_time_nothing_is_trained_and_the_scores_are_the_same(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study.model_copy(update={"knobs": {"sigma_eps": [0, 1.0]}})
    first = run_trial(study, setting(study), study.store, silent)

    def untrainable(self: PuVAE, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        raise AssertionError("trained again")

    monkeypatch.setattr(PuVAE, "fit", untrainable)
    reported: list[int] = []
    assert run_trial(study, setting(study), study.store, lambda e, m: reported.append(e)) == first
    assert reported == []


class Killed(BaseException):
    """Stands in for a worker that dies."""


def forbid(monkeypatch: pytest.MonkeyPatch, target: object, name: str) -> None:
    """Let whatever calls it fail."""

    def forbidden(*args: object, **options: object) -> object:
        raise AssertionError(f"{name} again")

    monkeypatch.setattr(target, name, forbidden)


def test_a_second_search_over_the_same_space_trains_nothing_and_attacks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(study: Study) -> list[Candidate]:
        chosen = ((lambda_rc, sigma_eps) for lambda_rc in (0.1, 1.0) for sigma_eps in (0.0, 1.0))
        settings = [setting(study, lambda_rc=lambda_rc, sigma_eps=sigma_eps) for lambda_rc, sigma_eps in chosen]
        trials = [run_trial(study, params, study.store, silent, alone=True) for params in settings]
        return [baseline(study, study.store), *(candidate for runner in trials for candidate in runner)]

    first = search(brief_study(tmp_path))
    forbid(monkeypatch, PuVAE, "fit")
    for name in ("observe", "noisy", "quick_gates"):
        forbid(monkeypatch, evaluator, name)
    forbid(monkeypatch, latency, "_times")
    other = brief_study(tmp_path, name="other", trials=9, method="grid", max_clean_rejection=0.2, threat="white-box")
    assert search(other) == first


def test_a_trial_that_is_killed_scores_no_setting_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, calls = brief_study(tmp_path), []

    def observed(self: Evaluator, target: nn.Module, begun: Observation | None = None) -> Observation:
        calls.append(1)
        if len(calls) == 5:
            raise Killed
        return observe(self, target, begun)

    observe = Evaluator.observe
    monkeypatch.setattr(Evaluator, "observe", observed)
    with pytest.raises(Killed):
        run_trial(study, setting(study), study.store, silent)
    assert len(run_trial(study, setting(study), study.store, silent)) == 6 and len(calls) == 4 + 1 + 2


def test_a_damaged_score_is_made_again(tmp_path: Path) -> None:
    study = brief_study(tmp_path)
    first, store = baseline(study, study.store), study.store
    (key,) = store.keys("scores")
    said = store.root / "scores" / key / "said.safetensors"
    good = said.read_bytes()
    said.write_bytes(good[:-4] + b"oops")
    assert baseline(study, store) == first and said.read_bytes() == good


def test_everything_that_changes_a_score_changes_its_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(fit: str = "fit", over: dict[str, object] | None = None, **fields: object) -> str:
        study = brief_study(tmp_path, **fields)
        runner = TrialRunner(study, study.store)
        params = runner.scorer.aimed(setting(study, **(over or {})))
        with torch.device("meta"):
            defense = runner.assets.resolved.defense(params.train, params.inference, runner.assets.resolved.task.shape)
        return runner.scorer.scores_key(fit, defense)

    first = key()
    variants: list[dict[str, object]] = [
        {"seed": 1},
        {"eval_images": 20},
        {"suite": "search"},
        {"threat": "oblivious"},
        {"eps": 0.1},
        {"eps": 0.1 + 1e-9},
        {"eps": 0.3, "norm": "L2"},
        {"threat": "black-box"},
        {"threat": "black-box", "substitute": "C"},
        {"task": "digits/B"},
        {"protect": "digits/C"},
        {"classifier_epochs": 2},
        {"classifier_recipe": "augmented"},
        {"over": {"sigma_eps": 1.0}},
        {"fit": "another"},
    ]
    assert len({first, *(key(**fields) for fields in variants)}) == 1 + len(variants)  # type: ignore[arg-type]
    for same in ({"name": "other"}, {"trials": 9}, {"cheap_images": 5}, {"max_clean_rejection": 0.2}, {"patience": 1}):
        assert key(**same) == first
    suite = code_digests(attacks.suites.__name__)
    assert set(suite) <= set(code_digests(evaluator.__name__))
    monkeypatch.setattr(scoring, "code_digests", lambda *modules: sorted({*code_digests(*modules)} - {suite[0]}))
    assert key() != first


def test_what_was_said_serves_every_threshold_and_every_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(**fields: object) -> list[Candidate]:
        study = brief_study(tmp_path, defense="magnet", **fields)
        return run_trial(study, setting(study), study.store, silent)

    first = scored(max_clean_rejection=0.05)
    store = brief_study(tmp_path).store
    assert len(store.keys("scores")) == 2 and len(first) == 10  # one for each reformer
    forbid(monkeypatch, Evaluator, "observe")
    assert scored(max_clean_rejection=0.05) == first
    for one, other in zip(first, scored(max_clean_rejection=1.0), strict=True):
        assert one == other or (one.score.risk_coverage and other.score.attacked_error <= one.score.attacked_error)


def test_a_black_box_attacker_learns_of_each_threshold_anew(tmp_path: Path) -> None:
    def sittings(threat: str) -> int:
        study = brief_study(tmp_path, defense="magnet", threat=threat)
        runner, found = TrialRunner(study, study.store), set()
        for limit in (0.99, 1e6):
            params = runner.scorer.aimed(setting(study, detector_1=limit))
            resolved = study.resolved
            defense = resolved.defense(params.train, params.inference, resolved.task.shape)
            found.add(runner.scorer.scores_key("fit", defense))
        return len(found)

    assert sittings("white-box") == 1 and sittings("black-box") == 2


def killed_after(epochs: int) -> object:
    def report(epoch: int, metrics: Metrics) -> None:
        if epoch == epochs:
            raise Killed

    return report


def test_a_fit_that_was_killed_goes_on_from_its_last_epoch_bit_for_bit(tmp_path: Path) -> None:
    whole = digits_study(tmp_path / "whole", epochs=3, knobs={"sigma_eps": 0})
    broken = digits_study(tmp_path / "broken", epochs=3, knobs={"sigma_eps": 0})
    run_trial(whole, setting(whole), whole.store, silent)
    with pytest.raises(Killed):
        run_trial(broken, setting(broken), broken.store, killed_after(1))  # type: ignore[arg-type]
    epochs: list[int] = []
    torch.rand(7)  # the generator's state does not matter
    run_trial(broken, setting(broken), broken.store, lambda epoch, metrics: epochs.append(epoch))
    assert epochs == [2, 3]
    names = [path.name for path in fits(whole)]
    assert names == [path.name for path in fits(broken)]
    weights = [(path / "weights.safetensors").read_bytes() for path in (*fits(whole), *fits(broken))]
    assert weights[0] == weights[1]


def test_the_rungs_of_another_threat_model_are_not_taken_for_ones_own(single: Study) -> None:
    (first, *_) = run_trial(single, setting(single), single.store, silent)
    assert len(TrialRunner.of(single, single.store).trainer.curve(first.fit)) == 2
    other = single.model_copy(update={"name": "other", "threat": "oblivious"})
    (again, *_) = run_trial(other, setting(other), other.store, silent)
    assert again.fit == first.fit and TrialRunner.of(other, other.store).trainer.curve(first.fit) == []


def test_rung_scores_compare_where_as_many_images_were_attacked(tmp_path: Path) -> None:
    def rungs(**fields: object) -> str:
        study = digits_study(tmp_path, **fields)
        return TrialRunner.of(study, study.store).trainer.rungs()

    assert rungs(eval_images=60, cheap_images=100) == rungs(eval_images=60, cheap_images=60)
    assert rungs(eval_images=60, cheap_images=100) != rungs(eval_images=90, cheap_images=100)


def test_a_damaged_fit_is_trained_again(single: Study) -> None:
    run_trial(single, setting(single), single.store, silent)
    weights = fits(single)[0] / "weights.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-4] + b"oops")
    epochs: list[int] = []
    run_trial(single, setting(single), single.store, lambda epoch, metrics: epochs.append(epoch))
    assert epochs == [1, 2] and weights.read_bytes() == good


def test_a_training_that_diverges_fails_with_the_reason(study: Study) -> None:
    with pytest.raises(TrialError, match=r"the training diverged: loss is nan after epoch 1"):
        bad = setting(study)
        run_trial(study, dataclasses.replace(bad, train={**bad.train, "learning_rate": 1e30}), study.store, silent)
    assert fits(study) == []


def test_everything_that_shapes_a_fit_is_in_its_fingerprint(tmp_path: Path) -> None:
    def key(**fields: object) -> str:
        study = digits_study(tmp_path, **fields)
        return TrialRunner(study, study.store).trainer.key(setting(study))

    variants: list[dict[str, object]] = [
        {},
        {"seed": 1},
        {"train_images": 500},
        {"epochs": 1},
        {"knobs": {"latent": 4}},
        {"task": "digits/B"},
        {"classifier_epochs": 3},
    ]
    assert len({key(**fields) for fields in variants}) == len(variants)
    for same in ({"threat": "oblivious"}, {"eval_images": 20}, {"name": "other"}, {"trials": 9}):
        assert key(**same) == key()


def test_puvae_consults_the_partner_of_the_protected_classifier(study: Study) -> None:
    runner = TrialRunner(study, study.store)
    assert runner.assets.resolved.task.classifier == "A"
    assert runner.assets.consulted(runner.trainer.build(PARAMS)) == ("B",)
    assert runner.assets.target is runner.assets.classifier("A")


def test_a_fit_leaves_the_classifiers_alone(single: Study) -> None:
    runner = TrialRunner.of(single, single.store)
    source = runner.assets.classifier("B")
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    run_trial(single, setting(single), single.store, silent)
    assert all(torch.equal(before[n], t) for n, t in source.state_dict().items())
    assert not any(p.requires_grad for p in source.parameters())


def test_the_undefended_classifier_is_scored_by_the_same_suite(study: Study) -> None:
    undefended = baseline(study, study.store)
    assert undefended.score.clean_accuracy > 0.8
    assert undefended.score.attacked_accuracy < undefended.score.clean_accuracy
    assert undefended.params.flat() == {} and undefended.score.latency_ms_p50 == 0


def test_the_undefended_classifiers_quick_score_needs_the_quick_attacks_alone(study: Study) -> None:
    study = study.model_copy(update={"threat": "oblivious"})
    runner = TrialRunner(study, study.store)
    quick = runner.quick()
    assert len(study.store.keys("oblivious")) == len(SUITES["quick"].oblivious) < len(SUITES["search"].oblivious)
    assert quick == runner.assets.evaluator.cheap(runner.assets.target, study.cheap_images) < 0.8


def test_oblivious_images_are_made_once_for_each_attack_whatever_suite_asks(study: Study, tmp_path: Path) -> None:
    store = study.store
    baseline(study, store)
    made = {key: (tmp_path / ".store" / "oblivious" / key).stat().st_mtime_ns for key in store.keys("oblivious")}
    assert len(made) == len(SUITES["search"].oblivious)
    other = study.model_copy(update={"name": "other", "suite": "quick", "trials": 5})
    baseline(other, other.store)
    again = {key: (tmp_path / ".store" / "oblivious" / key).stat().st_mtime_ns for key in store.keys("oblivious")}
    assert made == again


def test_a_picture_has_a_row_for_each_kind_of_image(single: Study, tmp_path: Path) -> None:
    from PIL import Image

    run_trial(single, setting(single), single.store, silent)
    path = TrialRunner.of(single, single.store).picture(setting(single), tmp_path / "p.png", images=7)
    assert Image.open(path).size == (7 * 8 * 3, 4 * 8 * 3)
    rows, *said = caption(path).splitlines()
    assert rows.startswith("rows: clean; attacked (ifgsm-targeted, oblivious, Linf eps")
    assert [len(line.partition(": ")[2].split()) for line in said] == [7] * 4  # the truth, and what three say


def test_a_png_shows_what_it_was_given() -> None:
    import io

    from PIL import Image

    rows = torch.zeros(2, 3, 3, 4, 4)
    rows[1, 2, 0] = 1.0  # the third image of the second row is red
    image = Image.open(io.BytesIO(png(rows, zoom=1)))
    assert image.size == (12, 8) and image.getpixel((9, 5)) == (255, 0, 0) and image.getpixel((5, 5)) == (0, 0, 0)


def test_a_defense_that_overrides_accept_alone_rejects(single: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PuVAE, "accept", lambda self, x_NCHW: x_NCHW.flatten(1).mean(1) > 0.3)
    first, *_ = run_trial(single, setting(single), single.store, silent)
    assert 0 < first.score.clean_rejection < 1 and first.score.risk_coverage == ()


def test_rung_scores_of_another_study_are_not_taken_over_from_half_done_progress(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(epoch: int, metrics: Metrics) -> None:
        raise Stop

    studies = [digits_study(tmp_path, threat=threat, knobs={"sigma_eps": 0}) for threat in ("oblivious", "white-box")]
    with pytest.raises(Stop):
        run_trial(studies[0], setting(studies[0]), studies[0].store, stop)
    run_trial(studies[1], setting(studies[1]), studies[1].store, silent)
    for study in studies:
        runner = TrialRunner.of(study, study.store)
        assert runner.trainer.curve(runner.trainer.key(setting(study))) == []


def test_what_is_made_once_is_shared_by_fits_and_kept_as_float16(
    single: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def fit(self: PuVAE, batches: Batches, classifier: nn.Module) -> Iterator[Metrics]:
        def make() -> dict[str, torch.Tensor]:
            made.append(1)
            return {"noise": torch.rand(3), "index": torch.arange(3)}

        found = batches.once("three numbers", make)
        assert found["noise"].dtype == torch.float16 and found["index"].dtype == torch.int64
        for _ in batches:
            yield {"loss": float(found["noise"].sum())}

    monkeypatch.setattr(PuVAE, "fit", fit)
    curves = []
    for lambda_rc in (0.1, 1.0):
        run_trial(single, setting(single, lambda_rc=lambda_rc), single.store, silent)
        runner = TrialRunner.of(single, single.store)
        key = runner.trainer.key(setting(single, lambda_rc=lambda_rc))
        curves.append([metrics["loss"] for metrics in single.store.about("fits", key)["curve"]])
    assert made == [1] and curves[0] == curves[1] and len(fits(single)) == 2


def test_the_usual_setting_says_which_classifiers_are_trained_first(tmp_path: Path) -> None:
    def needed(**fields: object) -> set[str]:
        study = digits_study(tmp_path, **fields)
        return TrialRunner(study, study.store).assets.needed()

    assert needed() == {"A", "B"}
    assert needed(protect="digits/C") == {"C", "B"}
    assert needed(defense="adversarial_training", protect="digits/C") == {"A", "C"}
    assert needed(defense="advae", knobs={"bases": "advae-X+advae-A+advae-B"}) == {"A", "advae-X", "advae-A", "advae-B"}


def test_of_a_space_too_large_to_list_distinct_settings_are_scored(tmp_path: Path) -> None:
    for seed in range(12):  # of magnet's 72
        study = digits_study(tmp_path, name=f"s{seed}", defense="magnet", space="wide", seed=seed)
        runner = TrialRunner(study, study.store)
        space = study.resolved.space
        found = runner.scorer.settings(space.drawn(np.random.default_rng(seed)))
        assert SAMPLE <= len(found) == len({str(params.inference) for params in found}) <= SAMPLE + 1
