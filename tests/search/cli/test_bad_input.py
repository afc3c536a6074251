"""Whatever is given to any flag of any command, or to any field of a study: one line and exit code 2, or a right run.

Flags and fields are those that there are, so that a new one is tried too. By hand, thousands:
CRUCIBLE_INPUTS=40 CRUCIBLE_SEED=1 python -m pytest tests/search/cli/test_bad_input.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any, get_args

import pytest

from launch import main
from search.classifiers import adding
from search.data import adding as data
from search.data import splits
from search.data.downloads import Unavailable
from search.engine import run
from search.storage import outage
from search.study.fields import Fields
from tests.conftest import digits_study
from tests.search.cli.test_cli import LEAVES
from tests.search.export.conftest import exported, unaudited
from tests.support import own
from tests.support.bad_input import documents, tried, words
from tests.support.engine import Pretence

SMALL = ["--task", "digits/A", "--wandb", "disabled"]
USUAL: dict[str, Sequence[str]] = {
    "search": SMALL,
    "resume": ["first"],
    "report": ["first"],
    "dashboard": ["first"],
    "wandb-view": ["first"],
    "export": ["first", "--top", "1"],
    "attack": ["export", "--suite", "quick"],
    "audit": ["net.py:net", "--data", "leaves", "--norm", "Linf", "--eps", "8/255"],
    "final": ["export", "--debug"],
    "reproduce": ["puvae/3", "--fraction", "0.05"],
    "list": ["tasks"],
    "completion": ["bash"],
    "data fetch": ["digits"],
    "data check": ["digits"],
    "data list": ["digits"],
    "data add": ["new", "pictures"],
    "data remove": ["unused"],
    "classifier add": ["new", "net.py:net", "--weights", "net.pt", "--data", "leaves"],
    "classifier remove": ["leaves/mine"],
}
"""Words with which a command runs; the value under trial is added, or stands in place of one of them."""
STARTS = (
    "search.engine.run.run",
    "search.session.forecast",
    "search.export.exporter.export",
    "search.report.dashboard._Server.serve_forever",
    "search.export.attack.AttackProgress",
    "search.auditing.examination.Examination.evidence",
    "search.final.final_run.job_runner",
    "search.reproduce.reproduction.TableProgress.expect",
)
"""Where work begins that takes long: there a run is interrupted, as by Ctrl-C."""
PATIENCE_S = 20
"""CPU seconds after which a command is interrupted."""
CODES = {"doctor": (0, 1)}
RIGHT = (0, 130)
NAMED = [(" ".join(path), leaf) for path, leaf in LEAVES]
FLAGS = [(command, flag) for command, leaf in NAMED for flag in leaf.params if flag.name != "help"]


def begins(*_: object, **__: object) -> Any:
    raise KeyboardInterrupt


def no_network(*_: object, **__: object) -> None:
    raise Unavailable("no network")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a search, an export, data, classifiers and files that are none of them."""
    base = tmp_path_factory.mktemp("bad")
    folder = base / "up" / "work"
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HOME": "home", "CRUCIBLE_DATA": "data", "CRUCIBLE_CACHE": "cache"}.items():
            patch.setenv(name, str(base / value))
            (base / value).mkdir()
        patch.setenv("WANDB_MODE", "disabled")
        patch.chdir(folder)
        furnish(folder)
        shutil.copytree(base, original := Path(f"{base}-original"), symlinks=True)
        for start in STARTS:
            patch.setattr(start, begins)
        patch.setattr("search.data.downloads._run", no_network)
        patch.setattr("search.data.downloads._download", no_network)
        yield folder
        shutil.rmtree(original)


