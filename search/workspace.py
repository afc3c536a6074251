"""A ready W&B workspace on a search: the panels that its people ask for first, over the runs of its group."""

from __future__ import annotations

from pathlib import Path

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb.errors import Error as WandbError

from attacks.threat import ThreatModel
from search.study import Study
from search.tracking import PROJECT, within
from spaces.space import InputError, SearchSpace

TRIALS = 100
"""Of how many runs the learning curves are drawn at most."""


def view(study: Study) -> str:
    """Make a workspace on a search and return its URL.

    Raises:
        InputError: there is no key, no server that takes it, or the search's runs are not there.
    """
    _uploaded(study)
    try:
        return within(PATIENCE_S, lambda: _saved(study))
    except (WandbError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"a workspace needs a W&B server that takes your key, but {reason}") from None
