"""What a search has cost, and what it did not have to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from search.report.summary import Summary, TrialRecord

STATES = ("finished", "pruned", "failed", "interrupted", "running")


@dataclass(frozen=True)
class Spent:
    """What trials of one kind took.

    Args:
        kind: the state of the trainings, or what else they were.
        epochs: that they trained.
        seconds: for which they held their share of a machine.
    """

    kind: str
    trials: int
    epochs: int
    seconds: float


@dataclass(frozen=True)
class Cost:
    """What the trials of a search took; classifiers, and what is made once for all trials, are not in it.

    Args:
        busy: seconds in which at least one trial ran.
        cores: CPU cores of a trial.
        gpus: GPUs of a trial.
        fits: trainings of which candidates came.
        candidates: how many came of them.
        epochs_saved, epochs_asked: of the pruned trainings.
        seconds_saved: what the epochs saved would have taken at each pruned training's own pace.
    """

    spent: Sequence[Spent]
    busy: float
    cores: float
    gpus: float
    fits: int
    candidates: int
    epochs_saved: int
    epochs_asked: int
    seconds_saved: float

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.spent)

    @property
    def trainings_saved(self) -> int:
        """How many trainings more it would have been, had each candidate been trained by itself."""
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
        epochs_saved=sum(asked - len(t.curve) for asked, t in pruned),
        epochs_asked=sum(asked for asked, _ in pruned),
        seconds_saved=sum((asked / len(t.curve) - 1) * (t.seconds or 0.0) for asked, t in pruned),
    )


def _spent(kind: str, trials: Sequence[TrialRecord]) -> Spent:
    trained = 0 if kind.startswith("refine") else sum(len(t.curve) for t in trials)
    return Spent(kind, len(trials), trained, sum(t.seconds or 0.0 for t in trials))


def _asked(trial: TrialRecord, epochs: int) -> int:
    """Return the epochs of a training had it gone on; at most `epochs`, where the trial does not say."""
    return max(int(trial.params.train.get("epochs", epochs)), len(trial.curve))
