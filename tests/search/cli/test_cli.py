"""The command line as a user meets it: one line and exit code 2 for bad input, before anything is trained."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from ray.exceptions import RayTaskError
from rich.console import Console

import launch as command_line
from launch import main
from search.cli.flags import LISTED, PANELS
from search.console import SAID, working
from search.study.columns import COLUMNS, EXPLAINED
from search.study.fields import Fields
from search.study.loading import read_study
from spaces.exceptions import InputError
from spaces.space import Params
from tests.support.engine import scored
from tests.support.paths import ROOT

SMOKE = ("--task", "digits/A", "--space", "smoke", "--wandb", "disabled")


def launch(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def cpu_seconds(*words: str) -> float:
    """Return what Python takes for a script and its arguments, the least of three; its measure is another script."""
    spent = []
    for _ in range(3):
        before = sum(os.times()[2:4])
        subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=True)
        spent.append(sum(os.times()[2:4]) - before)
    return min(spent)


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def said(*words: str) -> Said:
    """Run a command in this process."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["launch.py", *words])
        with redirect_stderr(io.StringIO()) as err:
            code = main()
    return Said(code, out.getvalue(), err.getvalue())


def leaves(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command of the real command line with the words that lead to it."""
    for name, sub in getattr(command, "commands", {}).items():
        yield from leaves(sub, *path, name)
    if not hasattr(command, "commands"):
        yield path, command


def parsed(*words: str) -> dict[str, Any]:
    """Return what the real command line makes of words, without doing it."""
    found: dict[str, Any] = {}
    whole: Any = typer.main.get_command(command_line.app)
    for _, leaf in leaves(whole):
        leaf.callback = lambda **given: found.update(given)
    whole.main(list(words), standalone_mode=False)
    return found


LEAVES = list(leaves(typer.main.get_command(command_line.app)))

BAD: list[tuple[Sequence[str], str]] = [
    (["search", "--defense", "puvea"], ", puvae, but is 'puvea'; did you mean 'puvae'?"),
    (["search", "--task", "minst/A"], "did you mean 'mnist'?"),
    (["search", "--task", "MNIST/A"], "did you mean 'mnist'?"),
    (["search", "--defense", "Defense-GAN"], "did you mean 'defense_gan'?"),
    (["search", "--knob", "maps=8"], "did you mean 'conv_maps'?"),
    (["search", "--defense", "banana"], ", but is 'banana'\n"),
    (["data", "remove", "mnits"], "a data set that is removed must be one that was added (none is), but is 'mnits'"),
    (["search", "--task", "mnist/Q"], "must be one of A, B, C, D, defensegan-A, "),
    (["search", "--space", "papers"], "the space of puvae must be one of paper, wide, default, smoke"),
    (
        ["search", "--method", "annealing"],
        "method must be one of forecast, tpe, nsga2, gp, random, qmc, grid, but is 'ann",
    ),
    (["search", "--suite", "quik"], "did you mean 'quick'?"),
    (["search", "--threat", "blackbox"], "threat must be one of oblivious, black-box, white-box, but is 'blackbox'"),
    (["search", "--knob", "lamda_rc=1"], "did you mean 'lambda_rc'?"),
    (["search", "--knob", "lambda_rc"], "--knob must be NAME=VALUE"),
    (["search", "--knob", "conv_maps=0"], "conv_maps must be a whole number from 1 to 256, but is 0"),
    (["search", "--knob", "sigma_eps=0,-1"], "sigma_eps must be a number from 0 to 1000, but is -1.0"),
    (["search", "--method", "grid"], "a grid needs finite domains, but lambda_rc is a number from 0.1 to 10"),
    (["search", "--eps", "-0.1"], "eps must be greater than or equal to 0, but is -0.1"),
    (["search", "--eps", "1.5"], "eps must be from 0 to 1 in Linf, in pixel units of [0, 1], but is 1.5"),
    (["search", "--eps", "8"], "in pixel units of [0, 1], but is 8.0; did you mean 8/255?"),
    (["data", "add", "x", "/tmp", "--eps", "8"], "in pixel units of [0, 1], but is '8'; did you mean 8/255?"),
    (["search", "--task", "digits"], "a task must be a data set and a classifier on it, one of digits/A, "),
    (["search", "--norm", "l2"], "eps must be given in L2"),
    (["search", "--norm", "L1"], "norm must be one of Linf, L2, but is 'L1'"),
    (["search", "--norm", "L2"], "eps must be given in L2"),
    (["search", "--threat", "black-box", "--eval-images", "5501"], "eval_images must be at most 5500 on mnist"),
    (["search", "--substitute", "Z"], "must be one of A, B, C, D, "),
    (["attack", "/tmp/there-is-none"], "an export must be a folder with whole files, but /tmp/there-is-none"),
    (["search", "--protect", "cifar10/A"], "protect must be a task on mnist, as mnist/A is, but is cifar10/A"),
    (["search", "--max-clean-rejection", "2"], "max_clean_rejection must be less than or equal to 1, but is '2'"),
    (["search", "--defense", "hgd", "--task", "digits/A", "--knob", "levels=5"], "a U-Net of 5 levels needs images of"),
    (["search", "--trials", "0"], "trials must be greater than or equal to 1, but is '0'"),
    (["search", "--train-images", "60000"], "train_images must be at most 54000 on mnist, but is 60000"),
    (["search", "--eval-images", "6001"], "eval_images must be at most 5500 on mnist, as 500 of the validation"),
    (["search", "--seed", "4294967296"], "seed must be less than 4294967296"),
    (["attack", "/tmp", "--seed", "9" * 20], "must be less than or equal to 4294967295, but is '99"),
    (
        ["audit", *"net.py:build --data digits --norm Linf --eps 0.1 --seed -1".split()],
        "'--seed': must be greater than or equal to 0, but",
    ),
    (["search", "--trials", "many"], "trials must be a valid integer"),
    (["search", "--min-clean-accuracy", "90"], "min_clean_accuracy must be less than or equal to 1"),
    (["search", "--name", "../up"], "name must be letters, digits, '.', '_' and '-', and no path, but is '../up'"),
    (["search", "--name", ".hidden"], "and no path, but is '.hidden'"),
    (
        ["search", "--storage", "gs://bucket/runs"],
        "a folder or a URI of an installed file system: pip install --constraint requirements.lock gcsfs",
    ),
    (["search", "--config", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    (["search", "--gpu", "1"], "No such option: --gpu"),
    (["search", "--trails", "1"], "No such option: --trails; did you mean '--trials'?"),
    (["serch"], "No such command 'serch'. Did you mean 'search'?"),
    (["data", "fecth"], "No such command 'fecth'. Did you mean 'fetch'?"),
    (["export"], "Missing argument 'NAME': a search"),
    (["list"], "Missing argument 'KIND': defenses, attacks, "),
    (["search", "--json"], "--json must stand beside --dry-run"),
    (["search", "--threat", "white_box"], "but is 'white_box'; did you mean 'white-box'?"),
    (["search", "--dry-run", "--warm-start", "nope", *SMOKE], "but is 'nope'"),
    (["export", "first"], "an export needs one of --pareto, --top and --candidate"),
    (["export", "first", "--top", "0"], "for '--top': must be greater than or equal to 1, but is '0'"),
    (["dashboard", "first", "--port", "x"], "unable to parse string as an integer, but is 'x'"),
    (["final", "/tmp/there-is-none"], "an export must be a folder with whole files, but /tmp/there-is-none"),
    (["reproduce", "puvea/3"], "did you mean 'puvae/3'?"),
    (["completion", "zhs"], "the shell must be one of bash, but is 'zhs'"),
    (
        ["status", "nothing", "--storage", "/tmp/there-is-none"],
        "a search must exist, but there is none in /tmp/there-is-none: name its --storage, or begin one",
    ),
    (["status", "--storage", ""], "storage must be a folder or a URI, but is ''"),
    (["search", "--storage", ""], "storage must be a folder or a URI, but is ''"),
    (["list", "defences"], "did you mean 'defenses'?"),
    (["data", "fetch", "mnits"], "did you mean 'mnist'?"),
    (["search", "--address", "127.0.0.1:1", *SMOKE], "address must be a running Ray cluster, but 127.0.0.1:1"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if arguments[0] == "search" and "--storage" not in arguments:
        arguments = [*arguments, "--storage", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
    assert main() == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and said.startswith("error: ")
    assert not list((tmp_path / "runs").glob("[!.]*"))


def test_bad_input_that_a_worker_found_gets_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begin(*_: object, **__: object) -> int:
        raise RayTaskError("at_work", "Traceback\n  of its worker\n", InputError("no space")).as_instanceof_cause()

    monkeypatch.setattr("search.session.begin", begin)
    monkeypatch.setattr(sys, "argv", ["launch.py", "search"])
    assert main() == 2 and capsys.readouterr().err == "error: no space\n"


def test_the_process_exits_with_the_code() -> None:
    result = launch("search", "--trials", "0")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: trials must be greater than or equal to 1, but is '0'\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trials: [1\n", "study.yaml, line 2: a study must be YAML"),
        ("defense: puvae\ntrails: 3\n", "study.yaml, line 2: a field of a study must be one of"),
        ("defense: puvae\n\ntrials: -3\n", "study.yaml, line 3: trials must be greater than or equal to 1, but is -3"),
        ("- a\n- b\n", "a study must be fields with values, but is list"),
        ("1: 2\n", "study.yaml, line 1: a field of a study must be one of"),
        ("seed: 1\ntrials: 3\nseed: 2\n", "study.yaml, line 3: a field must stand once, but seed came before"),
        ("name: \x07\n", "a study must be YAML"),
        ("defense: puvea\n", "study.yaml: the defense must be one of "),
        ("knobs: {conv_maps: nine}\n", "conv_maps must be a whole number from 1 to 256, but is 'nine'"),
    ],
)
def test_a_broken_study_file_is_named_with_its_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_study(tmp_path / "study.yaml")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_study_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="it is not UTF-8"):
        read_study(tmp_path / "study.yaml")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("trials: 3\nseed: 7\n")
    shown = said("search", "--config", str(tmp_path / "study.yaml"), "--trials", "5", "--print-config").out
    assert "trials: 5\n" in shown and "seed: 7\n" in shown


def test_knobs_of_flags_and_file_add_up_and_an_eps_may_be_a_fraction(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("knobs: {latent: 4, dense: 64}\n")
    flags = ["--knob", "dense=32", "--knob", "conv_maps=4,8", "--eps", "8/255"]
    study = said("search", "--config", str(tmp_path / "study.yaml"), *flags, "--print-config").out
    assert "  latent: 4\n  dense: 32\n  conv_maps:\n  - 4\n  - 8\n" in study and "eps: 0.03137" in study


def test_a_printed_config_is_a_config(tmp_path: Path) -> None:
    first = said("search", "--knob", "conv_maps=4,8", "--knob", "label_injection=planes", "--print-config").out
    (tmp_path / "study.yaml").write_text(first)
    assert said("search", "--config", str(tmp_path / "study.yaml"), "--print-config").out == first


def test_a_name_that_exists_says_resume(tmp_path: Path) -> None:
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "study.yaml").touch()
    heard = said("search", "--name", "smoke", "--storage", str(tmp_path), *SMOKE)
    assert heard.code == 2 and "go on with `python launch.py resume smoke --storage" in heard.err


def test_a_search_whose_folder_was_renamed_is_not_taken_for_another(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "study.yaml").write_text("name: night\n")
    heard = said("status", "moved", "--storage", str(tmp_path))
    assert (heard.code, heard.out) == (2, "")
    assert heard.err.endswith(f"must lie in a folder of its name, but {tmp_path}/moved/study.yaml is of 'night'\n")


def test_a_storage_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    heard = said("search", "--storage", str(tmp_path / "file" / "runs"), *SMOKE)
    assert heard.code == 2 and "a storage must be a folder that can be written" in heard.err


def test_a_data_folder_with_a_wrong_file_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "data" / "raw" / "mnist"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"not MNIST")
    heard = said("search", "--storage", str(tmp_path / "runs"), "--data-dir", str(tmp_path / "data"))
    assert heard.code == 2 and "train-images-idx3-ubyte" in heard.err and heard.err.count("\n") == 1
    assert not list((tmp_path / "runs").glob("[!.]*"))


@pytest.mark.slow
def test_more_than_the_cluster_has_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    result = launch("search", "--storage", str(tmp_path / "runs"), "--gpus-per-trial", "99", *SMOKE)
    assert result.returncode == 2 and "gpus_per_trial must be at most what the cluster has" in result.stderr
    assert not list((tmp_path / "runs").glob("[!.]*"))


@pytest.mark.parametrize("what", LISTED)
def test_lists_are_tables_for_people_and_json_for_scripts(what: str) -> None:
    assert isinstance(found := json.loads(said("list", what, "--json").out), list)
    shown = said("list", what)
    assert shown.code == 0 and all(str(next(iter(row.values()))) in shown.out for row in found)


def test_the_doctor_names_each_piece() -> None:
    found = {row["what"]: row for row in json.loads(said("doctor", "--json").out)}
    assert {"python", "torch", "ray", "device", "shared memory", "storage", "mnist", "W&B"} <= set(found)
    assert found["ray"]["found"] == "2.60.0"
    shown = said("doctor", "--data-dir", "/tmp/no-data-here").out
    assert "python launch.py data fetch mnist" in shown and re.search(r"^mnist +- +absent", shown, re.MULTILINE)


@pytest.mark.parametrize("words", ["data list", "data check digits", "data fetch digits", "status", "search --dry-run"])
def test_json_alone_stands_on_standard_output(words: str, tmp_path: Path) -> None:
    dry = ["--storage", str(tmp_path), *SMOKE] if words.startswith("search") else []
    heard = said(*words.split(), *dry, "--json")
    assert heard.code == 0 and json.loads(heard.out) is not None


WORK = [
    (
        "attack /tmp --suite full --threat oblivious --norm L2 --eps 1 --images 9 --seed 2",
        "search.export.attack",
        "attack",
    ),
    ("final /tmp /tmp --seeds 2 --images 9 --concurrent 3 --address auto --debug", "search.final.final_run", "final"),
    ("reproduce puvae/3 --fraction 0.05 --seed 3 --out /tmp", "search.reproduce.reproduction", "reproduce"),
    ("doctor --address auto", "search.cli.doctor", "examine"),
]


@pytest.mark.parametrize(("words", "module", "name"), WORK, ids=[words for words, _, _ in WORK])
def test_with_json_whatever_work_prints_goes_to_standard_error(
    words: str, module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = inspect.signature(getattr(importlib.import_module(module), name))

    def chatty(*given: object, **named: object) -> list[Any]:
        real.bind(*given, **named)
        print("a library prints this")
        return []

    monkeypatch.setattr(f"{module}.{name}", chatty)
    monkeypatch.setattr("search.cli.listings.exports", lambda paths: paths[:1])
    heard = said(*words.split(), "--json")
    assert heard == Said(0, "[]\n", "a library prints this\n")


@pytest.mark.parametrize(
    ("words", "module", "name"),
    [
        ("dashboard night --port 8081", "search.report.dashboard", "serve"),
        ("wandb-view night", "search.tracking.wandb_workspace", "view"),
    ],
)
def test_the_commands_that_show_a_search_open_it_first(
    words: str, module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = inspect.signature(getattr(importlib.import_module(module), name))

    def shows(*given: object, **named: object) -> int:
        assert real.bind(*given, **named).arguments["study"] == ("night", "runs")
        return 0

    monkeypatch.setattr("search.study.catalog.open_search", lambda name, storage: (name, storage))
    monkeypatch.setattr(f"{module}.{name}", shows)
    assert said(*words.split()).code == 0


@pytest.mark.parametrize(
    ("raised", "code"),
    [(None, 0), (InputError("no"), 2), (OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130)],
)
def test_the_exit_code_says_how_it_went(
    raised: BaseException | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def does(*_: object) -> list[Any]:
        if raised is not None:
            raise raised
        return []

    monkeypatch.setattr("search.cli.listings.rows", does)
    heard = said("list", "tasks")
    assert heard.code == code and heard.err.count("\n") <= 1 and "Traceback" not in heard.err


@pytest.mark.parametrize("words", [(), ("data",)])
def test_no_command_shows_the_help(words: tuple[str, ...]) -> None:
    heard = said(*words)
    assert (heard.code, heard.err) == (0, "") and heard.out.strip() == said(*words, "--help").out.strip()


def test_help_needs_no_heavy_library_and_little_time() -> None:
    heavy = {"torch", "ray", "wandb", "pandas", "plotly", "torchattacks", "scipy"}
    code = "import sys, launch; sys.argv = ['launch.py', 'search', '--help']; launch.main(); "
    code += f"print({heavy} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.endswith("set()\n")
    assert cpu_seconds("launch.py", "--help") < cpu_seconds("-c", "import torch")


def test_help_groups_the_commands_in_the_order_of_work() -> None:
    shown = launch("--help", COLUMNS="100").stdout
    headings = re.findall(r"─ ([\w. ]+) ─", shown)
    assert headings == ["Options", "1. Search", "2. Review", "3. Export", "4. Final runs", "Look up"]
    assert re.findall(r"^│ ([a-z][a-z-]+) ", shown, re.MULTILINE) == [
        *("search", "resume", "status", "report", "dashboard", "wandb-view"),
        *("export", "attack", "audit", "final", "reproduce"),
        *("list", "doctor", "completion", "data", "classifier"),
    ]


@pytest.mark.parametrize(
    ("path", "leaf"), LEAVES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_the_help_of_a_command_teaches(path: tuple[str, ...], leaf: Any) -> None:
    first = leaf.help.split("\n\n")[0]
    assert first.endswith(".") and "\n" not in first and len(first) < 80
    examples = re.findall(r"python launch\.py (.*)", leaf.epilog)
    assert examples and any(example.startswith(" ".join(path)) for example in examples)
    for example in examples:
        assert parsed(*shlex.split(example)) is not None and len(example) <= 80
    for flag in leaf.params:
        assert flag.help and flag.metavar is not None, flag.name
    assert not re.search(r"<(str|bool|int|float|path|list)|TEXT", said(*path, "--help").out)


def test_the_help_of_search_shows_each_field_under_a_heading_with_type_default_and_choices() -> None:
    named = [name for names in PANELS.values() for name in names]
    assert sorted(named) == sorted(Fields.model_fields)
    shown = said("search", "--help").out
    assert "NAME=LOW..HIGH" in shown and "TEXT" not in shown and "<str>" not in shown
    lines = [line for line in shown.splitlines() if line.startswith("│ --")]
    nouns = dict(re.findall(r"--([a-z-]+) +([A-Z=:]+)  ", line)[0] for line in lines if re.search(r" [A-Z=:]+  ", line))
    typed = {"trials": "INTEGER", "eps": "FLOAT", "wandb": "NAME", "storage": "PATH", "address": "HOST:PORT"}
    assert typed.items() <= nouns.items() and nouns["knob"] == "NAME=VALUE"
    flat = " ".join(re.sub(r"[│\s]+", " ", shown).split())
    assert "by our own model, or by Optuna: forecast, tpe, nsga2, gp, random, qmc, grid [default: forecast]" in flat


@pytest.mark.parametrize("command", ["search", "status", "report"])
def test_the_help_says_what_each_column_means(command: str) -> None:
    shown = " ".join(said(command, "--help").out.split())
    assert scored(Params({}, {}), 0.5).row().keys() == COLUMNS.keys()
    assert all(f"{name}: {meaning}" in shown for name, meaning in EXPLAINED.items())


def test_a_shell_completes_commands_flags_choices_and_names(tmp_path: Path) -> None:
    (tmp_path / "runs" / "night").mkdir(parents=True)
    (tmp_path / "runs" / "night" / "study.yaml").touch()
    tries = ["st", "search --meth", "search --method n", "search --defense gmvae --space paper_", "status ni", "data f"]
    tries += ["attack x --threat ob", "list ta", "search --knob lambda_r", "search --warm-start n", "data fetch cel"]
    tries += ["export night --candidate ab", "reproduce gmvae/"]
    (tmp_path / "runs" / "night" / "candidates.csv").write_text("candidate,fit\nabc-1,abc\nabc-2,abc\nd-1,d\n")
    (tmp_path / "launch.py").touch()  # somebody else's: it may do anything when it is run
    lines = ["_theirs() { COMPREPLY=(theirs); }; complete -F _theirs python"]
    lines += 2 * [f"source <({sys.executable} {ROOT / 'launch.py'} completion)"]
    for tried in tries:
        lines.append(f"COMP_WORDS=({sys.executable} {ROOT / 'launch.py'} {tried})")
        lines.append('COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _crucible; echo "${COMPREPLY[*]}"')
    for other in ("python other.py s", "python launch.py s", "launch.py s"):
        lines.append(f"COMPREPLY=(); COMP_WORDS=({other}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))")
        lines.append('_crucible "${COMP_WORDS[0]}"; echo "not ours: ${COMPREPLY[*]}"')
    lines.append("complete -p python")
    shown = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert shown.stdout.splitlines() == [
        *(
            "status",
            "--method",
            "nsga2",
            "paper_svhn paper_semi paper_variable",
            "night",
            "fetch",
            "oblivious",
            "tasks tables",
            "lambda_rc=",
            "night",
            "celeba",
            "abc-1 abc-2",
            "gmvae/1 gmvae/2 gmvae/fig3 gmvae/fig5 gmvae/rejected gmvae/eq10 gmvae/recovered gmvae/fooling gmvae/fid "
            "gmvae/pictures",
            "not ours: theirs",
            "not ours: theirs",
            "not ours: ",
        ),
        "complete -o bashdefault -o default -F _crucible python",
    ], shown.stderr


def on_a_terminal(*words: str, **environment: str) -> str:
    """Return what a command prints to a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "launch.py"), *words]
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm-256color"} | environment
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=theirs, stderr=theirs):
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:
            pass  # it ended
    os.close(ours)
    return shown.decode()


