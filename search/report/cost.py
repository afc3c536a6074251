"""The cost of a search in epochs and seconds, and the savings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from search.report.summary import Summary, TrialRecord

STATES = ("finished", "pruned", "failed", "interrupted", "running")


@dataclass(frozen=True)
class Spent:
    """The cost of the trials of one kind.

    Args:
        kind: the state of the trainings, or a description of other trials.
        epochs: number of epochs trained.
        seconds: total time for which they held their resources.
    """

    kind: str
    trials: int
    epochs: int
    seconds: float


@dataclass(frozen=True)
class Cost:
    """The cost of the trials of a search, without classifiers and other work that is done once for all trials.

    Args:
        busy: seconds in which at least one trial ran.
        cores: CPU cores per trial.
        gpus: GPUs per trial.
        fits: number of trainings that produced candidates.
        candidates: number of candidates.
        dropped: number of inference settings that lost the race of their training.
        epochs_saved, epochs_asked: epochs that pruned trainings saved, and those proposed for them.
        seconds_saved: estimated time of the saved epochs, from the time per epoch of each pruned training.
    """

    spent: Sequence[Spent]
    busy: float
    cores: float
    gpus: float
    fits: int
    candidates: int
    dropped: int
    epochs_saved: int
    epochs_asked: int
    seconds_saved: float

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.spent)

    @property
    def trainings_saved(self) -> int:
        """Number of trainings saved because candidates share fits."""
        return self.candidates - self.fits


def cost(summary: Summary) -> Cost:
    study, epochs = summary.study, summary.study.resolved.epochs
    kinds = {state: [t for t in summary.trials if t.state == state] for state in STATES}
    kinds["refinements, which train nothing"] = list(summary.refinements)
    pruned = [(_asked(t, epochs), t) for t in kinds["pruned"] if t.curve]
    on_gpu = any(device and not device.endswith("thread(s)") for device in summary.devices)
    return Cost(
        spent=[_spent(kind, trials) for kind, trials in kinds.items() if trials],
        busy=summary.busy,
        cores=study.cpus_per_trial,
        gpus=study.gpu_share(on_gpu),
        fits=len({c.fit for c in summary.candidates}),
        candidates=len(summary.candidates),
        dropped=sum(t.dropped for t in summary.trials),
        epochs_saved=sum(asked - len(t.curve) for asked, t in pruned),
        epochs_asked=sum(asked for asked, _ in pruned),
        seconds_saved=sum((asked / len(t.curve) - 1) * (t.seconds or 0.0) for asked, t in pruned),
    )


def _spent(kind: str, trials: Sequence[TrialRecord]) -> Spent:
    trained = 0 if kind.startswith("refine") else sum(len(t.curve) for t in trials)
    return Spent(kind, len(trials), trained, sum(t.seconds or 0.0 for t in trials))


def _asked(trial: TrialRecord, epochs: int) -> int:
    """Return the number of epochs of a full training; `epochs`, if the trial has no such knob."""
    return max(int(trial.params.train.get("epochs", epochs)), len(trial.curve))
