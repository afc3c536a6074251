"""Crucible's command line. `python launch.py COMMAND --help` teaches each command."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

import defenses
import spaces
from search.study import Study, make, read
from spaces.space import InputError, SearchSpace, choose, conditions, spoken

app = typer.Typer(add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
data = typer.Typer(no_args_is_help=True, help="Fetch, check and list the data sets.")
app.add_typer(data, name="data")


class Screen(Console):
    """The terminal, or what the output is piped to, such as `head`."""

    def on_broken_pipe(self) -> None:
        """Go on in silence: whoever listened has heard enough, but a search has not ended."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = Screen(width=None if sys.stdout.isatty() else 1000)  # what is piped is never cut

Storage = Annotated[str, Option(help="the folder or URI that holds searches and the store")]
Json = Annotated[bool, Option("--json", help="print JSON")]
Address = Annotated[str | None, Option(help="a Ray cluster: auto or HOST:PORT; else the study's, if any")]
DataDir = Annotated[str | None, Option(help="the data cache; else $CRUCIBLE_DATA or ~/.cache/crucible")]


def flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for each field of Study, so that neither can drift from the other."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    fields = []
    for name, field in Study.model_fields.items():
        kind: Any = list[str] if name == "knobs" else str
        default = field.get_default(call_default_factory=True)
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
        shown = f"{field.description}{': ' if choices else ''}{', '.join(choices)}"
        shown += f" (default: {default})" if default not in (None, {}) else ""
        flag = "--knob" if name == "knobs" else "--" + name.replace("_", "-")
        fields.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, Option(flag, help=shown, show_default=False)],
            )
        )
    command.__signature__ = inspect.Signature([*own, *fields])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *fields)}
    return command


@app.command()
@flags
def search(
    config: Annotated[Path | None, Option(help="a study in YAML, the same fields; flags win")] = None,
    print_config: Annotated[bool, Option(help="print the study and stop")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="say what would run and what it would take, and stop")] = False,
    as_json: Annotated[bool, Option("--json", help="print the dry run as JSON")] = False,
    debug: Annotated[bool, Option(help="run the trials in this process, without Ray")] = False,
    **given: Any,
) -> None:
    """Search for the knobs that keep the most accuracy under attack for the least latency.

    Example: python launch.py search --name first --defense puvae --task mnist/A --trials 8 --train-images 10000
    """
    from search import session

    values = {name: value for name, value in given.items() if value not in (None, [])}
    if "knobs" in values:
        values["knobs"] = _knobs(values["knobs"])
    study = read(config, values) if config else make(values)
    if print_config:
        typer.echo(study.to_yaml(), nl=False)
        return
    if dry_run:
        from search.forecast import said

        found = session.rehearse(study)
        typer.echo(json.dumps(vars(found), indent=1) if as_json else said(found))
        return
    _exit(session.begin(study, console, debug=debug))


@app.command()
def resume(
    name: Annotated[str, Argument(help="a search")],
    storage: Storage = "runs",
    address: Annotated[str | None, Option(help="another Ray cluster: auto or HOST:PORT; local: this machine")] = None,
    debug: Annotated[bool, Option(help="run the trials in this process, without Ray")] = False,
) -> None:
    """Go on where a search stopped: what is finished stays, what was under way goes on from its last epoch."""
    from search import session

    study = _study(name, storage)
    moves = {} if address is None else {"address": None if address == "local" else address}
    _exit(session.proceed(study.model_copy(update=moves), console, debug=debug))


@app.command()
def status(
    name: Annotated[str | None, Argument(help="a search; else all")] = None,
    storage: Storage = "runs",
    as_json: Json = False,
) -> None:
    """Say what runs, what is done, and the best so far."""
    from search import courier, session
    from search.progress import board, details

    names = [name] if name else courier.names(storage)
    states = []
    for each in names:
        try:
            states.append(session.status(courier.opened(each, storage, whole=False)))
        except InputError as error:
            if name:
                raise
            typer.echo(f"{each}: {error}", err=True)  # one search that cannot be read hides no other
    if as_json:
        typer.echo(json.dumps(states[0] if name else states, indent=1))
        return
    console.print(board(states))
    for line in details(states[0]) if name else ():
        console.print(line, highlight=False, soft_wrap=True)


