"""The cluster files: each against its tool's own schema; the Slurm script runs in test_slurm.py."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from search.study.loading import make_study
from tests.search.cli.test_cli import launch
from tests.support.extras import PYTHON
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


def changed(document: Any, path: str, value: Any) -> Any:
    """Return a copy with another value at a path such as `spec.workerGroupSpecs.0.replicas`."""
    copy = json.loads(json.dumps(document))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = copy
    for part in parents:
        place = place[part]
    place[last] = value
    return copy


def test_kuberay_takes_the_rayjob() -> None:
    schema = yaml.safe_load(Path(__file__).with_name("rayjob_schema.yaml").read_text())
    _, job = documents("rayjob.yaml")
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(job, schema)
    cluster = "spec.rayClusterSpec"
    for path, value in [
        ("spec.entryPoint", "python launch.py"),
        ("spec.shutdownAfterJobFinishes", False),
        ("metadata.name", "Crucible"),
        (f"{cluster}.authOptions.mode", "tokens"),
        (f"{cluster}.headGroupSpec.rayStartParams.num-cpus", 0),
        (f"{cluster}.headGroupSpec.replicas", 1),
        (f"{cluster}.workerGroupSpecs.0.replicas", "2"),
    ]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed(job, path, value), schema)
    version = tuple(map(int, job["spec"]["rayClusterSpec"]["rayVersion"].split(".")))
    assert version >= (2, 52, 0), "the operator refuses tokens with an older Ray"
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups)


@pytest.mark.skipif(not PYTHON.exists(), reason="`make extras` makes the environment with the schemas of Kubernetes")
def test_kubernetes_takes_the_claim_and_the_pods(tmp_path: Path) -> None:
    claim, job = documents("rayjob.yaml")
    cluster = job["spec"]["rayClusterSpec"]
    head, *workers = (
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    )

    def taken(*documents: dict[str, Any]) -> bool:
        file = tmp_path / "documents.yaml"
        file.write_text(yaml.safe_dump_all(documents))
        return (
            subprocess.run([PYTHON, "-m", "kubernetes_validate", "--strict", file], capture_output=True).returncode == 0
        )

    assert taken(claim, head, *workers)
    assert not taken(changed(claim, "spec.accessMode", ["ReadWriteMany"]))
    assert not taken(changed(head, "spec.containers.0.volumeMounts.0", {"name": "shared"}))


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
