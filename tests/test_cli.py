"""The command line as a user meets it: one line and exit code 2 for bad input, before anything is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from launch import main
from search.study import read
from spaces.space import InputError

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ("--task", "digits/A", "--space", "smoke", "--wandb", "disabled")


def launch(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300)


BAD: list[tuple[Sequence[str], str]] = [
    (["search", "--defense", "puvea"], ", puvae, but is 'puvea'; did you mean 'puvae'?"),
    (["search", "--task", "minst/A"], "did you mean 'mnist'?"),
    (["search", "--task", "mnist/Q"], "must be one of A, B, C, D, defensegan-A, "),
    (["search", "--space", "papers"], "the space of puvae must be one of paper, wide, default, smoke"),
    (["search", "--method", "annealing"], "method must be 'tpe', 'nsga2', 'gp', 'random', 'qmc' or 'grid'"),
    (["search", "--suite", "quik"], "did you mean 'quick'?"),
    (["search", "--threat", "blackbox"], "threat must be 'oblivious', 'black-box' or 'white-box', but is 'blackbox'"),
    (["search", "--knob", "lamda_rc=1"], "did you mean 'lambda_rc'?"),
    (["search", "--knob", "lambda_rc"], "--knob must be NAME=VALUE"),
    (["search", "--knob", "conv_maps=0"], "conv_maps must be a whole number from 1 to 256, but is 0"),
    (["search", "--knob", "sigma_eps=0,-1"], "sigma_eps must be a number from 0 to 1000, but is -1.0"),
    (["search", "--method", "grid"], "a grid needs finite domains, but lambda_rc is a number from 0.1 to 10"),
    (["search", "--eps", "-0.1"], "eps must be greater than or equal to 0, but is '-0.1'"),
    (["search", "--eps", "1.5"], "eps must be from 0 to 1 in Linf, in pixel units of [0, 1], but is 1.5"),
    (["search", "--norm", "L1"], "norm must be 'Linf' or 'L2', but is 'L1'"),
    (["search", "--norm", "L2"], "eps must be given in L2"),
    (["search", "--threat", "black-box", "--eval-images", "6000"], "eval_images must leave a black-box attacker 150"),
    (["search", "--substitute", "Z"], "must be one of A, B, C, D, "),
    (["attack", "/tmp/there-is-none"], "an export must be a folder with whole files, but /tmp/there-is-none"),
    (["attack", "/tmp", "--suite", "standart"], "did you mean 'standard'?"),
    (["search", "--protect", "cifar10/A"], "protect must be a task on mnist, as mnist/A is, but is cifar10/A"),
    (["search", "--max-clean-rejection", "2"], "max_clean_rejection must be less than or equal to 1, but is '2'"),
    (["search", "--defense", "hgd", "--task", "digits/A", "--knob", "levels=5"], "a U-Net of 5 levels needs images of"),
    (["search", "--trials", "0"], "trials must be greater than or equal to 1, but is '0'"),
    (["search", "--train-images", "60000"], "train_images must be at most 54000 on mnist, but is 60000"),
    (["search", "--eval-images", "6001"], "eval_images must be at most 6000 on mnist, but is 6001"),
    (["search", "--seed", "4294967296"], "seed must be less than 4294967296"),
    (["search", "--trials", "many"], "trials must be a valid integer"),
    (["search", "--min-clean-accuracy", "90"], "min_clean_accuracy must be less than or equal to 1"),
    (["search", "--name", "../up"], "name must be letters, digits, '.', '_' and '-', and no path, but is '../up'"),
    (["search", "--name", ".hidden"], "and no path, but is '.hidden'"),
    (
        ["search", "--storage", "s3://bucket/runs"],
        "storage must be a folder or a URI of an installed file system: pip install s3fs",
    ),
    (["search", "--config", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    (["search", "--gpu", "1"], "No such option: --gpu"),
    (["status", "nothing", "--storage", "/tmp/there-is-none"], "a search must exist, but there is none in"),
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
        read(tmp_path / "study.yaml")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_study_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="it is not UTF-8"):
        read(tmp_path / "study.yaml")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("trials: 3\nseed: 7\n")
    shown = launch("search", "--config", str(tmp_path / "study.yaml"), "--trials", "5", "--print-config").stdout
    assert "trials: 5\n" in shown and "seed: 7\n" in shown


def test_knobs_of_flags_and_file_add_up_and_an_eps_may_be_a_fraction(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("knobs: {latent: 4, dense: 64}\n")
    flags = ["--knob", "dense=32", "--knob", "conv_maps=4,8", "--eps", "8/255"]
    study = launch("search", "--config", str(tmp_path / "study.yaml"), *flags, "--print-config").stdout
    assert "  latent: 4\n  dense: 32\n  conv_maps:\n  - 4\n  - 8\n" in study and "eps: 0.03137" in study


def test_a_printed_config_is_a_config(tmp_path: Path) -> None:
    first = launch("search", "--knob", "conv_maps=4,8", "--knob", "label_injection=planes", "--print-config").stdout
    (tmp_path / "study.yaml").write_text(first)
    assert launch("search", "--config", str(tmp_path / "study.yaml"), "--print-config").stdout == first


def test_a_name_that_exists_says_resume(tmp_path: Path) -> None:
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "study.yaml").touch()
    result = launch("search", "--name", "smoke", "--storage", str(tmp_path), *SMOKE)
    assert result.returncode == 2 and "go on with `python launch.py resume smoke --storage" in result.stderr


def test_a_storage_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = launch("search", "--storage", str(tmp_path / "file" / "runs"), *SMOKE)
    assert result.returncode == 2 and "a storage must be a folder that can be written" in result.stderr


def test_a_data_folder_with_a_wrong_file_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "data" / "raw" / "mnist"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"not MNIST")
    result = launch("search", "--storage", str(tmp_path / "runs"), "--data-dir", str(tmp_path / "data"))
    assert result.returncode == 2 and "train-images-idx3-ubyte" in result.stderr and result.stderr.count("\n") == 1
    assert not list((tmp_path / "runs").glob("[!.]*"))


@pytest.mark.slow
def test_more_than_the_cluster_has_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    result = launch("search", "--storage", str(tmp_path / "runs"), "--gpus-per-trial", "99", *SMOKE)
    assert result.returncode == 2 and "gpus_per_trial must be at most what the cluster has" in result.stderr
    assert not list((tmp_path / "runs").glob("[!.]*"))


@pytest.mark.parametrize("what", ["defenses", "attacks", "spaces", "tasks", "searches"])
def test_lists_are_tables_for_people_and_json_for_scripts(what: str) -> None:
    assert launch("list", what).returncode == 0
    assert isinstance(json.loads(launch("list", what, "--json").stdout), list)


def test_the_doctor_names_each_piece() -> None:
    found = {row["what"]: row for row in json.loads(launch("doctor", "--json").stdout)}
    assert {"python", "torch", "ray", "device", "shared memory", "storage", "mnist", "W&B"} <= set(found)
    assert found["ray"]["found"] == "2.60.0"
    elsewhere = launch("doctor", "--data-dir", "/tmp/no-data-here").stdout
    assert "python launch.py data fetch mnist" in elsewhere


def test_help_teaches_every_command() -> None:
    shown = launch("--help", COLUMNS="200").stdout
    for command in ("search", "resume", "status", "report", "export", "list", "doctor", "data"):
        assert command in shown
    flags = launch("search", "--help", COLUMNS="200").stdout
    assert "--min-clean-accuracy" in flags and "--knob" in flags
