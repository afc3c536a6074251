"""The provenance of a figure: the version of the code, the libraries, and the command that reproduces it."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml

from search.study.study import Study
from spaces.domain import Scalar
from spaces.space import Params

ROOT = Path(__file__).resolve().parents[2]
CODE = ("spaces", "attacks", "defenses", "search", "launch.py")
EXAM = (
    "partner",
    "protect",
    "threat",
    "norm",
    "substitute",
    "suite",
    "noise",
    "train_images",
    "eval_images",
    "classifier_epochs",
    "classifier_recipe",
    "precision",
    "weights",
    "seed",
)
"""Fields of a study that affect a fit or its score, besides the defense, the task, eps and the knobs."""


def code() -> dict[str, Any]:
    """Return the version of this code: the commit, if it is in a git repository, and the SHA-256 of its sources."""
    sources = sorted(path for top in CODE for path in (*ROOT.glob(f"{top}/**/*.py"), *ROOT.glob(f"{top}*.py")))
    digest = hashlib.sha256()
    for path in sources:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    # The code may be an untracked copy inside another repository.
    commit = _git("log", "-1", "--format=%H", "--", "launch.py") and _git("rev-parse", "HEAD")
    changed = bool(commit and _git("status", "--porcelain", "--", *CODE))
    return {"commit": commit or None, "changed_since": changed, "sha256": digest.hexdigest()}


def _git(*words: str) -> str:
    """Return the output of git; empty if git is not installed, or there is no repository."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, encoding="utf-8").stdout.strip()


def libraries() -> dict[str, str]:
    """Return the version of every installed distribution."""
    found = {str(one.metadata["Name"]): one.version for one in distributions()}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def again(study: Study, params: Params) -> str:
    """Return the command that trains the fit of `params` again and scores it only at this setting."""
    evaluator = {"defense": study.defense, "task": study.task, "eps": study.resolved.threat.eps}
    usual = Study()
    evaluator |= {name: getattr(study, name) for name in EXAM if getattr(study, name) != getattr(usual, name)}
    words = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in evaluator.items()]
    words += [f"--knob {shlex.quote(f'{name}={_written(value)}')}" for name, value in params.flat().items()]
    return " ".join((f"python launch.py search --name {study.name}-again --trials 1", *words))


def export(study: Study, candidate: str) -> str:
    """Return the command that audits and exports a candidate."""
    elsewhere = "" if study.storage == Study().storage else f" --storage {shlex.quote(study.storage)}"
    return f"python launch.py export {study.name} --candidate {candidate}{elsewhere}"


def search_of(export: Path) -> str | None:
    """Return the name of the search of an existing export; None if there is no export."""
    config = export / "config.yaml"
    return str(yaml.safe_load(config.read_bytes())["study"]["name"]) if config.exists() else None


def _written(value: Scalar) -> str:
    return value if isinstance(value, str) else json.dumps(value)
