"""Other tools' searches on the tables of `benchmarks.quality_tables`, each by its own package.

    python -m venv /tmp/peers
    /tmp/peers/bin/pip install optuna==5.0.0 torch==2.13.0 smac==2.4.1 syne-tune==0.13.0 autograd 'numpy<2' 'scipy<1.14'
    /tmp/peers/bin/python -m benchmarks.peers --seeds 20 --out /tmp/peers.jsonl      resumes

A peer proposes trainings; it is given what is ours: a training is attacked at every inference setting when it ends, and
the best of them is its result. Ordered knobs are integers, which their models know to use. A peer that goes on with a
training later pays only for the further epochs.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.replay import FOLDER, Replay, Spent, Table


def result(replay: Replay, training: int, epoch: int) -> float:
    """Train up to an epoch and return its quick score or, after the last one, the best attacked accuracy."""
    quick = replay.train(training, epoch)
    return replay.sweep(training) if epoch == replay.table.epochs else quick


def by_optuna(sampler: Callable[[int], Any], hyperband: bool = False) -> Callable[[Replay, int], None]:
    """Return a search of Optuna."""

    def search(replay: Replay, seed: int) -> None:
        import optuna

        table = replay.table
        pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=table.epochs, reduction_factor=3)
        study = optuna.create_study(
            direction="maximize", sampler=sampler(seed), pruner=pruner if hyperband else optuna.pruners.NopPruner()
        )

        def objective(trial: Any) -> float:
            levels = {
                name: trial.suggest_int(name, 0, len(values) - 1)
                if table.ordered[name]
                else trial.suggest_categorical(name, tuple(range(len(values))))
                for name, values in table.values.items()
            }
            training = table.place(levels)
            for epoch in range(1, table.epochs):
                trial.report(replay.train(training, epoch), epoch)
                if hyperband and trial.should_prune():
                    raise optuna.TrialPruned
            return result(replay, training, table.epochs)

        study.optimize(objective, n_trials=2 * len(table.trainings))

    return search


def tpe(seed: int) -> Any:
    import optuna

    return optuna.samplers.TPESampler(seed=seed, multivariate=True)


def gp(seed: int) -> Any:
    import optuna

    return optuna.samplers.GPSampler(seed=seed)


def randomly(replay: Replay, seed: int) -> None:
    """Draw trainings without repetition."""
    for training in np.random.default_rng(seed).permutation(len(replay.table.trainings)):
        result(replay, int(training), replay.table.epochs)


def by_syne_tune(name: str) -> Callable[[Replay, int], None]:
    """Return a search of Syne Tune with one worker."""

    def search(replay: Replay, seed: int) -> None:
        from syne_tune import config_space
        from syne_tune.backend.trial_status import Trial
        from syne_tune.optimizer import baselines
        from syne_tune.optimizer.scheduler import SchedulerDecision

        table = replay.table
        space: dict[str, Any] = {
            knob: config_space.randint(0, len(values) - 1)
            if table.ordered[knob]
            else config_space.choice([str(i) for i in range(len(values))])
            for knob, values in table.values.items()
        }
        options: dict[str, Any] = {"search_options": {"debug_log": False}} if name != "ASHA" else {}
        scheduler = getattr(baselines, name)(
            space | {"epochs": table.epochs},
            metric="accuracy",
            mode="max",
            resource_attr="epoch",
            max_resource_attr="epochs",
            random_seed=seed,
            **options,
        )
        trials: dict[int, Trial] = {}
        at: dict[int, int] = {}
        for _ in range(4 * len(table.trainings)):
            suggestion = scheduler.suggest(len(trials))
            if suggestion is None:
                return
            if suggestion.spawn_new_trial_id:
                key = len(trials)
                trials[key] = Trial(key, suggestion.config, time.time())
                at[key] = 0
                scheduler.on_trial_add(trials[key])
            else:
                key = suggestion.checkpoint_trial_id
            trial = trials[key]
            training = table.place({knob: int(trial.config[knob]) for knob in table.values})
            while True:
                at[key] += 1
                told = {"accuracy": result(replay, training, at[key]), "epoch": at[key]}
                decision = scheduler.on_trial_result(trial, told)
                if decision != SchedulerDecision.CONTINUE:
                    break
                if at[key] == table.epochs:
                    scheduler.on_trial_complete(trial, told)
                    break

    return search


def by_smac(replay: Replay, seed: int) -> None:
    """Search by SMAC3's multi-fidelity facade: random forests and Hyperband."""
    import tempfile

    from ConfigSpace import Categorical, ConfigurationSpace, Integer
    from smac import MultiFidelityFacade, Scenario
    from smac.main.exceptions import ConfigurationSpaceExhaustedException

    table = replay.table
    space = ConfigurationSpace(seed=seed)
    for knob, values in table.values.items():
        space.add(
            Integer(knob, (0, len(values) - 1)) if table.ordered[knob] else Categorical(knob, list(range(len(values))))
        )

    def target(config: Any, seed: int = 0, budget: float = 1) -> float:
        return 1 - result(replay, table.place({k: int(config[k]) for k in table.values}), max(1, round(budget)))

    with tempfile.TemporaryDirectory() as folder:
        scenario = Scenario(
            space,
            deterministic=True,
            n_trials=4 * len(table.trainings),
            min_budget=1,
            max_budget=table.epochs,
            seed=seed,
            output_directory=Path(folder),
        )
        with suppress(ConfigurationSpaceExhaustedException):  # it finds nothing more that it did not try
            MultiFidelityFacade(scenario, target, overwrite=True, logging_level=40).optimize()


PEERS: dict[str, Callable[[Replay, int], None]] = {
    "random": randomly,
    "Optuna TPE": by_optuna(tpe),
    "Optuna GP": by_optuna(gp),
    "Optuna TPE, Hyperband": by_optuna(tpe, hyperband=True),
    "Syne Tune ASHA": by_syne_tune("ASHA"),
    "Syne Tune MOBSTER": by_syne_tune("MOBSTER"),
    "Syne Tune HyperTune": by_syne_tune("HyperTune"),
    "SMAC3 multi-fidelity": by_smac,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--tables", nargs="+", default=sorted(path.stem for path in FOLDER.glob("*.npz")))
    parser.add_argument("--out", type=Path, default=Path("peers.jsonl"))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    lines = asked.out.read_text(encoding="utf-8").splitlines() if asked.out.exists() else []
    known = {tuple(json.loads(line)[key] for key in ("table", "arm", "seed")) for line in lines}
    for seed in range(asked.seeds):
        for table in [Table(FOLDER / f"{name}.npz") for name in asked.tables]:
            for peer in asked.peers:
                if (table.name, peer, seed) in known:
                    continue
                replay, begin = Replay(table), time.process_time()
                with suppress(Spent):
                    PEERS[peer](replay, seed)
                row = {"table": table.name, "arm": peer, "seed": seed, "trail": replay.trail}
                with asked.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | {"cpu_s": time.process_time() - begin}) + "\n")


if __name__ == "__main__":
    main()
