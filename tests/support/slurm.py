"""A real Slurm on machines that are network namespaces: munge, slurmctld and a slurmd each, all in one folder."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machines
from benchmarks.machines import Machines
from tests.support.paths import ROOT

NODES = ("node1", "node2")
CONFIGURATION = """
ClusterName=crucible
SlurmctldHost={host}({head})
AuthType=auth/munge
AuthInfo=socket={folder}/munge
CredType=cred/munge
SlurmUser=root
FirstJobId={first}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
KillWait=180
{nodes}
PartitionName=all Nodes=ALL Default=YES
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


@dataclass(frozen=True)
class Slurm:
    """A cluster of two nodes.

    Args:
        folder: its files; jobs write `JOB.log` there.
    """

    folder: Path
    machines: Machines
    environment: Mapping[str, str]

    def sbatch(self, *arguments: str) -> str:
        """Submit deploy/slurm.sh, with flags of sbatch before it, and return the job's number."""
        logs = "%A_%a" if any(flag.startswith("--array") for flag in arguments) else "%A"
        return self.told("sbatch", "--parsable", f"--output={self.folder}/{logs}.log", "--cpus-per-task=1", *arguments)

    def told(self, *command: str) -> str:
        """Return what a command of Slurm's prints on the first node."""
        done = self.machines.run(NODES[0], list(command), self.environment, cwd=ROOT)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def about(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` says of a job."""
        fields = (word.partition("=") for word in self.told("scontrol", "show", "job", job).split())
        return {name: value for name, _, value in fields}

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def commands(self, node: str) -> list[str]:
        """Return the command lines that run on a node."""
        paths = [Path(f"/proc/{pid}/cmdline") for pid in self.machines.running(node)]
        return [path.read_bytes().replace(b"\0", b" ").decode() for path in paths if path.exists()]

    def wait(self, job: str, what: Callable[[], object], seconds: float = 1200) -> None:
        """Wait until `what` is true; an error includes the job's state and log."""
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, f"{self.about(job)}\n{self.log(job)[-5000:]}"
            time.sleep(0.3)

    def wait_for_state(self, job: str, *states: str, seconds: float = 1200) -> dict[str, str]:
        """Wait until a job is in one of these states, and return what Slurm says of it."""
        self.wait(job, lambda: self.about(job)["JobState"] in states, seconds)
        return self.about(job)


def lacking() -> str:
    """Return why Slurm cannot run here, or ""."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"it needs Slurm, but {', '.join(missing)} is not here (Debian: slurm-wlm, munge)"
    return "it needs root, for Slurm's and munge's daemons" if os.getuid() else machines.lacking()


@contextmanager
def slurm() -> Iterator[Slurm]:
    """Start a Slurm of two nodes, and end it with all of its jobs."""
    folder = Path(tempfile.mkdtemp(prefix="crucible-slurm-"))  # the path of munge's socket must be short
    folder.chmod(0o755)
    tools = Path(sys.executable).parent
    environment = {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "TMPDIR": str(folder),
        "CRUCIBLE_RAY": str(tools / "ray"),
        "CRUCIBLE_PYTHON": str(tools / "python"),
    }
    running: list[subprocess.Popen[bytes]] = []
    with machines.machines(*NODES) as made:
        cluster = Slurm(folder, made, environment)
        try:
            _configure(folder, made)
            begin = [*_munge(folder), ["slurmctld", "-D"]]
            for name, command in [
                *((NODES[0], each) for each in begin),
                *((n, ["slurmd", "-D", "-N", n]) for n in NODES),
            ]:
                with (folder / "daemons.log").open("ab") as log:
                    running.append(made.popen(name, command, environment, stdout=log, stderr=log, cwd=folder))
            until = time.monotonic() + 120
            while made.run(NODES[0], ["sinfo", "--noheader", "-o", "%D %t"], environment).stdout != "2 idle\n":
                assert time.monotonic() < until, (folder / "daemons.log").read_text()[-3000:]
                time.sleep(0.3)
            yield cluster
        finally:
            made.run(NODES[0], ["scancel", "--user=root"], environment)
            until = time.monotonic() + 120
            while made.run(NODES[0], ["squeue", "--noheader"], environment).stdout and time.monotonic() < until:
                time.sleep(0.3)
            for process in reversed(running):
                process.terminate()
                process.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path, made: Machines) -> None:
    """Write Slurm's files; each node has a CPU, and a GPU in name, so that the script's own request is met."""
    host = socket.gethostname()
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr={made.address(name)} CPUs=1 Gres=gpu:1" for name in NODES
    )
    values = {"host": host, "head": made.address(NODES[0]), "folder": folder, "nodes": nodes}
    text = CONFIGURATION.format(first=secrets.randbelow(10**6) + 1000, **values)
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # else slurmd looks for the kernel's, in vain
    (folder / "state").mkdir()


def _munge(folder: Path) -> list[list[str]]:
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    files = {"key-file": "munge.key", "socket": "munge", "pid-file": "munge.pid", "log-file": "munge.log"}
    files["seed-file"] = "munge.seed"
    return [["munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())]]
