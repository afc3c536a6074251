"""The study: what is proposed, what it is told, and what it knows after a crash."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.samplers import NSGAIISampler
from optuna.trial import TrialState, create_trial

from search import session
from search.engine.run import open_controller, run
from search.optimizer.history import SearchHistory, journal_storage, state_of
from search.optimizer.proposer import Proposer
from search.optimizer.samplers import Bounded
from search.report.importance import Importances, importances
from search.report.summary import summarise
from search.study import ranking
from search.study.candidate import Candidate
from search.study.study import Study
from spaces.exceptions import InputError
from spaces.space import Params
from tests.conftest import digits_study
from tests.support.engine import LATENCY, Pretence, scored


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk at each of the thousands of lines that these searches write."""
    monkeypatch.setattr("os.fsync", lambda file: None)


def six(params: Params, attacked: float = 0.5) -> list[Candidate]:
    """The candidates of one fit, the proposed setting first."""
    sigmas = [params.inference["sigma_eps"], *(s for s in (0.0, 0.01, 0.1, 1.0, 10.0, 100.0))]
    return [
        scored(Params(params.train, {"sigma_eps": s}), attacked - i / 100) for i, s in enumerate(dict.fromkeys(sigmas))
    ]


def proposed(proposer: Proposer) -> tuple[str, Params]:
    proposal = proposer.propose()
    assert proposal is not None
    return proposal.name, proposal.params


def test_every_candidate_of_a_trial_is_a_trial_of_the_study(study: Study) -> None:
    proposer = Proposer(study)
    name, params = proposed(proposer)
    proposer.finish(name, six(params), {})
    trials = proposer.optuna.trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 6
    assert len({t.params["sigma_eps"] for t in trials}) == 6
    assert {tuple(t.values) for t in trials} == {(c.score.attacked_error, 5.0) for c in six(params)}
    assert proposer.optuna.directions[0].name == "MINIMIZE" and proposer.optuna.directions[1].name == "MINIMIZE"


def test_latencies_that_were_measured_again_are_kept_by_candidate_beside_those_of_an_earlier_version(
    study: Study,
) -> None:
    proposer = Proposer(study)
    first, second, third = six(proposed(proposer)[1])[:3]
    proposer.optuna.set_user_attr(f"clocked {first.candidate}", LATENCY.to_json())  # as it was until 2026-11
    for candidate, ms in ((second, 6.0), (third, 7.0), (second, 8.0)):
        proposer.keep_remeasured(candidate, replace(LATENCY, ms_p50=ms))
    found = {name: latency.ms_p50 for name, latency in SearchHistory(study).remeasured().items()}
    assert found == {first.candidate: 5.0, second.candidate: 8.0, third.candidate: 7.0}


def test_pruned_and_failed_trials_keep_their_state_and_reason(study: Study) -> None:
    proposer = Proposer(study)
    first, second = proposed(proposer)[0], proposed(proposer)[0]
    proposer.stop(first, TrialState.PRUNED, {"curve": [0.5]})
    proposer.stop(second, TrialState.FAIL, {"reason": "diverged"})
    states = {t.user_attrs["trial"]: (t.state, state_of(t)) for t in SearchHistory(study).trials()}
    assert states == {first: (TrialState.PRUNED, "pruned"), second: (TrialState.FAIL, "failed")}
    assert proposer.candidates() == [] and proposer.ended() == 2


def test_no_training_is_proposed_twice_and_an_exhausted_space_says_so(study: Study) -> None:
    proposer = Proposer(study)
    seen = []
    while (proposal := proposer.propose()) is not None:
        seen.append(tuple(proposal.params.train.items()))
        proposer.finish(proposal.name, six(proposal.params), {})
    assert len(seen) == len(set(seen)) == proposer.space.trainings() == 8