@app.command()
def report(name: Annotated[str, Argument(help="a search")], storage: Storage = "runs") -> None:
    """Write one self-contained HTML page on a search."""
    from search import session

    typer.echo(session.write_report(_study(name, storage)))


@app.command()
def export(
    name: Annotated[str, Argument(help="a search")],
    pareto: Annotated[bool, Option("--pareto", help="the whole Pareto front")] = False,
    top: Annotated[int | None, Option(min=1, help="the best K (least attacked error) that pass the audit")] = None,
    candidate: Annotated[str | None, Option(help="one candidate, by its name or the beginning of it")] = None,
    out: Annotated[Path | None, Option(help="the folder of exports; else STORAGE/NAME/export")] = None,
    despite_alarms: Annotated[bool, Option("--despite-alarms", help="write what the audit refuses")] = False,
    storage: Storage = "runs",
) -> None:
    """Audit winners and write them as folders that load as a plain nn.Module.

    Example: python launch.py export first --top 1
    """
    from search import winners

    if sum((pareto, top is not None, candidate is not None)) != 1:
        raise InputError("an export needs one of --pareto, --top and --candidate")
    study = _study(name, storage)
    chosen, wanted = winners.pick(study, pareto=pareto, top=top, candidate=candidate)
    out = out or study.folder / "export"
    _exit(winners.export_all(study, chosen, wanted, out, console, despite_alarms=despite_alarms))


