"""Output of commands on the terminal, shell completion, and exit codes."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table
from typer._completion_classes import completion_init  # Typer offers no other way to its shells
from typer.core import TyperArgument, TyperCommand, TyperGroup

from search.console import SAID
from spaces.domain import written
from spaces.exceptions import InputError

BASH = """\
# Completes `python launch.py` of this copy of Crucible alone, for it is run; other scripts are completed as before.
_crucible() {
    local at=0
    [[ ${COMP_WORDS[0]##*/} == python* ]] && at=1
    if ! [[ COMP_CWORD -gt at && ${COMP_WORDS[at]} -ef LAUNCH ]]; then
        [[ $1 == *python* && $_crucible_else ]] && "$_crucible_else" "$@"
        return
    fi
    local IFS=$'\\n'
    COMPREPLY=($(COMP_WORDS="${COMP_WORDS[*]:at}" COMP_CWORD=$((COMP_CWORD - at)) _CRUCIBLE_COMPLETE=complete_bash \\
        "${COMP_WORDS[@]:0:at+1}" 2>/dev/null))
    [[ $COMPREPLY == *= ]] && compopt -o nospace 2>/dev/null  # the value of a knob comes next
}
for _crucible_loads in _comp_load _completion_loader; do  # of the package bash-completion
    declare -F $_crucible_loads >/dev/null && { $_crucible_loads python >/dev/null 2>&1; break; }
done
[[ $(complete -p python 2>/dev/null) =~ \\ -F\\ ([^ ]+) && ${BASH_REMATCH[1]} != _crucible ]] &&
    _crucible_else=${BASH_REMATCH[1]}
complete -o bashdefault -o default -F _crucible python python3 launch.py
"""


class Screen(Console):
    """A console on the terminal, or on a pipe to a program such as `head`."""

    def on_broken_pipe(self) -> None:
        """Continue without output: the reader of the pipe has ended, but the search has not."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        """Leave out the spaces to which Rich pads each line of a table, where no terminal is wide enough for it."""
        text = super()._render_buffer(buffer)
        return text if self.is_terminal else re.sub(r" +$", "", text, flags=re.MULTILINE)


class _Plain:
    """Hides the type of arguments, which the name already tells, and of --help, which has no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for each in found:
            if isinstance(each, TyperArgument):
                each.display_type_rich = lambda ctx: None  # type: ignore[method-assign]
            elif each.name == "help":
                each.metavar = ""
        return found


class Command(_Plain, TyperCommand):
    """A command whose help hides redundant types."""


class Group(_Plain, TyperGroup):
    """A group of such commands."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:  # Typer itself would end the command without a word
            return _interrupted(stop)


def _interrupted(stop: KeyboardInterrupt) -> int:
    """Say that a command was interrupted, if nothing has said so, and return its exit code."""
    if SAID not in getattr(stop, "__notes__", ()):
        print("interrupted", file=sys.stderr)
    return 130


LONGEST = 2000
"""Characters of an error message that are printed; of a longer one, its beginning and its end."""
NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EISDIR)
"""Errors of the system that are of the path that was given, not of its disk."""
PLAIN: dict[str, Any] = {"markup": False, "emoji": False}  # error texts are printed as they are, also "[/x]"
console = Screen(width=None if sys.stdout and sys.stdout.isatty() else 1000, **PLAIN)  # piped lines are not truncated


def command(
    app: typer.Typer, panel: str, *examples: str, name: str | None = None, columns: Mapping[str, str] | None = None
) -> Callable[..., Any]:
    """Register a command under a heading of the help, with examples below its flags, and what its columns mean."""
    shown = "\n".join(["Examples:", *(f"  python launch.py {example}" for example in examples)])
    if columns:
        shown += "\n\n" + "\n".join(
            [
                "Columns of candidates.csv (and their headings in the leaderboard):",
                *(f"  {name}: {meaning}" for name, meaning in columns.items()),
            ]
        )
    return app.command(name, cls=Command, rich_help_panel=panel, epilog=escape(shown))


def end(code: int) -> None:
    """End a command with an exit code."""
    raise typer.Exit(code)


@contextmanager
def progress(as_json: bool) -> Iterator[Console]:
    """Yield the console for notes and progress: standard error if standard output must contain only JSON."""
    if not as_json:
        yield console
        return
    with redirect_stdout(sys.stderr):
        yield Console(stderr=True, **PLAIN)


def show(found: Any, as_json: bool, page: Callable[[Any], Any] | None = None) -> None:
    """Print the result of a command: as JSON, or the result of `page`, or a table of rows."""
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    elif isinstance(shown := page(found) if page else _table(found), str):
        typer.echo(shown, nl=not shown.endswith("\n"))
    else:
        console.print(shown)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = [name for name in rows[0] if any(row[name] != "" for row in rows)] if rows else ["nothing"]
    shown = [names, *([written(row[name]) for name in names] for row in rows)]
    made = Table(*shown[0], box=None, pad_edge=False)
    whole = [max(map(len, cells)) for cells in zip(*shown, strict=True)]
    words = [max(len(word) for cell in cells for word in cell.split(" ")) for cells in zip(*shown, strict=True)]
    prose = [any(" " in cell for cell in cells) for cells in zip(*shown[1:], strict=True)] or [False]
    least, room = list(words), console.width - 2 * len(words)
    for breaks in (prose, [True] * len(words)):  # break prose before names, because people copy names
        while sum(least) > room and any(may := [w > 8 and b for w, b in zip(least, breaks, strict=True)]):
            least[max((w, i) for i, w in enumerate(least) if may[i])[1]] -= 1
    share = min(1.0, max(0, room - sum(least)) / max(1, sum(whole) - sum(least)))
    for column, full, word in zip(made.columns, whole, least, strict=True):
        column.overflow = "fold"  # a truncated path is useless
        column.width = word + int(share * (full - word))  # broken words are hard to read
    for row in shown[1:]:
        made.add_row(*row)
    return made


def _told(error: typer.TyperException) -> str:
    """Return one line about a usage error, with the invalid value or the missing parameter."""
    if near := getattr(error, "possibilities", None):  # flags with a similar name, the most similar first
        return f"{error.message}; did you mean {near[0]!r}?"
    told = error.format_message()
    if isinstance(error.__cause__, ValidationError):
        return f"{told.replace('Input should', 'must')}, but is {error.__cause__.errors()[0]['input']!r}"
    if not error.message and (missing := getattr(error, "param", None)):
        return f"{told.rstrip('.')}: {missing.help}"
    return told


def warn(text: str) -> None:
    """Print one line on standard error that a person can read, whatever was given."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    print("".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text), file=sys.stderr)


def _failed(reason: str, code: int = 2) -> int:
    """Print why a command failed, and return the exit code."""
    warn(f"error: {reason}")
    return code


def use_utf8() -> None:
    """Start the command anew where the locale is another one: names of files, too, are UTF-8 whatever it is."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"  # also for the processes that it starts
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(app: typer.Typer) -> int:
    """Run the command line and return its exit code: 0 for success, 1 if the work failed, 2 for invalid input (one
    line on standard error), 130 if interrupted."""
    completion_init()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal has a dash or an infinity sign
    try:
        result = app(standalone_mode=False, prog_name="python launch.py", complete_var="_CRUCIBLE_COMPLETE")
    except typer.TyperException as error:
        if not (reason := _told(error)):
            return 0  # no command was given, so the help was shown
        return _failed(reason)
    except InputError as error:
        # An error of a worker comes from Ray with the traceback in its text.
        return _failed(str(getattr(error, "cause", error)))
    except OSError as error:
        from search.storage.outage import trouble

        if error.errno in NO_PATH:
            return _failed(f"a path must be one that a file can have, but {error.filename}: {error.strerror}")
        denied = f"{error.filename}: {error.strerror}" if isinstance(error, PermissionError) else None
        if (failure := trouble(error) or denied) is None:
            raise
        return _failed(failure, code=1)
    except KeyboardInterrupt as stop:
        return _interrupted(stop)
    return int(result or 0)