@pytest.mark.parametrize("method", ["tpe", "nsga2", "gp", "random", "qmc", "grid"])
def test_each_method_proposes_within_the_space(tmp_path: Path, method: str) -> None:
    proposer = Proposer(digits_study(tmp_path, method=method, trials=4))
    for _ in range(4):
        name, params = proposed(proposer)
        assert params.train["lambda_rc"] in (0.1, 1.0) and params.inference["sigma_eps"] in (0, 0.01, 0.1, 1, 10, 100)
        proposer.finish(name, six(params), {})
    assert len(proposer.candidates()) == 24


def test_the_grid_of_the_paper_is_216_trainings(tmp_path: Path) -> None:
    proposer = Proposer(digits_study(tmp_path, method="grid", space="paper", trials=300))
    trainings = [proposed(proposer)[1].train for _ in range(3)]
    assert [t["lambda_ce"] for t in trainings] == [0.01, 0.1, 1.0]
    assert {t.params["sigma_eps"] for t in proposer.optuna.get_trials(states=(TrialState.RUNNING,))} == {0.1}
    assert len(proposer.optuna.get_trials(deepcopy=False)) == 216


def test_known_good_settings_come_first_where_they_lie_in_the_space(tmp_path: Path) -> None:
    proposer = Proposer(digits_study(tmp_path, space="paper"))
    first, second = proposed(proposer)[1], proposed(proposer)[1]
    assert [first.train[f"lambda_{k}"] for k in ("rc", "kl", "ce")] == [0.01, 0.1, 10]
    assert second != first


def test_what_ran_when_the_driver_died_is_proposed_again_under_its_name(study: Study) -> None:
    before = Proposer(study)
    done, params = proposed(before)
    before.finish(done, six(params), {})
    lost = [proposed(before), proposed(before)]
    after = Proposer(study)  # the first driver is gone
    again = [proposed(after), proposed(after)]
    assert again == lost
    assert len(after.candidates()) == 6 and after.ended() == 1
    fresh, _ = proposed(after)
    assert fresh not in {done, *(name for name, _ in lost)}
    assert not [t for t in after.optuna.get_trials(states=(TrialState.RUNNING,)) if "trial" not in t.user_attrs]


def test_a_driver_that_died_while_it_told_the_candidates_doubles_none(study: Study) -> None:
    before = Proposer(study)
    name, params = proposed(before)
    before._running[name].set_user_attr("candidate", "of the dead")
    for other in six(params)[1:4]:  # told three of six, then died
        before._tell(other, {"of": name}, None)
    after = Proposer(study)
    assert after.ended() == 0 and [state_of(t) for t in after.trials()] == ["interrupted"]
    again, same = proposed(after)
    after.finish(again, six(same), {})
    complete = after.optuna.get_trials(states=(TrialState.COMPLETE,))
    assert (again, same) == (name, params) and len(complete) == 6 == len(after.candidates())


def test_a_driver_that_dies_while_it_recovers_loses_nothing(study: Study) -> None:
    lost = [proposed(before) for before in [Proposer(study)] for _ in range(2)]
    recovering = Proposer(study)  # told both FAIL and enqueued them
    assert len(recovering.optuna.get_trials(states=(TrialState.WAITING,))) == 2
    again = Proposer(study)  # the second driver died before it asked
    assert len(again.optuna.get_trials(states=(TrialState.WAITING,))) == 2
    assert [proposed(again), proposed(again)] == lost


def test_a_driver_that_dies_while_it_proposes_again_can_be_resumed(study: Study) -> None:
    before = Proposer(study)
    lost = proposed(before)
    Proposer(study).optuna.ask()  # its turn had come, and no knob was asked for yet
    assert [summarise(study).trials[0].params, state_of(SearchHistory(study).trials()[0])] == [lost[1], "running"]
    assert proposed(Proposer(study)) == lost


def test_a_space_that_cannot_be_listed_may_be_spent_all_the_same(tmp_path: Path) -> None:
    fixed = {"lambda_rc": 1.0, "lambda_kl": 1.0, "conv_maps": "4..5:log"}
    work = Pretence(lambda params: 0.5)
    assert run(digits_study(tmp_path, trials=5, knobs=fixed), [], debug=True, work=work.work()) == "finished"
    assert sorted(int(proposal.params.train["conv_maps"]) for proposal in work.asked) == [4, 5]


