"""Search for defenses that keep accuracy under attack at little latency; review, export and prove them."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import typer

from search.cli import flags as f
from search.cli import lookup
from search.cli.terminal import Group, command, console, end, progress, run, show, use_utf8, warn
from search.study.columns import EXPLAINED
from spaces.exceptions import InputError

app = typer.Typer(cls=Group, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
searching, reviewing, exporting, proving = (
    partial(command, app, panel) for panel in ("1. Search", "2. Review", "3. Export", "4. Final runs")
)


@searching(
    "search --name first --trials 8 --train-images 10000 --dry-run",
    "search --name night --space paper --method grid --trials 216",
    "search --name mine --config search/quickstart.yaml",
    "search --name wide --knob lambda_rc=1e-3..10:log --eps 8/255",
    columns=EXPLAINED,
)
@f.flags
def search(
    config: f.Config = None,
    print_config: f.PrintConfig = False,
    dry_run: f.DryRun = False,
    as_json: f.Json = False,
    debug: f.Debug = False,
    **given: Any,
) -> None:
    """Search for the knobs that keep the most accuracy under attack.

    Optuna proposes knobs, Ray trains; each training is attacked and timed
    at many inference settings. All of it lies in STORAGE/NAME; after Ctrl-C
    or a crash `resume NAME` goes on. Each flag is a key of --config too.
    --json is for --dry-run.
    """
    from search import session
    from search.engine.dry_run import said
    from search.study.loading import make_study, read_study

    if as_json and not dry_run:
        raise InputError("--json must stand beside --dry-run; of a search that runs, `status NAME --json` tells")
    values = f.given(given)
    study = read_study(config, values) if config else make_study(values)
    if print_config:
        typer.echo(study.to_yaml(), nl=False)
    elif dry_run:
        with progress(as_json) as screen:
            found = session.rehearse(study, screen)
        show(vars(found), as_json, lambda _: said(found))
    else:
        end(session.begin(study, console, debug=debug))


@searching("resume first", "resume first --trials 80", "resume first --address local")
def resume(
    name: f.Name, trials: f.More = None, storage: f.Storage = "runs", address: f.Move = None, debug: f.Debug = False
) -> None:
    """Go on where a search stopped, or add trainings to one that is finished.

    What is finished stays; what was under way goes on from its last epoch.
    """
    from search import session
    from search.study.catalog import open_search

    moves = {} if address is None else {"address": None if address == "local" else address}
    study = open_search(name, storage).model_copy(update=moves)
    end(session.proceed(study, console, debug=debug, trials=trials))


@searching("status", "status first --json", columns=EXPLAINED)
def status(name: f.MaybeName = None, storage: f.Storage = "runs", as_json: f.Json = False) -> None:
    """Say what runs, what is done, and the best so far.

    Reads the study alone, so it may be asked while the search runs.
    """
    from search.report.status import board, details, states_of

    states = states_of(name, storage, warn)
    show(states[0] if name and as_json else states, as_json, board)
    for line in details(states[0]) if name and not as_json else ():
        console.print(line, highlight=False, soft_wrap=True)


@reviewing("report first", columns=EXPLAINED)
def report(name: f.Name, storage: f.Storage = "runs") -> None:
    """Write one self-contained HTML page on a search, and say where.

    It needs no network, and may be written while the search runs.
    """
    from search import session
    from search.study.catalog import open_search

    typer.echo(session.write_report(open_search(name, storage)))


@reviewing("dashboard first", "dashboard first --port 8081")
def dashboard(name: f.Name, port: f.Port = None, storage: f.Storage = "runs") -> None:
    """Serve Optuna's dashboard of a search, live, to this machine alone.

    Ctrl-C ends it. From elsewhere: ssh -L PORT:127.0.0.1:PORT HOST.
    """
    from search.report.dashboard import serve
    from search.study.catalog import open_search

    end(serve(open_search(name, storage), port, console))


@reviewing("wandb-view first", name="wandb-view")
def wandb_view(name: f.Name, storage: f.Storage = "runs") -> None:
    """Make a ready W&B workspace of a search, and say where.

    It needs a W&B server that can be reached, and a key (`wandb login`).
    """
    from search.study.catalog import open_search
    from search.tracking.wandb_workspace import view

    typer.echo(view(open_search(name, storage)))


@exporting("export first --pareto", "export first --top 1 --json", "export first --candidate 0cd209d5-c6")
def export(
    name: f.Name,
    pareto: f.Pareto = False,
    top: f.Top = None,
    candidate: f.Candidate = None,
    out: f.Out = None,
    despite_alarms: f.Despite = False,
    storage: f.Storage = "runs",
    as_json: f.Json = False,
) -> None:
    """Audit winners and write them as folders that load as an nn.Module.

    The audit attacks harder than the search did, says what the winner is
    worth beside no defense, and refuses what fails one of its checks; what
    the search found no better than no defense it refuses at once. An export
    holds weights, evidence and a card, and no pickle. The report is written
    anew, with the audited figures.
    """
    from search import session
    from search.export import exporter
    from search.optimizer.history import pick
    from search.study.catalog import open_search

    if sum((pareto, top is not None, candidate is not None)) != 1:
        raise InputError("an export needs one of --pareto, --top and --candidate, and no second")
    study = open_search(name, storage)
    chosen, wanted = pick(study, pareto=pareto, top=top, candidate=candidate)
    out = out or study.folder / "export"
    with progress(as_json) as screen:
        told = exporter.export_all(study, chosen, wanted, out, screen, despite_alarms=despite_alarms)
        screen.print(f"report     {session.write_report(study)}", highlight=False, soft_wrap=True)
    if as_json:
        show(told, as_json)
    end(int(sum(one["folder"] is not None for one in told) < min(wanted, len(told))))  # fewer may differ than are asked


@exporting("attack runs/first/export/CANDIDATE", "attack runs/first/export/CANDIDATE --suite full --json")
def attack(
    export: f.Export,
    suite: f.Suite = "standard",
    threat: f.Threat = None,
    norm: f.Norm = None,
    eps: f.Eps = None,
    images: f.Images = None,
    substitute: f.Substitute = None,
    seed: f.Seed = 1,
    data_dir: f.DataDir = None,
    changed: f.Changed = False,
    as_json: f.Json = False,
) -> None:
    """Attack an exported winner by any suite, on validation images.

    The table is printed, and kept in the export.
    """
    from search.cli import listings
    from search.export import attack

    how: dict[str, Any] = {"norm": norm, "eps": eps, "images": images, "substitute": substitute, "seed": seed}
    with progress(as_json) as screen:
        how |= {"changed": changed, "console": screen}
        found = attack.attack(listings.export(export), suite, knowledge=threat, data_dir=data_dir, **how)
    show(found, as_json, attack.page)


@exporting(
    "audit net.py:build --weights net.safetensors --data digits --norm Linf --eps 0.1",
    "audit net.py:build --data images.npz --norm Linf --eps 8/255 --suite standard",
)
def audit(
    source: f.Source,
    data: f.Data,
    norm: f.AuditNorm,
    eps: f.AuditEps,
    weights: f.Weights = None,
    threat: f.AuditThreat = "white-box",
    images: f.AuditImages = None,
    suite: f.AuditSuite = None,
    substitute: f.AuditSubstitute = "A",
    seed: f.Seed = 1,
    out: f.AuditOut = None,
    data_dir: f.DataDir = None,
    as_json: f.Json = False,
) -> None:
    """Attack any model, and say whether the figure can be believed.

    The checks of an export, on a model of yours: a plain nn.Module as it is
    (docs/audit.md). Evidence, a card and a page are kept in --out. The exit
    code is 1 where a check failed.
    """
    from search.auditing.run import audit_source
    from search.auditing.source import Source

    how: dict[str, Any] = {"norm": norm, "eps": eps, "knowledge": threat, "number": images, "suite": suite}
    model = Source.of(source, weights)
    folder = out or Path(f"audit-{model.name}")
    with progress(as_json) as screen:
        how |= {"substitute": substitute, "seed": seed, "data_dir": data_dir, "console": screen}
        found = audit_source(model, data, folder, **how)
    show(found.evidence, as_json, lambda _: f"{found}\nwritten    {folder}")
    end(int(bool(found.failed)))


@proving("final runs/first/export/CANDIDATE --seeds 5", "final runs/first/export --seeds 2 --images 500")
def final(
    exports: f.Exports,
    seeds: f.Seeds = 5,
    images: f.TestImages = None,
    storage: f.FinalStorage = None,
    address: f.Address = None,
    concurrent: f.Concurrent = None,
    gpus_per_trial: f.Gpus = None,
    cpus_per_trial: f.Cpus = None,
    data_dir: f.DataDir = None,
    changed: f.Changed = False,
    debug: f.Debug = False,
    as_json: f.Json = False,
) -> None:
    """Train winners anew and open the test split: the figures to publish.

    Trains on train + validation with fresh seeds, runs the suite `full`
    under all three threat models, AutoAttack and the static baselines. The
    table is printed, and kept in EXPORT/final. What is done is not repeated.
    """
    from search.cli import listings
    from search.final.final_run import final as run_final
    from search.final.page import page

    where: dict[str, Any] = {"storage": storage, "address": address, "concurrent": concurrent, "data_dir": data_dir}
    where |= {"gpus_per_trial": gpus_per_trial, "cpus_per_trial": cpus_per_trial, "changed": changed}
    with progress(as_json) as screen:
        found = run_final(listings.exports(exports), seeds=seeds, images=images, debug=debug, console=screen, **where)
    show(found, as_json, page)


@proving("list tables", "reproduce puvae/3 --fraction 0.05 --only A")
def reproduce(
    table: f.TableName,
    fraction: f.Fraction = 1.0,
    only: f.Labels = None,
    storage: f.Storage = "runs",
    data_dir: f.DataDir = None,
    out: f.Pages = None,
    seed: f.Seed = 0,
    as_json: f.Json = False,
) -> None:
    """Show a paper's table beside ours, cell by cell.

    Threat models stand under their true names. Trainings are not repeated.
    """
    from search.reproduce.page import page
    from search.reproduce.reproduction import reproduce as run_table

    where: dict[str, Any] = {"storage": storage, "data_dir": data_dir, "out": out}
    with progress(as_json) as screen:
        found = run_table(table, fraction=fraction, only=only or (), seed=seed, console=screen, **where)
    show(found, as_json, page)


app.add_typer(lookup.app)


def main() -> int:
    """Run the command line and return its exit code."""
    return run(app)


if __name__ == "__main__":
    use_utf8()
    sys.exit(main())
