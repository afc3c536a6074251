"""Logs a search to Weights & Biases: a run for each training, each candidate and each export, and one for the search.

The configuration of a run is one setting, and its summary holds what was measured at this setting. All runs are of one
group, the name of the search. The driver writes them. Offline runs are shown by `wandb leet FOLDER/wandb` and uploaded
by `wandb sync`. A resumed search continues its runs, also those on a server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from attacks.threat import ThreatModel
from defenses.base import Metrics
from search.optimizer.history import SearchHistory
from search.study import sync
from search.study.callbacks import Callback, State
from search.study.candidate import Candidate, Proposal
from search.study.ranking import feasible, ranked
from search.study.study import Study
from search.study.winner import audits, verdict_on, winner
from search.tracking import wandb_panels
from search.tracking.wandb_panels import Extreme
from search.tracking.wandb_run import Mode
from search.tracking.wandb_writer import Page, WandbWriter, Write
from spaces.space import Params

SEARCH = "search"
"""The key of the run of the search; the key of another run is the name of its trial, candidate or export."""

RUNS = 1000
"""So many candidates have a run each, and of later trainings the best candidate alone: a run takes 20 ms of CPU, and
W&B's pages are not made for tens of thousands. candidates.csv has all of them."""
ROWS = 10_000
"""Most candidates in the table and the charts of the search's run: W&B shows no more rows of a table."""
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
        mode: None uses the mode that wandb resolves ($WANDB_MODE, `wandb offline`); offline where there is no key.
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
        self._brief = False
        self._logged = {c.candidate: ("", c.score.latency_ms_p50) for c in known}

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
        self._writer.open(SEARCH, _about_search(study, undefended))
        self._writer.write(SEARCH, partial(wandb_panels.announce, self._say))
        self._writer.write(SEARCH, wandb_panels.save_code)
        by_trial = {f"trial/{name}": extreme for name, extreme in BY_TRIAL.items()}
        self._writer.write(SEARCH, partial(wandb_panels.define, "trial", by_trial))

    def trial_started(self, trial: Proposal) -> None:
        if not trial.refines:
            self._writer.open(trial.name, self._about_setting(trial.name, "training", trial.params))

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
        outcome: dict[str, Any] = {"state": state, "reason": reason}
        if trial.refines and not candidates:
            about = self._about_setting(trial.name, "candidate", trial.params)
            writes: list[Write] = [partial(wandb_panels.sum_up, outcome)]
            self._writer.log({trial.name: Page(about, whole=False, writes=writes, exit_code=EXIT[state])})
        elif not trial.refines:
            outcome |= {"candidates": len(candidates), "best_candidate": best and best.candidate}
            self._writer.write(trial.name, partial(wandb_panels.sum_up, outcome))
            self._writer.finish(trial.name, EXIT[state])
        pictures = {best.candidate: picture} if best and picture else {}
        if best and len(candidates) > 1 and len(self._logged) >= RUNS:
            if not self._brief:
                self._say(f"W&B: from here on, only the best candidate of a training has a run, after {RUNS:,} of them")
            self._brief, candidates = True, [best]
        self._log_candidates([(trial.name, candidate) for candidate in candidates], pictures)
        if best in self._best and picture:
            self._writer.write(SEARCH, partial(wandb_panels.show_picture, picture))
        self._writer.write(SEARCH, partial(wandb_panels.log, self._progress(best)))

    def search_ended(self, state: State, candidates: Sequence[Candidate]) -> None:
        known = tuple(candidates)
        logged = [(*self._logged[c.candidate], c) for c in known if c.candidate in self._logged]
        again = [(trial, c) for trial, latency_ms, c in logged if latency_ms != c.score.latency_ms_p50]
        self._log_candidates(again, {})
        if known:
            shown = known if len(known) <= ROWS else (*feasible(self._study, known), *ranked(known))
            shown = tuple({c.candidate: c for c in shown}.values())[:ROWS]
            self._writer.write(SEARCH, partial(wandb_panels.show_table, "leaderboard", self._study, shown))
            self._writer.write(SEARCH, partial(wandb_panels.show_charts, self._study, self._undefended, shown))
        self._writer.write(SEARCH, partial(wandb_panels.sum_up, self._outcome(state, known)))
        self._writer.finish(SEARCH, EXIT[state])

    def close(self) -> None:
        """Finish every run and stop, in about two minutes where a server is slow. Further calls do nothing."""
        self._writer.close()

    def _log_candidates(self, ended: Sequence[tuple[str, Candidate]], pictures: Mapping[str, Path]) -> None:
        """Write the run of each candidate, given with the name of its trial; a run that exists is continued."""
        runs = {}
        for trial, candidate in ended:
            about = self._about_setting(candidate.candidate, "candidate", candidate.params)
            about["config"] |= {"fit": candidate.fit, "candidate": candidate.candidate}
            about["config"] |= {"trial": trial} if trial else {}  # of an earlier session, W&B knows it
            measured = wandb_panels.figures(self._study, self._undefended, candidate)
            writes: list[Write] = [partial(wandb_panels.sum_up, measured)]
            if candidate.candidate in pictures:
                writes.append(partial(wandb_panels.show_picture, pictures[candidate.candidate]))
            runs[candidate.candidate] = Page(about, whole=False, writes=writes, exit_code=0)
            self._logged[candidate.candidate] = trial, candidate.score.latency_ms_p50
        if runs:
            self._writer.log(runs)

    def _about_setting(self, name: str, job_type: str, params: Params) -> dict[str, Any]:
        return _about(self._study, name, job_type, _setting(self._study, self._undefended.score.threat, params))

    def _progress(self, latest: Candidate | None) -> dict[str, float]:
        point: dict[str, float] = {"trial": self._states.total(), "candidates": self._candidates}
        for best in self._best:
            point["best/attacked_accuracy"] = best.score.attacked_accuracy
            point["best/latency_ms_p50"] = best.score.latency_ms_p50
        if latest is not None:
            point |= {f"trial/{name}": getattr(latest.score, name) for name in BY_TRIAL}
        return point

    def _outcome(self, state: State, known: Sequence[Candidate]) -> dict[str, Any]:
        return {
            **_threat(self._undefended.score.threat),
            "images": self._undefended.score.images,
            "state": state,
            "candidates": len(known),
            **{f"trials/{name}": self._states[name] for name in get_args(State)},
            **{f"undefended/{name}": value for name, value in self._undefended.row().items()},
            **_winner(self._study, self._undefended, known),
        }


