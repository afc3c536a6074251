"""The cluster files: each against the schema that its tool ships; the Slurm script runs in test_slurm.py."""

from __future__ import annotations

import re
import shlex
import subprocess
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


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / "slurm.sh")], check=True)
    asked = re.findall(r"^#SBATCH (--[a-z-]+)", (DEPLOY / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--nodes", "--time", "--signal", "--requeue"} <= set(asked)
