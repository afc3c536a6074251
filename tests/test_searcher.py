"""The study: what is proposed, what it is told, and what it knows after a crash."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from attacks.threat import ThreatModel
from search import ranking, session
from search.record import Record, state_of, storage
from search.score import Candidate, Score
from search.searcher import Proposer
from search.store import fingerprint
from search.study import Study
from search.trial import store_of
from spaces.space import InputError, Params
from tests.conftest import digits_study


def scored(params: Params, attacked: float, *, clean: float = 0.95, ms: float = 5.0) -> Candidate:
    score = Score(
        threat=ThreatModel("Linf", 0.3, "white-box"),
        attacked_accuracy=attacked,
        attacked_error=1 - attacked,
        attacked_rejection=0.0,
        oblivious_accuracy=attacked,
        white_box_accuracy=attacked,
        clean_accuracy=clean,
        clean_rejection=0.0,
        latency_ms_p50=ms,
        latency_ms_p95=ms,
        images=100,
    )
    name = fingerprint(**params.flat())
    return Candidate(candidate=name, fit=name, defense="puvae", task="digits/A", params=params, score=score)


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


def test_pruned_and_failed_trials_keep_their_state_and_reason(study: Study) -> None:
    proposer = Proposer(study)
    first, second = proposed(proposer)[0], proposed(proposer)[0]
    proposer.stop(first, TrialState.PRUNED, {"curve": [0.5]})
    proposer.stop(second, TrialState.FAIL, {"reason": "diverged"})
    states = {t.user_attrs["trial"]: (t.state, state_of(t)) for t in Record(study).trials()}
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
        before.optuna.add_trial(before._frozen(name, other))
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
    assert proposer.importances() == {}


def test_knobs_that_matter_are_important(study: Study) -> None:
    proposer = Proposer(study)
    for _ in range(4):
        name, params = proposed(proposer)
        proposer.finish(
            name, [scored(c.params, 1 / (2 + float(c.params.inference["sigma_eps"]))) for c in six(params)], {}
        )
    assert max(proposer.importances().items(), key=lambda item: item[1])[0] == "sigma_eps"


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
        Record(study)
    name, _ = proposed(Proposer(study))
    journal = (study.folder / "study.journal").read_bytes()
    assert [t.user_attrs["trial"] for t in Record(study).trials()] == [name]
    assert (study.folder / "study.journal").read_bytes() == journal


def test_what_no_driver_runs_is_interrupted_and_not_running(study: Study) -> None:
    proposed(Proposer(study))
    with store_of(study).lock("searches", study.name):
        assert session.status(study)["running"] == 1
    found = session.status(study)
    assert (found["running"], found["interrupted"]) == (0, 1)


def test_a_search_of_an_earlier_version_is_refused_in_one_line_and_left_alone(study: Study) -> None:
    study.folder.mkdir(parents=True)
    old = optuna.create_study(study_name=study.name, storage=storage(study), directions=["maximize", "minimize"])
    old.set_metric_names(["attacked_accuracy", "latency_ms_p50"])
    for opening in (Record, Proposer):
        with pytest.raises(InputError, match="has attacked_accuracy, latency_ms_p50; search again under another name"):
            opening(study)
    assert optuna.load_study(study_name=study.name, storage=storage(study)).metric_names == old.metric_names


def test_thresholds_that_a_curve_picked_reach_the_study_without_them(tmp_path: Path) -> None:
    study = digits_study(tmp_path, defense="magnet")
    proposer = Proposer(study)
    name, params = proposed(proposer)
    picked = Params(params.train, {**params.inference, "detector_1": 0.987})
    proposer.finish(name, [scored(params, 0.5), scored(picked, 0.6)], {})
    (told,) = (t for t in proposer.optuna.trials if t.user_attrs.get("of") == name)
    assert "detector_1" not in told.params and "detector_2" in told.params
    assert picked in [c.params for c in proposer.candidates()]