def log_exports(study: Study, folders: Sequence[Path], say: Callable[[str], None]) -> None:
    """Log exports of a search, each in a run and as a version of the artifact of the defense and task.

    Each version has the name of its candidate as alias. The best candidate of all that are exported, including earlier
    ones, also has the aliases `best` and the name of the search; one that failed a check has not. The run of the search
    takes over what its winner is worth by now; that of a search that still runs does so at its end.
    """
    history = SearchHistory(study)
    known = {candidate.candidate: candidate for candidate in history.candidates()}
    exported = {path.name for folder in folders for path in folder.parent.iterdir()}
    best = winner([c for c in history.feasible() if c.candidate in exported], audits(study, known.values()))
    writer = WandbWriter(study.wandb, study.folder, say)
    for folder in folders:
        aliases = [folder.name, *(["best", study.name] if best and folder.name == best.candidate else [])]
        key, candidate = f"export-{folder.name}", known[folder.name]
        config = _setting(study, candidate.score.threat, candidate.params) | {"candidate": candidate.candidate}
        writer.open(key, _about(study, key, "export", config))
        writer.write(key, partial(wandb_panels.log_export, study, folder, aliases))
        writer.finish(key, 0)
    if (undefended := history.undefended()) and not sync.runs(study):
        writer.open(SEARCH, _about_search(study, undefended))
        worth = _winner(study, undefended, list(known.values()))
        writer.write(SEARCH, partial(wandb_panels.sum_up, worth))
        writer.finish(SEARCH, EXIT["finished" if history.finished() else "interrupted"])
    writer.close()
    if writer.upload:
        say(f"logged offline; upload it with: {writer.upload}")


def _winner(study: Study, undefended: Candidate, known: Sequence[Candidate]) -> dict[str, Any]:
    """Return the best candidate's figures, as its search and an audit found them, and what it is worth by now."""
    ranked, audited = feasible(study, known), audits(study, known)
    best = winner(ranked, audited)
    if best is None:
        return {"verdict": "no winner: the audit refused every candidate"} if ranked else {}
    audit = audited.get(best.candidate)
    return {
        **{f"best/{name}": value for name, value in best.row().items()},
        "best/audited_accuracy": audit and audit["attacked_accuracy"],
        "verdict": verdict_on(best, undefended, ranked, audited),
    }


def _about_search(study: Study, undefended: Candidate) -> dict[str, Any]:
    config = study.model_dump(exclude={"address", "storage", "data_dir", "notes"})
    return _about(study, "", "search", config | _threat(undefended.score.threat)) | {"notes": study.notes}


def _about(study: Study, name: str, job_type: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of wandb.init; the run of the search has its name, the others this and their own."""
    named = f"{study.name}-{name}" if name else study.name
    tags = (study.defense, study.task, study.threat)
    return {"group": study.name, "tags": tags, "name": named, "job_type": job_type, "config": config}


def _setting(study: Study, threat: ThreatModel, params: Params) -> dict[str, Any]:
    """Return the configuration of a run of one setting."""
    whose = study.model_dump(include={"defense", "task", "seed", "space"})
    return {"train": dict(params.train), "inference": dict(params.inference), **whose, **_threat(threat)}


def _threat(threat: ThreatModel) -> dict[str, Any]:
    return {"threat": threat.knowledge, "norm": threat.norm, "eps": threat.eps}
