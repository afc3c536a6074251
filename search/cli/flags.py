"""The flags and arguments of the command line: the fields of a study, and those that commands share.

This module must not import torch, so that `--help` and shell completion are fast.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from rich.markup import escape
from typer import Argument, Context, Option

import spaces
from attacks.threat import Knowledge
from attacks.threat import Norm as norms
from search.study.fields import Fields
from spaces.exceptions import InputError
from spaces.space import SearchSpace

PANELS: Mapping[str, tuple[str, ...]] = {
    "What is searched": (
        "name",
        "defense",
        "task",
        "partner",
        "space",
        "knobs",
        "method",
        "trials",
        "refine",
        "warm_start",
        "seed",
    ),
    "The threat": ("threat", "norm", "eps", "suite", "noise", "substitute", "protect"),
    "Constraints": ("max_latency_ms", "min_clean_accuracy", "max_clean_rejection"),
    "Size of a run": (
        *("train_images", "eval_images", "cheap_images", "scoring"),
        *("epochs", "classifier_epochs", "classifier_recipe", "precision", "weights"),
    ),
    "Stopping early": ("stopping", "grace", "halving", "patience", "trial_timeout"),
    "Cluster and storage": ("address", "gpus_per_trial", "cpus_per_trial", "concurrent", "storage", "data_dir"),
    "Logging": ("wandb", "notes", "system_metrics"),
}
"""The groups under which `search --help` shows the fields of a study."""
NOUNS = {"address": "HOST:PORT", "storage": "PATH", "data_dir": "PATH", "knobs": "NAME=VALUE", "notes": "WORDS"}
NOUNS |= {"system_metrics": "BOOLEAN"}
KINDS = {"defense": "defenses", "task": "tasks", "protect": "tasks", "space": "spaces", "suite": "attacks"}
KINDS |= {"knobs": "knobs", "warm_start": "searches"}
"""For each field whose value is a name: the kind of its value, for shell completion."""


def completed(kind: str) -> Callable[[Context], Sequence[str]]:
    """Return the completion function for names of a kind: a kind of `list`, or one that is handled here."""

    def names(ctx: Context) -> Sequence[str]:
        storage = Path(str(ctx.params.get("storage") or "runs"))
        defense = ctx.params.get("defense") or Fields().defense
        if kind == "searches":
            return [path.parent.name for path in storage.glob("*/study.yaml")]
        if kind == "exports":
            return [str(path.parent) for path in storage.glob("*/export/*/evidence.json")]
        if kind == "candidates":
            search = ctx.params.get("name") or ctx.args[0]  # Click leaves it there while a flag's value is missing
            rows = (storage / search / "candidates.csv").read_text(encoding="utf-8").splitlines()
            return [row.partition(",")[0] for row in rows[1:]]
        if kind == "knobs":
            import defenses  # imports torch

            return [f"{name}=" for name in SearchSpace.of(defenses.find(defense)).flat()]
        if kind == "data sets":
            from search.data.registry import data_set_names

            return data_set_names(ctx.params.get("data_dir"))
        if kind == "spaces":
            return spaces.names(defense)
        from search.cli import listings  # imports torch

        return list(
            dict.fromkeys(
                str(next(iter(row.values()))) for row in listings.rows(kind, str(storage), ctx.params.get("data_dir"))
            )
        )

    return names


def _completing(kind: str | None, words: Sequence[str]) -> Callable[..., Sequence[str]] | None:
    return (lambda: words) if words else completed(kind) if kind else None


def _value(
    noun: str, help: str, kind: str | None = None, words: Sequence[str] = (), flags: Sequence[str] = (), **more: Any
) -> Any:
    """Declare a flag with a value; it is completed from `words`, or from the names of a kind.

    Args:
        flags: the flag, if it is not the parameter's name.
    """
    return Option(*flags, metavar=noun, help=help, autocompletion=_completing(kind, words), **more)


def _switch(flag: str, help: str) -> Any:
    return Option(flag, metavar="", help=help)


def _named(noun: str, help: str, kind: str | None = None, words: Sequence[str] = ()) -> Any:
    """Declare an argument; it is completed like a flag."""
    return Argument(metavar=noun, help=help, autocompletion=_completing(kind, words))


KNOWS = "what the attacker knows (oblivious: not the defense; black-box: only answers; white-box: everything)"
LISTED = ("defenses", "attacks", "spaces", "tasks", "tables", "searches")
Name = Annotated[str, _named("NAME", "a search", "searches")]
MaybeName = Annotated[str | None, _named("NAME", "a search; else all", "searches")]
Export = Annotated[Path, _named("EXPORT", "the folder of an export", "exports")]
Exports = Annotated[list[Path], _named("EXPORT", "exports, or folders of some", "exports")]
TableName = Annotated[str, _named("TABLE", "a paper's table (list tables)", "tables")]
Kind = Annotated[str, _named("KIND", f"{', '.join(LISTED)}; or a defense: its knobs", words=LISTED)]
DataSets = Annotated[list[str], _named("DATASET", "data sets", "data sets")]
MaybeDataSets = Annotated[list[str] | None, _named("DATASET", "data sets; else all", "data sets")]
NewData = Annotated[str, _named("NAME", "the name of the new data set")]
OwnData = Annotated[str, _named("NAME", "a data set that was added", "data sets")]
DataFiles = Annotated[list[Path], _named("PATH", "a folder, an .npz, or two .npy: images, labels")]
Size = Annotated[str | None, _value("SIDE", "resize images to SIDE or HEIGHTxWIDTH pixels")]
Group = Annotated[str | None, _value("REGEX", "files with the same match in their path below PATH stay in one split")]
SplitSeed = Annotated[int, _value("INTEGER", "of the splits that you have not made, and of the order", min=0)]
OwnEps = Annotated[str, _value("FLOAT", "the usual budget in Linf, in pixel units of [0, 1]")]
Licence = Annotated[str, _value("WORDS", "what the owner of the images allows; it stands in exports and reports")]
NewClassifier = Annotated[str, _named("NAME", "the name of the new classifier")]
OwnTask = Annotated[str, _named("DATA/NAME", "a classifier that was added, after its data set", "tasks")]
Source = Annotated[str, _named("FILE.py:FUNCTION", "a function without arguments that returns an nn.Module")]
OnData = Annotated[str, _value("NAME", "the data set that it classifies", "data sets", flags=["--data"])]
Weights = Annotated[Path | None, _value("PATH", "trained weights: safetensors, or a state dict (.pt, .pth)")]
Mean = Annotated[str | None, _value("FLOATS", "of each channel, to normalise images; else the network does, or none")]
Std = Annotated[str | None, _value("FLOATS", "of each channel")]
Shell = Annotated[str, _named("SHELL", "bash")]

Config = Annotated[Path | None, _value("PATH", "a study in YAML, the same fields; flags win")]
PrintConfig = Annotated[bool, _switch("--print-config", "print the study and stop")]
DryRun = Annotated[bool, _switch("--dry-run", "say what would run and what it would take, and stop")]
Json = Annotated[bool, _switch("--json", "print JSON, and nothing else, to standard output")]
Debug = Annotated[bool, _switch("--debug", "work in this process, without Ray")]
Storage = Annotated[str, _value("PATH", "the folder or URI that holds searches and the store")]
DataDir = Annotated[str | None, _value("PATH", "the data cache; else $CRUCIBLE_DATA or ~/.cache/crucible")]
Address = Annotated[str | None, _value("HOST:PORT", "a Ray cluster, or auto; else this machine")]
Move = Annotated[str | None, _value("HOST:PORT", "another Ray cluster, or auto; local: this machine")]
More = Annotated[int | None, _value("INTEGER", "trainings in all, those that ended too; else as before", min=1)]
Port = Annotated[int | None, _value("INTEGER", "of this machine; else one that is free")]
Seed = Annotated[int, _value("INTEGER", "of random starts, targets and noise", min=0, max=2**32 - 1)]

Pareto = Annotated[bool, _switch("--pareto", "the whole Pareto front")]
Top = Annotated[int | None, _value("INTEGER", "the best K (least attacked error) that pass all audit checks", min=1)]
Candidate = Annotated[str | None, _value("NAME", "one candidate, by its name or the beginning of it", "candidates")]
Out = Annotated[Path | None, _value("PATH", "the folder of exports; else STORAGE/NAME/export")]
Changed = Annotated[bool, _switch("--changed", "go on where the code changed since the export; the results say so")]
Despite = Annotated[bool, _switch("--despite-alarms", "write a winner although audit checks failed; its card says so")]

Suite = Annotated[str, _value("NAME", "the attacks (list attacks)", "attacks")]
Threat = Annotated[
    str | None,
    _value(
        "NAME",
        f"{KNOWS}; else the export's",
        words=get_args(Knowledge),
    ),
]
Norm = Annotated[str | None, _value("NAME", "Linf or L2; else the export's", words=get_args(norms))]
Eps = Annotated[str | None, _value("FLOAT", "its bound, in pixel units of [0, 1], 8/255 too; else the export's")]
Images = Annotated[int | None, _value("INTEGER", "validation images; else as many as the search attacked")]
Substitute = Annotated[str | None, _value("NAME", "the black-box attacker's architecture; else the study's")]

Data = Annotated[str, _value("NAME", "a data set's validation images, or FILE.npz with x and y", "data sets")]
AuditNorm = Annotated[str, _value("NAME", "Linf or L2", words=get_args(norms))]
AuditEps = Annotated[str, _value("FLOAT", "its bound, in pixel units of [0, 1], 8/255 too")]
AuditThreat = Annotated[
    str,
    _value(
        "NAME",
        KNOWS,
        words=get_args(Knowledge),
    ),
]
AuditImages = Annotated[int | None, _value("INTEGER", "images, 32 or more; else 200, or all there are")]
AuditSuite = Annotated[
    str | None, _value("NAME", "further attacks, which count too: standard is AutoAttack (list attacks)", "attacks")
]
AuditSubstitute = Annotated[str, _value("NAME", "the black-box attacker's architecture")]
AuditOut = Annotated[Path | None, _value("PATH", "a new folder for evidence, card and page; else audit-FILE-FUNCTION")]

Seeds = Annotated[int, _value("INTEGER", "trainings, each with a fresh seed")]
TestImages = Annotated[int | None, _value("INTEGER", "test images that are attacked; else all")]
FinalStorage = Annotated[str | None, _value("PATH", "where trainings are kept; else the export's search's")]
Concurrent = Annotated[int | None, _value("INTEGER", "trainings at once; else what the cluster holds", min=1)]
Gpus = Annotated[float | None, _value("FLOAT", "of each training; else the search's", min=0)]
Cpus = Annotated[float | None, _value("FLOAT", "of each training; else the search's", min=0)]
Fraction = Annotated[float, _value("FLOAT", "of the paper's size; a smaller run says so beside its numbers")]
Labels = Annotated[list[str] | None, _value("LABEL", "cells with this label alone, such as a classifier; repeatable")]
Pages = Annotated[Path | None, _value("PATH", "the folder of the pages; else in the storage")]


def flags(command: Callable[..., None]) -> Callable[..., None]:
    """Add a flag for each field of a study to a command, so that the two always agree."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    fields = [_flag(name) for name in Fields.model_fields]
    command.__signature__ = inspect.Signature([*own, *fields])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *fields)}
    return command


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a study that were set by flags."""
    found = {name: value for name, value in values.items() if value not in (None, [])}
    return {**found, "knobs": _knobs(found["knobs"])} if "knobs" in found else found


def _flag(name: str) -> inspect.Parameter:
    """Return the flag of one field; its value stays text, because the study validates it."""
    field = Fields.model_fields[name]
    kinds = (field.annotation, *get_args(field.annotation))
    noun = "FLOAT" if float in kinds else "INTEGER" if int in kinds else "NAME"
    choices = [word for kind in kinds for word in get_args(kind) if isinstance(word, str)]
    default = field.get_default(call_default_factory=True)
    shown = f"{field.description}{': ' if choices else ''}{', '.join(choices)}"
    shown += f" [default: {default}]" if default not in (None, {}) else ""
    option = Option(
        "--knob" if name == "knobs" else "--" + name.replace("_", "-"),
        help=escape(shown),
        metavar=NOUNS.get(name, noun),
        rich_help_panel=next((panel for panel, names in PANELS.items() if name in names), None),
        autocompletion=_completing(KINDS.get(name), choices),
        show_default=False,
    )
    kind: Any = list[str] if name == "knobs" else str
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _knobs(texts: Sequence[str]) -> dict[str, Any]:
    """Parse NAME=VALUE and NAME=V1,V2 into the knobs of a study."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--knob must be NAME=VALUE or NAME=V1,V2, but is {text!r}")
        values = [_scalar(part) for part in value.split(",")]
        found[name] = values if len(values) > 1 else values[0]
    return found


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
