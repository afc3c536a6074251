"""The cluster files: each against the schema that its tool ships, and the Slurm script by running it."""

from __future__ import annotations

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from search.study.loading import make_study
from tests.search.cli.test_cli import launch
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
RAY = re.search(r"^ray==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def test_ray_up_takes_the_cluster_file() -> None:
    (config,) = documents("ray-up.yaml")
    prepared = prepare_config(config)
    validate_config(prepared)
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepared | {"max_workers": "many"})
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert {".git", ".venv", "runs"} <= set(config["rsync_exclude"])


def test_the_rayjob_is_a_ray_cluster_of_our_version_with_a_volume_that_every_node_mounts() -> None:
    claim, job = documents("rayjob.yaml")
    assert (claim["kind"], claim["spec"]["accessModes"]) == ("PersistentVolumeClaim", ["ReadWriteMany"])
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert RAY and cluster["rayVersion"] == RAY[1]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        assert container["image"] == f"crucible:{RAY[1]}"
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": "/shared", "objects": "/dev/shm"}
        (shared,) = [volume for volume in pod["volumes"] if volume["name"] == "shared"]
        assert shared["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    # Ray's own reading of a KubeRay cluster, by Ray's own schema
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "crucible", "namespace": "default"}, "spec": cluster}
    )
    validate_config(config)
    assert config["available_node_types"]["gpu"]["resources"] == {"CPU": 8, "GPU": 1, "memory": 32 * 2**30}
    assert f"rayproject/ray:{RAY[1]}-py311" in (DEPLOY / "Dockerfile").read_text()


def test_the_rayjobs_entrypoint_is_a_command_of_ours(tmp_path: Path) -> None:
    _, job = documents("rayjob.yaml")
    python, script, command, *flags = shlex.split(job["spec"]["entrypoint"])
    assert (python, script, command) == ("python", "launch.py", "search")
    printed = launch(command, *flags, "--print-config")
    assert printed.returncode == 0, printed.stderr
    study = make_study(yaml.safe_load(printed.stdout))
    assert study.storage.startswith("/shared/") and study.address == "auto"


STAND_INS = {
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "scontrol": 'case $1 in show) echo 127.0.0.1; echo 127.0.0.2 ;; requeue) echo "$2" > "$REQUEUED" ;; esac',
}


@contextmanager
def sbatch(tmp_path: Path, *arguments: str, job: int) -> Iterator[subprocess.Popen[str]]:
    """Run the script as Slurm would, on two nodes that are both this machine."""
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    tools = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "REQUEUED": str(tmp_path / "requeued"),
        "CRUCIBLE_RAY": str(tools / "ray"),
        "CRUCIBLE_PYTHON": str(tools / "python"),
    }
    script = subprocess.Popen(
        ["bash", str(DEPLOY / "slurm.sh"), *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield script
    finally:
        subprocess.run(["pkill", "--signal", "KILL", "--session", str(script.pid)])


@pytest.mark.slow
def test_the_slurm_script_saves_before_the_limit_and_goes_on_when_it_is_requeued(tmp_path: Path) -> None:
    candidates = tmp_path / "runs" / "first" / "candidates.csv"
    flags = ["--task", "digits/A", "--space", "smoke", "--trials", "2", "--epochs", "4", "--eval-images", "60"]
    flags += ["--cheap-images", "20", "--classifier-epochs", "4", "--wandb", "disabled", "--refine", "0"]
    command = ("first", str(tmp_path / "runs"), *flags)
    with sbatch(tmp_path, *command, "--concurrent", "1", job=os.getpid()) as first:
        until = time.monotonic() + 300
        while not candidates.exists() or candidates.read_text().count("\n") < 6:
            assert first.poll() is None and time.monotonic() < until, "no candidate came"
            time.sleep(0.2)
        first.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B: has it
        said = first.communicate(timeout=120)[0]
        assert first.returncode == 130 and "go on with" in said, said
        assert (tmp_path / "requeued").read_text() == f"{os.getpid()}\n"
    with sbatch(tmp_path, *command, job=os.getpid() + 1) as second:
        said = second.communicate(timeout=300)[0]
        assert second.returncode == 0, said
    rows = list(csv.DictReader(candidates.open()))
    assert len(rows) == len({row["candidate"] for row in rows}) == 12


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / "slurm.sh")], check=True)
    asked = re.findall(r"^#SBATCH (--[a-z-]+)", (DEPLOY / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--nodes", "--time", "--signal", "--requeue"} <= set(asked)