def test_colours_are_for_terminals_that_want_them() -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]")
    assert colour.search(on_a_terminal("--help"))
    assert not colour.search(on_a_terminal("--help", NO_COLOR="1"))
    assert "\x1b" not in launch("--help").stdout


@pytest.mark.parametrize("columns", [70, 100])
def test_a_table_fits_the_terminal_and_breaks_no_name(columns: int) -> None:
    shown = re.sub(r"\x1b\[[0-9;]*m", "", on_a_terminal("list", "defenses", COLUMNS=str(columns)))
    assert max(map(len, shown.splitlines())) <= columns
    assert columns < 100 or {"attack_statistics", "adversarial_training"} <= set(shown.split())


def test_a_terminal_that_lacks_a_character_is_no_error() -> None:
    code = (
        "import typer; from search.cli.terminal import console, run; app = typer.Typer();"
        "app.command()(lambda: console.print('18\\u00a0s')); run(app)"
    )
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    heard = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert heard.stdout == "18?s\n", heard.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    line = f"{sys.executable} {ROOT / 'launch.py'} search --help | head -1; exit ${{PIPESTATUS[0]}}"
    gone = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in gone.stderr


def test_what_is_interrupted_says_so() -> None:
    screen = io.StringIO()
    with pytest.raises(KeyboardInterrupt), working(Console(file=screen), "attacking"):
        raise KeyboardInterrupt
    assert screen.getvalue() == "attacking\ninterrupted while attacking\n"


@pytest.mark.parametrize(("note", "line"), [("", "interrupted\n"), (SAID, "")])
def test_ctrl_c_is_never_without_a_word_and_never_with_two(
    note: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> list[Any]:
        stop = KeyboardInterrupt()
        if note:
            stop.add_note(note)
        raise stop

    monkeypatch.setattr("search.cli.listings.rows", dies)
    assert said("list", "tasks") == Said(130, "", line)