def furnish(folder: Path) -> None:
    """Write what commands ask for."""
    splits.fetch("digits")
    own.data_with_classifier(folder)
    data.add("unused", [folder / "pictures"])
    adding.add("mine", "net.py:net", "leaves", weights=folder / "net.pt")
    search = digits_study(folder / "runs", name="first", defense="class_mean", space="default")
    search.root.mkdir()
    assert run.run(search, [], debug=True, work=Pretence(lambda params: 0.5).work()) == "finished"
    with pytest.MonkeyPatch.context() as patch:  # the audit is not what is tried
        unaudited(patch)
        shutil.move(exported(folder / "other", defense="class_mean", space="default"), folder / "export")
    shutil.rmtree(folder / "other")
    (folder / "file").write_text("not\nYAML: [")
    (folder / "broken.py").write_text("raise SystemExit(5)")
    (folder / "x.npz").write_bytes(b"PK")
    (folder / "loop").symlink_to("loop")


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file below a folder with its size and time, and every folder."""
    found = dict[str, tuple[int, int]]()
    for path, names, files in os.walk(folder):
        found |= {f"{path}/{name}": (0, 0) for name in names}
        for name in files:
            about = os.lstat(f"{path}/{name}")
            found[f"{path}/{name}"] = about.st_size, about.st_mtime_ns
    return found


def heard(arguments: Sequence[str]) -> tuple[int, str]:
    """Return the exit code of a command and what stands on standard error, which a terminal could show."""
    screens = [TextIOWrapper(BytesIO(), "utf-8", errors="backslashreplace") for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(screens[0]), redirect_stderr(screens[1]):
        patch.setattr(sys, "argv", ["launch.py", *arguments])
        code = main()
    screens[1].flush()
    return code, screens[1].buffer.getvalue().decode()


class Late(BaseException):
    """A command computed too long; no command handles this."""


def late(*_: object) -> None:
    raise Late


def check(folder: Path, command: str, arguments: Sequence[str]) -> None:
    """Try a command, and put the place in order."""
    base = folder.parents[1]
    before = contents(base)
    outage._SEEN.clear()  # the storage of the last try was removed, which a process waits for otherwise
    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE_S)
    try:
        code, told = heard(arguments)
    except Late:
        code, told = -1, f"no answer after {PATIENCE_S} s of computing"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        after = contents(base)
        if changed := sorted(name for name in {**before, **after} if before.get(name) != after.get(name)):
            shutil.rmtree(base)
            shutil.copytree(f"{base}-original", base, symlinks=True)
            os.chdir(folder)
    written = [name for name in changed if name.startswith(f"{base}/up/")]
    assert code in (2, *CODES.get(command, RIGHT)), (code, told)
    assert "Traceback" not in told and told.count("\n") <= 3 and len(told) < 3000, told
    assert code != 2 or (told.startswith("error: ") and written == []), (told, written)
    assert not told or told.isprintable() or "\n" in told, told


@pytest.mark.parametrize(("command", "flag"), FLAGS, ids=[f"{command} {flag.name}" for command, flag in FLAGS])
def test_any_value_of_a_flag_is_refused_in_one_line_or_taken(command: str, flag: Any, place: Path) -> None:
    usual = list(USUAL.get(command, ()))
    is_flag = bool(getattr(flag, "is_bool_flag", False))

    def once(value: str) -> None:
        if flag.param_type_name == "argument":
            nth = [each.name for each in dict(NAMED)[command].params if each.param_type_name == "argument"].index(
                flag.name
            )
            arguments = [*usual[:nth], value, *usual[nth + 1 :]]
        else:
            arguments = [*usual, flag.opts[0], *([] if is_flag else [value])]
        check(place, command, [*command.split(), *arguments])

    tried(f"{command} {flag.name}", words(), once)


LONG = "a" * 5000
FOUND = [
    ("search", "--cheap-images", LONG),
    ("search", "--name", "a\x1b[31m\nb"),
    ("status", "--storage", LONG),
    ("attack", "export", "--data-dir", "/dev/null"),
    ("data", "check", "digits", "--data-dir", "loop"),
    ("data", "remove", "unused", "--data-dir", LONG),
    ("final", "export", "--debug", "--seeds", "9" * 30),
    ("final", "export", "--debug", "--seeds", "999999999"),
]


@pytest.mark.parametrize("arguments", FOUND, ids=lambda words: " ".join(words)[:60].encode("unicode_escape").decode())
def test_what_once_was_no_line_or_no_end_is_refused_in_one(arguments: Sequence[str], place: Path) -> None:
    check(place, arguments[0], arguments)


@pytest.mark.parametrize("value", ["!!float x", "!!bool x", "!!int ''", "!!timestamp x", "[" * 3000, '"a\\nb"'])
def test_a_value_that_yaml_itself_cannot_read_is_refused_in_one_line(value: str, place: Path) -> None:
    study = place.parents[1] / "study.yaml"
    study.write_text(f"task: digits/A\nwandb: disabled\nname: {value}")
    assert heard(["search", "--config", str(study)])[0] == 2
    check(place, "search", ["search", "--config", str(study)])


@pytest.mark.parametrize(
    "value", ["", "\0", "a\0b", "\ud800", "\udcff", "~nosuchuser", "~nosuchuser/x", LONG, "loop", "/dev/null"]
)
def test_a_path_that_none_can_have_is_refused_in_every_field_of_text(value: str, place: Path) -> None:
    for field, about in Fields.model_fields.items():
        if str in (about.annotation, *get_args(about.annotation)) and field not in ("defense", "task", "address"):
            study = place.parents[1] / "study.yaml"
            usual = {"task": "digits/A", "wandb": "disabled"}
            study.write_text(
                "".join(f"{name}: {json.dumps(each)}\n" for name, each in (usual | {field: value}).items())
            )
            check(place, "search", ["search", "--config", str(study)])


@pytest.mark.parametrize("field", Fields.model_fields)
def test_any_value_of_a_field_is_refused_in_one_line_or_taken(field: str, place: Path) -> None:
    usual = {"task": "digits/A", "wandb": "disabled"}

    def once(value: str) -> None:
        lines = [f"{name}: {usually}" for name, usually in usual.items() if name != field]
        study = place.parents[1] / "study.yaml"
        study.write_bytes("\n".join([*lines, f"{field}: {value}"]).encode(errors="surrogatepass"))
        check(place, "search", ["search", "--config", str(study)])

    tried(field, documents(), once, 4)
