"""Logs a search to Weights & Biases: one run per trial, one for the search and one for its exports.

The driver writes all runs. Offline runs are shown by `wandb leet FOLDER/wandb` and uploaded by
`wandb sync FOLDER/wandb`. A resumed search continues its runs, also those on a server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from defenses.base import Metrics
from search.optimizer.history import SearchHistory
from search.study.callbacks import Callback, State
from search.study.candidate import Candidate, Proposal
from search.study.ranking import feasible, ranked
from search.study.study import Study
from search.study.verdict import verdict_of_search
from search.tracking import wandb_panels
from search.tracking.wandb_panels import Extreme
from search.tracking.wandb_run import Mode
from search.tracking.wandb_writer import WandbWriter

SEARCH, EXPORT = "search", "export"
"""The keys of the runs of the search and of its exports; the key of a trial's run is the name of the trial."""

EXIT: dict[State, int] = {"finished": 0, "pruned": 0, "failed": 1, "interrupted": 255}
BY_TRIAL: dict[str, Extreme] = {
    "attacked_accuracy": "max",
    "attacked_error": "min",
    "clean_accuracy": "max",
    "latency_ms_p50": "min",
}
"""Figures of the best candidate of each trial that the run of the search shows, and the extreme to keep."""


class WandbTracker(Callback):
    """Logs a search to W&B.

    Args:
        mode: None uses $WANDB_MODE; without it, online if there is a key, else offline.
        folder: the folder of the search; wandb writes to its subfolder `wandb/`.
        say: prints one line for the user; called from another thread.
        known: the candidates that the study already has.
        ended: number of its ended trials by state.
    """

    def __init__(
        self,
        mode: Mode | None,
        folder: Path,
        say: Callable[[str], None],
        known: Sequence[Candidate] = (),
        ended: Mapping[str, int] | None = None,
    ) -> None:
        self._writer, self._say = WandbWriter(mode, folder, say), say
        self._states = Counter[str](ended or {})
        self._best = list(known)
        self._candidates = len(known)
        self._charted = set[str]()

    def __repr__(self) -> str:
        return f"WandbTracker({self._writer!r})"

    @property
    def mode(self) -> Mode:
        """The present mode: after failures it changes from online to offline, then to disabled."""
        return self._writer.mode

    @property
    def upload(self) -> str | None:
        """The command that uploads the offline runs; None if the mode is not offline."""
        return self._writer.upload

    def search_started(self, study: Study, undefended: Candidate) -> None:
        self._study, self._undefended = study, undefended
        config = study.model_dump(exclude={"address", "storage", "data_dir"})  # they describe the machine
        self._writer.open(SEARCH, _about(study, study.name, "search", config))
        self._writer.write(SEARCH, partial(wandb_panels.announce, self._say))
        by_trial = {f"trial/{name}": extreme for name, extreme in BY_TRIAL.items()}
        self._writer.write(SEARCH, partial(wandb_panels.define, "trial", by_trial))

    def trial_started(self, trial: Proposal) -> None:
        config = {
            "train": dict(trial.params.train),
            "inference": dict(trial.params.inference),
            **self._study.model_dump(include={"defense", "task", "seed", "space"}),
            **self._threat(),
        }
        kind = "refinement" if trial.refines else "trial"
        self._writer.open(trial.name, _about(self._study, trial.name, kind, config))

    def epoch_ended(self, trial: Proposal, epoch: int, metrics: Metrics) -> None:
        if trial.name not in self._charted:
            self._charted.add(trial.name)
            # `cheap` is an accuracy; all other metrics of a defense are losses
            extremes: dict[str, Extreme] = {name: "max" if name == "cheap" else "min" for name in metrics}
            self._writer.write(trial.name, partial(wandb_panels.define, "epoch", extremes))
        self._writer.write(trial.name, partial(wandb_panels.log, {"epoch": epoch, **metrics}))

    def trial_ended(
        self, trial: Proposal, state: State, candidates: Sequence[Candidate], picture: Path | None, reason: str
    ) -> None:
        self._states[state] += not trial.refines
        self._candidates += len(candidates)
        self._best = feasible(self._study, [*self._best, *candidates])[:1]
        best = next(iter((*feasible(self._study, candidates), *ranked(candidates))), None)
        outcome = {**self._threat(), **(best.row() if best else {}), "state": state, "reason": reason}
        if candidates:
            table = partial(wandb_panels.show_table, "candidates", self._study, tuple(candidates))
            self._writer.write(trial.name, table)
        if picture is not None:
            shown = [trial.name, *([SEARCH] if best in self._best else [])]
            for run in shown:
                self._writer.write(run, partial(wandb_panels.show_picture, picture))
        self._writer.write(trial.name, partial(wandb_panels.sum_up, outcome))
        self._writer.finish(trial.name, EXIT[state])
        self._writer.write(SEARCH, partial(wandb_panels.log, self._progress(best)))

    def search_ended(self, state: State, candidates: Sequence[Candidate]) -> None:
        known = tuple(candidates)
        if known:
            self._writer.write(SEARCH, partial(wandb_panels.show_table, "leaderboard", self._study, known))
            self._writer.write(SEARCH, partial(wandb_panels.show_charts, self._study, self._undefended, known))
        self._writer.write(SEARCH, partial(wandb_panels.sum_up, self._outcome(state, known)))
        self._writer.finish(SEARCH, EXIT[state])

    def close(self) -> None:
        """Finish every run and stop; this takes about two minutes at most. Further calls do nothing."""
        self._writer.close()

    def _threat(self) -> dict[str, Any]:
        threat = self._undefended.score.threat
        return {"threat": threat.knowledge, "norm": threat.norm, "eps": threat.eps}

    def _progress(self, latest: Candidate | None) -> dict[str, float]:
        point: dict[str, float] = {"trial": self._states.total(), "candidates": self._candidates}
        for best in self._best:
            point["best/attacked_accuracy"] = best.score.attacked_accuracy
            point["best/latency_ms_p50"] = best.score.latency_ms_p50
        if latest is not None:
            point |= {f"trial/{name}": getattr(latest.score, name) for name in BY_TRIAL}
        return point

    def _outcome(self, state: State, known: Sequence[Candidate]) -> dict[str, Any]:
        best = next(iter(feasible(self._study, known)), None)
        return {
            **self._threat(),
            "images": self._undefended.score.images,
            "state": state,
            "candidates": len(known),
            **{f"trials/{name}": self._states[name] for name in get_args(State)},
            **{f"undefended/{name}": value for name, value in self._undefended.row().items()},
            **({f"best/{name}": value for name, value in best.row().items()} if best else {}),
            **({"verdict": verdict_of_search(best, self._undefended)} if best else {}),
        }


def log_exports(study: Study, folders: Sequence[Path], say: Callable[[str], None]) -> None:
    """Log exports of a search in a separate run, each as a version of the artifact of the defense and task.

    Each version has the name of its candidate as alias. The best candidate of all that are exported, including earlier
    ones, also has the aliases `best` and the name of the search.
    """
    if not folders:
        return
    exported = {path.name for folder in folders for path in folder.parent.iterdir()}
    best = next((c.candidate for c in SearchHistory(study).feasible() if c.candidate in exported), None)
    writer = WandbWriter(study.wandb, study.folder, say)
    writer.open(EXPORT, _about(study, f"{study.name} exports", "export", {"search": study.name}))
    for folder in folders:
        aliases = [folder.name, *(["best", study.name] if folder.name == best else [])]
        writer.write(EXPORT, partial(wandb_panels.log_export, study, folder, aliases))
    writer.finish(EXPORT, 0)
    writer.close()
    if writer.upload:
        say(f"logged offline; upload it with: {writer.upload}")


def _about(study: Study, name: str, job_type: str, config: dict[str, Any]) -> dict[str, Any]:
    tags = (study.defense, study.task, study.threat)
    return {"group": study.name, "tags": tags, "name": name, "job_type": job_type, "config": config}
