"""The table of running trainings."""

from __future__ import annotations

import time
from io import StringIO

import pytest
from rich.console import Console

from search import console
from search.study.candidate import Proposal
from search.study.study import Study
from search.tracking.live_table import LiveTable
from spaces.space import Params
from tests.support.summaries import undefended_of


def test_a_narrow_terminal_cuts_no_figure(study: Study) -> None:
    knobs = {f"some_long_name_{number}": 0.001 for number in range(6)}
    screen = Console(file=StringIO(), force_terminal=True, width=80)
    table = LiveTable(screen, study, list(knobs), epochs=1000, done=0)
    trial = Proposal("t001", Params(knobs, {}))
    table.trial_started(trial)
    table.epoch_ended(trial, 123, {"loss": 0.001234, "cheap": 0.625})
    with screen.capture() as shown:
        screen.print(table._table())
    assert "…" not in shown.get() and shown.get().count("some_long_name_") == 6
    assert {"t001", "123/1000", "0.001234", "62.5"} <= set(shown.get().split())


def test_a_training_that_is_scored_says_how_many_settings_are_done(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Proposal("t001", Params({}, {}))
    screen = Console(file=StringIO(), force_terminal=True, width=80)
    table = LiveTable(screen, study, [], epochs=2, done=0)
    table.epoch_ended(trial, 2, {"loss": 0.1, "cheap": 0.625})
    table.setting_scored(trial, 5, 24, 50)
    with screen.capture() as shown:
        screen.print(table._table())
    assert "scored 5/24" in shown.get()
    monkeypatch.setattr(console, "EVERY_S", 0.05)
    pipe = StringIO()
    lines = LiveTable(Console(file=pipe, width=80), study, [], epochs=2, done=0)
    lines.setting_scored(trial, 5, 24, 50)
    time.sleep(0.3)
    lines.close()
    told = f"{study.name} (t001 scored 5 of 24 settings on 50 images): 0 of {study.trials} trainings, 0:00:00 so far\n"
    assert told in pipe.getvalue()


def test_a_training_has_the_epochs_of_its_own_knob(study: Study) -> None:
    screen, pipe = Console(file=StringIO(), force_terminal=True, width=80), StringIO()
    short, long = (Proposal(f"t00{epochs}", Params({"epochs": epochs}, {})) for epochs in (2, 8))
    tables = [LiveTable(where, study, ["epochs"], epochs=8, done=0) for where in (screen, Console(file=pipe, width=80))]
    for table in tables:
        for trial in (short, long):
            table.trial_started(trial)
            table.epoch_ended(trial, 2, {"loss": 0.1, "cheap": 0.625})
    with screen.capture() as shown:
        screen.print(tables[0]._table())
    assert "2/8" in shown.get() and "2/2" not in shown.get() and "scoring" in shown.get()
    assert "t002 epoch 2/2:" in pipe.getvalue() and "t008 epoch 2/8:" in pipe.getvalue()


def test_the_first_figure_is_the_undefended_classifiers_quick_score(study: Study) -> None:
    table = LiveTable(Console(file=(pipe := StringIO()), width=200), study, [], epochs=3, done=0)
    table.classifier_trained(study.model_copy(update={"cheap_images": 10**6}), 0.25)
    table.close()
    images = study.resolved.eval_images
    assert (
        pipe.getvalue() == f"undefended digits/A: quick score 25.0, {images} validation images; all attacks come next\n"
    )


@pytest.mark.parametrize(("first", "left"), [(1, "5 min"), (3, "4 min")])
def test_the_time_left_is_told_from_the_first_epoch_on(
    first: int, left: str, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "EVERY_S", 0.05)
    study, pipe = study.model_copy(update={"trials": 4}), StringIO()
    table = LiveTable(Console(file=pipe, width=200), study, [], epochs=3, done=2)
    table.search_started(study, undefended_of())
    time.sleep(0.2)
    assert "left" not in pipe.getvalue()
    table._began -= 43.0
    table.epoch_ended(Proposal("t003", Params({}, {})), first, {"cheap": 0.5})
    time.sleep(0.2)
    table.close()
    assert f"2 of {study.trials} trainings" in pipe.getvalue() and f"{left} left" in pipe.getvalue().replace(
        "\xa0", " "
    )


def test_a_training_counts_once_whatever_becomes_of_it(study: Study) -> None:
    """It is started again when its worker dies, interrupted, stopped early, or its refinement is scored."""
    table = LiveTable(Console(file=StringIO(), force_terminal=True), study, [], epochs=3, done=1)
    first, refined = Proposal("t002", Params({}, {})), Proposal("r001", Params({}, {}), refines=True)
    seen = list[float]()

    def told() -> None:
        seen.append(table._progress.tasks[0].completed)

    for state in ("interrupted", "pruned"):
        for _ in range(2):
            table.trial_started(first)
            table.epoch_ended(first, 2, {"cheap": 0.5})
            told()
        table.setting_scored(first, 1, 2, 40)
        told()
        table.trial_ended(first, state, [], None, "")
        told()
    table.setting_scored(refined, 1, 1, 40)
    table.trial_ended(refined, "failed", [], None, "")
    told()
    assert seen == [1.5, 1.5, 1.875, 1.0, 1.5, 1.5, 1.875, 2.0, 2.0]


def test_a_thousand_trainings_are_no_more_rows_than_the_terminal_has(study: Study) -> None:
    screen = Console(file=StringIO(), force_terminal=True, width=80, height=30)
    table = LiveTable(screen, study, [], epochs=20, done=0)
    for number in range(1000):
        table.trial_started(Proposal(f"t{number:03d}", Params({}, {})))
    with screen.capture() as shown:
        screen.print(table._table())
    assert len(shown.get().splitlines()) <= 30 and "and 976 more trainings" in shown.get()