def test_a_resumed_search_goes_on_drawing_where_it_was(tmp_path: Path) -> None:
    study = digits_study(tmp_path, space="wide", method="random", trials=60)
    trainings = []
    for _ in range(2):
        proposer = Proposer(study)
        for _ in range(25):
            name, params = proposed(proposer)
            trainings.append(tuple(params.train.items()))
            proposer.stop(name, TrialState.PRUNED, {})
    assert len(set(trainings)) == 50


def test_where_all_candidates_are_equal_no_knob_is_important(study: Study) -> None:
    proposer = Proposer(study)
    for _ in range(3):
        name, params = proposed(proposer)
        proposer.finish(name, [scored(c.params, 0.0) for c in six(params)], {})
    assert importances(proposer) == Importances()


def test_knobs_that_matter_are_important(study: Study) -> None:
    proposer = Proposer(study)
    for _ in range(4):
        name, params = proposed(proposer)
        proposer.finish(
            name, [scored(c.params, 1 / (2 + float(c.params.inference["sigma_eps"]))) for c in six(params)], {}
        )
    assert max(importances(proposer).overall.items(), key=lambda item: item[1])[0] == "sigma_eps"


def test_constraints_stand_in_the_study_and_decide_who_is_feasible(tmp_path: Path) -> None:
    study = digits_study(tmp_path, min_clean_accuracy=0.9, max_latency_ms=10)
    proposer = Proposer(study)
    name, params = proposed(proposer)
    good, wrong, slow = (Params(params.train, {"sigma_eps": s}) for s in (params.inference["sigma_eps"], 1.0, 10.0))
    told = [scored(good, 0.3), scored(wrong, 0.9, clean=0.5), scored(slow, 0.8, ms=50)]
    proposer.finish(name, told, {})
    assert [c.score.attacked_accuracy for c in proposer.feasible()] == [0.3]
    excess = {round(t.values[0], 2): t.constraints for t in proposer.optuna.trials}
    assert excess[0.7]["min_clean_accuracy"] == pytest.approx(-0.05) and excess[0.7]["max_latency_ms"] == -5
    assert excess[0.1]["min_clean_accuracy"] == pytest.approx(0.4) and excess[0.2]["max_latency_ms"] == 40
    assert [t.values[0] for t in proposer.optuna.best_trials] == [0.7]


def test_the_front_is_what_no_other_beats(study: Study) -> None:
    params = Params({"lambda_rc": 1.0}, {"sigma_eps": 0.0})
    points = [(0.9, 9.0), (0.5, 5.0), (0.5, 6.0), (0.4, 7.0), (0.1, 1.0)]
    candidates = [scored(params, attacked, ms=ms) for attacked, ms in points]
    found = [(c.score.attacked_accuracy, c.score.latency_ms_p50) for c in ranking.front(study, candidates)]
    assert found == [(0.9, 9.0), (0.5, 5.0), (0.1, 1.0)]


def test_reading_a_search_changes_nothing(study: Study) -> None:
    with pytest.raises(InputError, match="a search that has begun is needed"):
        SearchHistory(study)
    name, _ = proposed(Proposer(study))
    journal = (study.folder / "study.journal").read_bytes()
    assert [t.user_attrs["trial"] for t in SearchHistory(study).trials()] == [name]
    assert (study.folder / "study.journal").read_bytes() == journal


def test_what_no_driver_runs_is_interrupted_and_not_running(study: Study) -> None:
    proposed(Proposer(study))
    with study.store.lock("searches", study.name):
        assert session.status(study)["running"] == 1
    found = session.status(study)
    assert (found["running"], found["interrupted"]) == (0, 1)


def test_a_search_of_an_earlier_version_is_refused_in_one_line_and_left_alone(study: Study) -> None:
    study.folder.mkdir(parents=True)
    old = optuna.create_study(
        study_name=study.name, storage=journal_storage(study), directions=["maximize", "minimize"]
    )
    old.set_metric_names(["attacked_accuracy", "latency_ms_p50"])
    for opening in (SearchHistory, Proposer):
        with pytest.raises(InputError, match="has attacked_accuracy, latency_ms_p50; search again under another name"):
            opening(study)
    assert optuna.load_study(study_name=study.name, storage=journal_storage(study)).metric_names == old.metric_names


