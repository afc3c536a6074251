"""The study: the whole configuration of one search, validated before anything is trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from spaces.space import InputError, Scalar

Method = Literal["tpe", "nsga2", "gp", "random", "qmc", "grid"]
KnobWish = Scalar | list[Scalar]


class Study(BaseModel):
    """One search. Each field is a flag of `launch.py search` and a key of its YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("search", description="the search's name: its folder in the storage")
    defense: str = Field("puvae", description="a defense (list defenses)")
    task: str = Field("mnist/A", description="a data set and the classifier to protect (list tasks)")
    space: str = Field("default", description="a named search space of the defense (list spaces)")
    knobs: dict[str, KnobWish] = Field(
        {}, description="knobs beside the space's: NAME=VALUE fixes one, NAME=V1,V2 is a grid"
    )
    method: Method = Field("tpe", description="how Optuna proposes")
    trials: int = Field(40, ge=1, description="trainings at most")
    threat: Literal["white-box", "oblivious"] = Field("white-box", description="what the attacker knows")
    eps: Annotated[float | None, Field(ge=0, le=1)] = Field(
        None, description="L-infinity bound in pixel units of [0, 1]; the task's own where not given"
    )
    max_latency_ms: Annotated[float | None, Field(gt=0)] = Field(
        None, description="constraint: p50 of a batch of 128, in milliseconds"
    )
    min_clean_accuracy: Annotated[float | None, Field(ge=0, le=1)] = Field(
        None, description="constraint: least accuracy on clean images, a fraction"
    )
    train_images: Annotated[int | None, Field(ge=1)] = Field(None, description="training images; all where not given")
    eval_images: Annotated[int, Field(ge=1)] = Field(1000, description="validation images that are attacked")
    epochs: Annotated[int | None, Field(ge=1)] = Field(None, description="epochs of a training; the defense's own")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of everything")
    wandb: Literal["online", "offline", "disabled"] | None = Field(
        None, description="Weights & Biases; online where a key is found, else offline"
    )
    storage: str = Field("runs", description="the folder that holds searches and the store")
    data_dir: str | None = Field(None, description="the data cache; $CRUCIBLE_DATA, else ~/.cache/crucible")

    @property
    def folder(self) -> Path:
        """Everything a user sees of this search lies here."""
        return Path(self.storage) / self.name
