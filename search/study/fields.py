"""The fields of a study with their constraints: the flags of `launch.py search`, shown without importing torch."""

from __future__ import annotations

import os
import re
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from attacks.threat import Knowledge, Norm
from search.data.folders import full
from search.storage.uri import check_storage
from spaces.domain import Scalar, as_written

Method = Literal["forecast", "tpe", "nsga2", "gp", "random", "qmc", "grid"]
KnobWish = Scalar | list[Scalar]


def spelt(norm: Any) -> Any:
    """Return a norm as it is spelt here: Linf for linf; anything else unchanged."""
    return {known.lower(): known for known in get_args(Norm)}.get(str(norm).lower(), norm)


class Fields(BaseModel):
    """A user's settings of a search. Each field is a flag of `launch.py search` and a key of its YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("search", description="the search's name: its folder in the storage")
    defense: str = Field("puvae", description="a defense (list defenses)")
    task: str = Field("mnist/A", description="a data set and the classifier to protect (list tasks)")
    space: str = Field("default", description="a named search space of the defense (list spaces)")
    knobs: dict[str, KnobWish] = Field(
        {},
        description="knobs beside the space's: NAME=VALUE fixes one, NAME=V1,V2 is a grid, "
        "NAME=LOW..HIGH or LOW..HIGH:log a range",
    )
    method: Method = Field("forecast", description="how trainings are proposed: by our own model, or by Optuna")
    trials: int = Field(40, ge=1, description="trainings at most")
    threat: Knowledge = Field(
        "white-box",
        description="what the attacker knows (oblivious: not the defense; black-box: answers; white-box: all)",
    )
    norm: Norm = Field("Linf", description="the norm of the perturbation")
    eps: float | None = Field(
        None, ge=0, description="its bound, in pixel units of [0, 1]; else the suite's paper's, or the task's in Linf"
    )
    substitute: str | None = Field(
        None,
        description="the black-box attacker's architecture (list tasks); else the protected one's partner",
    )
    suite: str = Field("search", description="the attacks that score a candidate (list attacks)")
    noise: Literal["unknown", "known"] = Field(
        "unknown",
        description="of a defense that draws some, to the attacker; known: scored both ways, over at least 5 draws "
        "(columns worst_draw_accuracy, known_noise_accuracy)",
    )
    max_latency_ms: float | None = Field(
        None, gt=0, description="constraint: p50 of the purification latency of a batch of 128, in milliseconds"
    )
    min_clean_accuracy: float | None = Field(
        None, ge=0, le=1, description="constraint: least accuracy on clean images, a fraction"
    )
    max_clean_rejection: float = Field(
        0.05, ge=0, le=1, description="constraint: most clean images that may be rejected, a fraction"
    )
    protect: str | None = Field(
        None, description="the task whose classifier is attacked, where it is not the one trained with: mnist/C"
    )
    partner: str | None = Field(
        None,
        description="the classifier that PuVAE is trained with (list tasks); else one like the task's, or the task's "
        "own where you added it",
    )
    train_images: int | None = Field(None, ge=1, description="training images; else all")
    eval_images: int | None = Field(
        None, ge=1, description="validation images that are attacked; else 1000, or all where there are fewer"
    )
    cheap_images: int = Field(128, ge=1, description="of them, those of the quick score (for early stopping)")
    scoring: Literal["race", "all"] = Field(
        "race",
        description="race: all inference settings of a training are attacked on a quarter of the images, those that "
        "may be its best on all; all: each on all",
    )
    epochs: int | None = Field(None, ge=1, description="epochs of a training; else the defense's own")
    classifier_epochs: int = Field(10, ge=1, description="epochs of the protected classifier and of its partner")
    classifier_recipe: Literal["plain", "augmented"] = Field(
        "plain",
        description="how they are trained; augmented: by random crops and flips, as AdvAE's on CIFAR-10, until the "
        "loss on held-out images no longer falls, --classifier-epochs at most",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of trainings; else bfloat16 where the hardware computes in it natively. Attacks, verdicts and "
        "latency are float32, always",
    )
    weights: str | None = Field(
        None,
        description="a file with the defense's weights (safetensors, or a state dict), so that nothing is trained; all "
        "knobs of its training must be fixed",
    )
    stopping: Literal["halving", "median", "none"] = Field(
        "halving", description="the rule that stops trainings early, on their quick scores (--cheap-images)"
    )
    grace: int | None = Field(None, ge=1, description="epochs before a training may be stopped; else half of all")
    halving: float = Field(
        3.0, gt=1, description="of the trainings that reach an epoch where some are stopped one in so many goes on"
    )
    patience: int = Field(8, ge=0, description="trainings that reach such an epoch before any is stopped there")
    refine: int = Field(
        24,
        ge=0,
        description="settings tried at the end on the best trainings, where inference knobs are continuous",
    )
    warm_start: str | None = Field(None, description="a search of the storage, or an export's folder, to begin from")
    trial_timeout: float | None = Field(
        None, gt=0, description="seconds of work after which a training is given up (not with --debug); else never"
    )
    gpus_per_trial: float | None = Field(
        None, ge=0, description="GPUs of a training; a fraction shares one; else 0.25 where there is one"
    )
    cpus_per_trial: float = Field(1.0, gt=0, description="CPU cores of a training")
    concurrent: int | None = Field(None, ge=1, description="trainings at once; else what the cluster holds")
    address: str | None = Field(None, description="a Ray cluster: auto or HOST:PORT; else a local one")
    storage: str = Field(
        "runs", validate_default=True, description="the folder or URI that holds searches and the store they share"
    )
    data_dir: str | None = Field(None, description="the data cache; else $CRUCIBLE_DATA or ~/.cache/crucible")
    wandb: Literal["online", "offline", "disabled"] | None = Field(
        None, description="Weights & Biases; else online where a key is found"
    )
    notes: str | None = Field(None, description="what this search is for: the notes of its W&B run; else $WANDB_NOTES")
    system_metrics: bool = Field(
        True, description="whether its W&B run shows load, memory and GPUs of the driver's machine: true, false"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of everything")

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
            raise ValueError("must be letters, digits, '.', '_' and '-', and no path")
        return name

    @field_validator("norm", mode="before")
    @classmethod
    def _may_be_in_small_letters(cls, norm: object) -> object:
        return spelt(norm)

    @field_validator("eps", mode="before")
    @classmethod
    def _may_be_a_fraction(cls, eps: object) -> object:
        return as_written(eps)

    @field_validator("data_dir")
    @classmethod
    def _is_absolute(cls, data_dir: str | None) -> str | None:
        return None if data_dir is None else os.path.realpath(full(data_dir))

    @field_validator("storage")
    @classmethod
    def _is_a_folder(cls, storage: str) -> str:
        return check_storage(storage)  # absolute, since workers have other working directories