@app.command()
def attack(
    export: Annotated[Path, Argument(help="the folder of an export")],
    suite: Annotated[str, Option(help="the attacks (list attacks)")] = "standard",
    threat: Annotated[str | None, Option(help="oblivious, black-box or white-box; else the export's")] = None,
    norm: Annotated[str | None, Option(help="Linf or L2; else the export's")] = None,
    eps: Annotated[str | None, Option(help="its bound, in pixel units of [0, 1], 8/255 too; else the export's")] = None,
    images: Annotated[int | None, Option(help="validation images; else as many as the search attacked")] = None,
    substitute: Annotated[str | None, Option(help="the black-box attacker's architecture; else the study's")] = None,
    seed: Annotated[int, Option(help="of random starts, targets and noise")] = 1,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Attack an exported winner by any suite; the table is printed and kept in the export.

    Example: python launch.py attack runs/first/export/CANDIDATE --suite standard --images 100
    """
    from search.attack import attack as strike
    from search.attack import page

    table = strike(
        export,
        suite,
        knowledge=threat,
        norm=norm,
        eps=eps,
        images=images,
        substitute=substitute,
        data_dir=data_dir,
        seed=seed,
    )
    typer.echo(json.dumps(table, indent=1) if as_json else page(table), nl=as_json)


@app.command("list")
def list_(
    what: Annotated[str, Argument(help="defenses, attacks, spaces, tasks or searches")],
    storage: Storage = "runs",
    as_json: Json = False,
) -> None:
    """List defenses with their knobs, attacks with their suites, spaces, tasks or searches."""
    from search import courier

    listings: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "defenses": _defenses,
        "attacks": _attacks,
        "spaces": _spaces,
        "tasks": _tasks,
        "searches": lambda: [{"search": name} for name in courier.names(storage)],
    }
    _print(listings[choose("what to list", what, list(listings))](), as_json)


@app.command()
def doctor(storage: Storage = "runs", data_dir: DataDir = None, address: Address = None, as_json: Json = False) -> None:
    """Say what this machine, and the cluster at --address, can do, and what is missing, each with its remedy."""
    from search.doctor import examine

    findings = examine(storage, data_dir, address)
    _print([vars(finding) for finding in findings], as_json)
    if any(not finding.well for finding in findings):
        raise typer.Exit(1)


@data.command("fetch")
def data_fetch(
    names: Annotated[list[str], Argument(help="data sets")],
    data_dir: DataDir = None,
) -> None:
    """Download data sets, check them and decode them into the cache."""
    from search import session

    session.fetch(names, data_dir, console)


@data.command("check")
def data_check(
    names: Annotated[list[str] | None, Argument(help="data sets; else all")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Check the cached data sets against their checksums."""
    from search import session

    rows = session.check(names or [], data_dir)
    _print(rows, as_json)


@data.command("list")
def data_list(data_dir: DataDir = None, as_json: Json = False) -> None:
    """List the data sets and whether they are cached."""
    from search import session

    _print(session.check([], data_dir), as_json)


def _knobs(texts: list[str]) -> dict[str, Any]:
    """Return NAME=VALUE and NAME=V1,V2 as a study's knobs."""
    knobs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--knob must be NAME=VALUE or NAME=V1,V2, but is {text!r}")
        values = [_value(part) for part in value.split(",")]
        knobs[name] = values if len(values) > 1 else values[0]
    return knobs


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _study(name: str, storage: str) -> Study:
    from search import courier

    return courier.opened(name, storage)


def _defenses() -> list[dict[str, Any]]:
    rows = []
    for name in defenses.names():
        space = SearchSpace.of(defenses.find(name))
        for when, domains in (("train", space.train), ("inference", space.inference)):
            rows += [
                {
                    "defense": name,
                    "knob": knob,
                    "when": when,
                    "default": space.defaults[knob],
                    "domain": spoken(domain),
                    "matters where": conditions(space.given.get(knob, {})),
                }
                for knob, domain in domains.items()
            ]
    return rows


def _attacks() -> list[dict[str, Any]]:
    from attacks.suite import SUITES

    return [
        {
            "suite": suite.name,
            "knowledge": knowledge,
            "attack": attack.name,
            "parameters": attack.spoken(),
            "norm": "least L2" if attack.unbounded else ", ".join(attack.norms),
            "eps": "the task's" if suite.eps is None else f"{suite.eps:g}",
            "for": attack.aims or "any",
            "source": attack.source,
        }
        for suite in SUITES.values()
        for knowledge, group in (("oblivious, black-box", suite.oblivious), ("white-box", suite.white_box))
        for attack in group
    ]


def _spaces() -> list[dict[str, Any]]:
    rows = []
    for defense in defenses.names():
        for space in spaces.names(defense):
            whole = SearchSpace.of(defenses.find(defense)).narrow(spaces.named(defense, space))
            knobs = "; ".join(
                f"{name}: {spoken(domain)}"
                + (f" (where {conditions(whole.given[name])})" if name in whole.given else "")
                for name, domain in whole.searched().items()
            )
            trainings, size = whole.trainings(), whole.size()
            rows.append(
                {
                    "defense": defense,
                    "space": space,
                    "trainings": trainings or "continuous",
                    "candidates": size or "continuous",
                    "searched": knobs,
                }
            )
    return rows


def _tasks() -> list[dict[str, Any]]:
    from search.tasks import TASKS, task

    return [{"task": name, **vars(task(name).shape), "eps": task(name).eps} for name in TASKS]


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table(*(rows[0] if rows else ("nothing",)), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)


def _exit(code: int) -> None:
    raise typer.Exit(code)


def main() -> int:
    """Run the command line: 0 well, 2 bad input in one line, 1 the work failed, 130 interrupted."""
    try:
        result = app(standalone_mode=False)
    except typer.TyperException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        return 2
    except InputError as error:
        # What a worker raised comes from Ray with its traceback in its text.
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)
        return 2
    except OSError as error:
        from search.place import trouble

        if (reason := trouble(error)) is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return int(result or 0)


if __name__ == "__main__":
    sys.exit(main())
