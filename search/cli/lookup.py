"""The commands that look things up or add to them: `list`, `doctor`, `completion`, `data` and `classifier`."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from search.cli import flags as f
from search.cli.terminal import BASH, Group, command, console, end, progress, show
from search.console import working
from spaces.exceptions import choose

app = typer.Typer()
data = typer.Typer(cls=Group, no_args_is_help=True, help="Fetch, check and list the data sets; add your own.")
classifier = typer.Typer(cls=Group, no_args_is_help=True, help="Add, list and remove classifiers of your own.")
LOOK = "Look up"
LAUNCH = Path(__file__).resolve().parents[2] / "launch.py"


@command(app, LOOK, "list puvae", "list tasks", "list tables --json", name="list")
def list_(what: f.Kind, storage: f.Storage = "runs", data_dir: f.DataDir = None, as_json: f.Json = False) -> None:
    """List what there is to choose from.

    Of one defense: each knob with its default, its legal values (domain),
    whether it needs a training (when), and what it means.
    """
    from search.cli import listings

    show(listings.rows(what, storage, data_dir), as_json)


@command(app, LOOK, "doctor", "doctor --address auto --json")
def doctor(
    storage: f.Storage = "runs", data_dir: f.DataDir = None, address: f.Address = None, as_json: f.Json = False
) -> None:
    """Say what this machine and the cluster can do, and what is missing.

    Each missing piece is named with its remedy, and exit code 1; `-` marks
    what is absent and not needed.
    """
    from search.cli.doctor import examine

    with progress(as_json):
        summary = examine(storage, data_dir, address)
    said = {True: "yes", False: "NO"}
    rows = [vars(one) if as_json else vars(one) | {"well": "-" if one.optional else said[one.well]} for one in summary]
    show(rows, as_json)
    end(int(any(not finding.well for finding in summary)))


@command(app, LOOK, "completion bash")
def completion(shell: f.Shell = "bash") -> None:
    """Print what completes `python launch.py` in a shell.

    In ~/.bashrc: eval "$(PATH/.venv/bin/python PATH/launch.py completion)"
    """
    choose("the shell", shell, ["bash"])
    typer.echo(BASH.replace("LAUNCH", shlex.quote(str(LAUNCH))), nl=False)


@command(data, "Commands", "data fetch mnist cifar10", name="fetch")
def data_fetch(names: f.DataSets, data_dir: f.DataDir = None, as_json: f.Json = False) -> None:
    """Download data sets, check them and decode them into the cache."""
    from search.cli import data_sets

    with progress(as_json) as screen:
        data_sets.fetch(names, data_dir, screen)
    if as_json:
        show(data_sets.check(names, data_dir), as_json)


@command(data, "Commands", "data check mnist --json", name="check")
@command(data, "Commands", "data list", name="list")
def data_check(names: f.MaybeDataSets = None, data_dir: f.DataDir = None, as_json: f.Json = False) -> None:
    """Say which data sets are cached, checked against their checksums."""
    from search.cli import data_sets

    show(data_sets.check(names or [], data_dir), as_json)


@command(
    data,
    "Commands",
    "data add leaves photographs/ --size 32",
    "data add leaves photographs/ --group '[^/]+/tree[0-9]+' --eps 4/255",
    "data add leaves leaves.npz",
    "data add leaves images.npy labels.npy",
    name="add",
)
def data_add(
    name: f.NewData,
    paths: f.DataFiles,
    size: f.Size = None,
    group: f.Group = None,
    seed: f.SplitSeed = 0,
    eps: f.OwnEps = "8/255",
    licence: f.Licence = "not stated by who added it",
    data_dir: f.DataDir = None,
    as_json: f.Json = False,
) -> None:
    """Add images of your own, as a data set like any other.

    PATH is a folder with a subfolder for each class (train/, validation/
    and test/ may stand above them), an .npz with x_train and y_train (and
    x_test, y_test), or an .npy of images and one of labels. What you do not
    split is split by the seed, each class in proportion.
    """
    from search.cli import data_sets
    from search.data.adding import Wishes

    wishes = Wishes(size=size, group=group, seed=seed, eps=eps, licence=licence)
    with progress(as_json) as screen:
        data_sets.add(name, paths, wishes, data_dir, screen)
    if as_json:
        show(data_sets.check([name], data_dir), as_json)


@command(data, "Commands", "data remove leaves", name="remove")
def data_remove(name: f.OwnData, data_dir: f.DataDir = None) -> None:
    """Remove a data set that was added; the files behind it stay."""
    from search.cli import data_sets

    data_sets.remove(name, data_dir, console)


@command(
    classifier,
    "Commands",
    "classifier add mine resnet.py:build --weights mine.pt --data leaves",
    "classifier add mine net.py:net --data mnist --mean 0.13 --std 0.31",
    name="add",
)
def classifier_add(
    name: f.NewClassifier,
    source: f.Source,
    dataset: f.OnData,
    weights: f.Weights = None,
    mean: f.Mean = None,
    std: f.Std = None,
    data_dir: f.DataDir = None,
    as_json: f.Json = False,
) -> None:
    """Add a classifier of your own to a data set, as the task DATA/NAME.

    FUNCTION takes nothing and returns an nn.Module: images in [0, 1] in,
    logits out. It is judged at once, and kept with its weights, which no
    search and no final run trains. Without --weights it is an
    architecture, which searches train like any other.
    """
    from search.classifiers import adding

    with progress(as_json) as screen, working(screen, f"judging {name} on the validation images of {dataset}"):
        added = adding.add(name, source, dataset, weights=weights, mean=mean, std=std, data_dir=data_dir)
    show(vars(added), as_json, adding.said)


@command(classifier, "Commands", "classifier list", name="list")
def classifier_list(data_dir: f.DataDir = None, as_json: f.Json = False) -> None:
    """Say which classifiers were added, and how accurate they are."""
    from search.classifiers import adding
    from search.formatting import percent

    found = adding.rows(data_dir)
    show(found if as_json else [{**row, "clean_accuracy": percent(row["clean_accuracy"])} for row in found], as_json)


@command(classifier, "Commands", "classifier remove leaves/mine", name="remove")
def classifier_remove(task: f.OwnTask, data_dir: f.DataDir = None) -> None:
    """Remove a classifier that was added; trainings made with it stay."""
    from search.classifiers import adding

    adding.remove(task, data_dir)


app.add_typer(data, name="data", rich_help_panel=LOOK)
app.add_typer(classifier, name="classifier", rich_help_panel=LOOK)