def test_thresholds_that_a_curve_picked_reach_the_study_without_them(tmp_path: Path) -> None:
    study = digits_study(tmp_path, defense="magnet")
    proposer = Proposer(study)
    name, params = proposed(proposer)
    picked = Params(params.train, {**params.inference, "detector_1": 0.987})
    proposer.finish(name, [scored(params, 0.5), scored(picked, 0.6)], {})
    (told,) = (t for t in proposer.optuna.trials if t.user_attrs.get("of") == name)
    assert "detector_1" not in told.params and "detector_2" in told.params
    assert picked in [c.params for c in proposer.candidates()]


@pytest.mark.parametrize(("defense", "trainings", "candidates"), [("puvae", 216, 1296), ("gmvae", 12, 600)])
def test_the_papers_grid_trains_each_fit_once_also_when_it_is_cut_in_two(
    tmp_path: Path, defense: str, trainings: int, candidates: int
) -> None:
    study = digits_study(tmp_path, defense=defense, space="paper", method="grid", trials=trainings + 50)
    first = Pretence(lambda params: 0.5, dies_at=trainings // 2)
    assert run(study, [], debug=True, work=first.work()) == "interrupted"
    second = Pretence(lambda params: 0.5)
    assert run(study, [], debug=True, work=second.work()) == "finished"
    fits = [tuple(proposal.params.train.items()) for proposal in (*first.asked, *second.asked)]
    assert len(fits) == len(set(fits)) == trainings
    assert len({candidate.candidate for candidate in SearchHistory(study).candidates()}) == candidates


@pytest.mark.parametrize("method", ["tpe", "nsga2", "gp", "random", "qmc"])
def test_a_knob_that_does_not_matter_is_not_proposed_and_makes_no_other_fit(tmp_path: Path, method: str) -> None:
    study = digits_study(
        tmp_path,
        defense="adversarial_training",
        space="default",
        method=method,
        trials=6 if method == "gp" else 12,
        knobs={"eps": [0.1, 0.3]},
    )
    work = Pretence(lambda params: 0.9 - 0.2 * abs(math.log10(float(params.train["learning_rate"])) + 3.4))
    assert run(study, [], debug=True, work=work.work()) == "finished"
    settings = [proposal.params.train for proposal in work.asked]
    assert {setting["pgd_step_size"] for setting in settings if setting["attack"] == "fgsm"} == {0.01}
    assert {setting["pgd_steps"] for setting in settings if setting["attack"] == "fgsm"} == {40}
    assert {setting["attack"] for setting in settings} == {"fgsm", "pgd"} and len(work.asked) == study.trials
    trials = [t for t in SearchHistory(study).optuna.trials if t.state == TrialState.COMPLETE]
    asked = ["pgd_step_size" in t.params for t in trials if t.params["attack"] == "fgsm"]
    assert set(asked) == {method in ("nsga2", "gp", "qmc")}  # which learn of what every trial has, and of nothing else


def test_nsga2_breeds_from_every_candidate_and_not_from_the_proposed_ones_alone(tmp_path: Path) -> None:
    study = digits_study(tmp_path, method="nsga2", space="default", trials=12, knobs={"conv_maps": 8})
    work = Pretence(lambda params: 0.5)
    assert run(study, [], debug=True, work=work.work()) == "finished"
    done = [t for t in SearchHistory(study).optuna.trials if t.state == TrialState.COMPLETE]
    generations = [t.system_attrs[NSGAIISampler._get_generation_key()] for t in done]
    assert len(generations) == 72 and max(generations) >= 2


def test_a_long_search_shows_its_sampler_a_part_and_the_best_of_it() -> None:
    sampler = Bounded(optuna.samplers.RandomSampler(), 100, seed=0)
    study = optuna.create_study(directions=["minimize", "minimize"])
    seen = []
    for number in range(300):
        worth = (number * 37 % 300) / 300
        study.add_trial(create_trial(values=[worth, 5.0], params={}, distributions={}, constraints={"alarms": 0.0}))
        seen.append(sampler.shown(study.get_trials(deepcopy=False)))
    assert max(map(len, seen)) == 100 and min(map(len, seen[100:])) == 50
    assert {t.values[0] for t in seen[-1]} >= {k / 300 for k in range(20)}


def test_refinement_tries_new_inference_settings_of_the_best_fits_and_trains_nothing(tmp_path: Path) -> None:
    study = digits_study(
        tmp_path, space="wide", trials=5, refine=5, method="random", knobs={"sigma_eps": "0..10"}, eval_images=60
    )

    def attacked(params: Params) -> float:
        sigma, rc = float(params.inference["sigma_eps"]), math.log10(float(params.train["lambda_rc"]))
        return round(0.9 - 0.05 * abs(sigma - 3.3) - 0.05 * abs(rc), 3)

    first, second = Pretence(attacked, dies_at=7), Pretence(attacked)
    assert run(study, [], debug=True, work=first.work()) == "interrupted"
    assert [p.name for p in first.asked] == ["t001", "t002", "t003", "t004", "t005", "r001", "r002"]
    assert run(study, [], debug=True, work=second.work()) == "finished"
    assert [p.name for p in second.asked] == ["r003", "r004", "r005"] and all(p.refines for p in second.asked)
    history = SearchHistory(study)
    assert [t.user_attrs["trial"] for t in history.trials()] == ["t001", "t002", "t003", "t004", "t005"]
    assert (history.ended(), session.status(study)["finished"], session.status(study)["refinements"]) == (5, 5, 5)
    trainings = {str(p.params.train) for p in first.asked[:5]}
    refined = [p.params for p in (*first.asked[5:], *second.asked)]
    assert {str(params.train) for params in refined} <= trainings and len({str(p.train) for p in refined}) == 3
    assert len({str(params) for params in refined}) == 5
    candidates = history.candidates()
    assert len(candidates) == len({str(c.params) for c in candidates}) == 5 * 6 + 5
    best = max(attacked(p) for proposal in first.asked[:5] for p in [proposal.params])
    assert max(c.score.attacked_accuracy for c in candidates) > best


def test_a_refinement_whose_fit_is_gone_is_trained_to_its_end(tmp_path: Path) -> None:
    study = digits_study(tmp_path, space="wide", trials=1, refine=1, knobs={"sigma_eps": "0..10"}, patience=0, epochs=3)
    controller = open_controller(study, [])
    controller.begin(scored(Params({}, {}), 0.1))
    training = controller.next()
    assert training is not None and not controller.epoch(training.name, "fit", 1, {"cheap": 0.9})
    controller.finished(training.name, six(training.params), None, [0.9, 0.9, 0.9])
    refinement = controller.next()
    assert refinement is not None and refinement.refines
    assert not controller.epoch(refinement.name, "fit", 1, {"cheap": 0.1})


def test_where_the_whole_grid_is_scored_nothing_is_refined(study: Study) -> None:
    work = Pretence(lambda params: 0.5)
    assert run(study, [], debug=True, work=work.work()) == "finished"
    assert [proposal.name for proposal in work.asked] == ["t001", "t002"]


def test_in_place_of_a_training_that_is_done_comes_the_nearest_of_the_grid(tmp_path: Path) -> None:
    proposer = Proposer(digits_study(tmp_path, space="paper", trials=216))
    name, first = proposed(proposer)
    proposer.finish(name, six(first), {})
    again = {knob: value for knob, value in first.train.items() if knob in proposer.searched}
    steps = []
    for _ in range(6):
        proposer.optuna.enqueue_trial(again)
        name, params = proposed(proposer)
        steps.append(sum(abs(math.log10(float(params.train[knob]) / float(first.train[knob]))) for knob in again))
        proposer.finish(name, six(params), {})
    assert steps == pytest.approx([1, 1, 1, 1, 1, 2])  # the lambda of 0.01 has no lower one
