"""The terminal: what is printed where, what a shell completes, and the exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer._completion_classes import completion_init  # Typer offers no other way to its shells
from typer.core import TyperArgument, TyperCommand, TyperGroup

from spaces.space import InputError

BASH = """\
# Completes `python launch.py`; files for every other use of Python.
_crucible() {
    local at=0 IFS=$'\\n'
    [[ ${COMP_WORDS[0]##*/} == python* ]] && at=1
    [[ ${COMP_WORDS[at]##*/} == launch.py && COMP_CWORD -gt at ]] || return
    COMPREPLY=($(COMP_WORDS="${COMP_WORDS[*]:at}" COMP_CWORD=$((COMP_CWORD - at)) _CRUCIBLE_COMPLETE=complete_bash \\
        "${COMP_WORDS[@]:0:at+1}" 2>/dev/null))
}
complete -o bashdefault -o default -F _crucible python python3 .venv/bin/python launch.py ./launch.py
"""


class Screen(Console):
    """The terminal, or what the output is piped to, such as `head`."""

    def on_broken_pipe(self) -> None:
        """Go on in silence: whoever listened has heard enough, but a search has not ended."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Plain:
    """Shows no type beside an argument, whose name says it, and none beside --help, which takes no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for each in found:
            if isinstance(each, TyperArgument):
                each.display_type_rich = lambda ctx: None  # type: ignore[method-assign]
            elif each.name == "help":
                each.metavar = ""
        return found


class Command(_Plain, TyperCommand):
    """A command of ours."""


class Group(_Plain, TyperGroup):
    """A group of them."""


console = Screen(width=None if sys.stdout.isatty() else 1000)  # what is piped is never cut


def command(app: typer.Typer, panel: str, *examples: str, name: str | None = None) -> Callable[..., Any]:
    """Register a command under a heading of the help, with examples below its flags."""
    shown = "\n".join(["Examples:", *(f"  python launch.py {example}" for example in examples)])
    return app.command(name, cls=Command, rich_help_panel=panel, epilog=escape(shown))


def end(code: int) -> None:
    """End a command with an exit code."""
    raise typer.Exit(code)


@contextmanager
def progress(as_json: bool) -> Iterator[Console]:
    """Yield where notes and progress go: standard error where standard output must hold JSON alone."""
    if not as_json:
        yield console
        return
    with redirect_stdout(sys.stderr):
        yield Console(stderr=True)


def show(found: Any, as_json: bool, page: Callable[[Any], Any] | None = None) -> None:
    """Print what a command found: as JSON, else as what `page` makes of it, else as a table of rows."""
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    elif isinstance(shown := page(found) if page else _table(found), str):
        typer.echo(shown, nl=not shown.endswith("\n"))
    else:
        console.print(shown)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    made = Table(*(rows[0] if rows else ("nothing",)), box=None, pad_edge=False)
    for row in rows:
        made.add_row(*(escape(str(value)) for value in row.values()))
    return made


def run(app: typer.Typer) -> int:
    """Run the command line and return its exit code: 0 well, 2 bad input in one line, 1 the work failed, 130
    interrupted."""
    completion_init()
    try:
        result = app(standalone_mode=False, prog_name="python launch.py", complete_var="_CRUCIBLE_COMPLETE")
    except typer.TyperException as error:
        near = getattr(error, "possibilities", None)  # of a flag, the nearest first
        hint = f"{error.message}; did you mean {near[0]!r}?" if near else error.format_message()
        if not hint:
            return 0  # no command was given, so the help was shown
        print(f"error: {hint}", file=sys.stderr)
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
