"""A real S3 for tests: moto's server on loopback, and our commands with s3fs, as on machines of their own."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from tests.support.extras import PYTHON
from tests.support.paths import ROOT

LAUNCH = ROOT / "launch.py"
SERVER = Path(__file__).with_name("s3_server.py")
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAhushhush1",
    "AWS_SECRET_ACCESS_KEY": "hushhush2/secret+key",
    "AWS_SESSION_TOKEN": "hushhush3-token",
}
SIGNED = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
"""moto deletes nothing for who does not sign, but looks at no signature."""
HURRIED = {"FSSPEC_S3": '{"config_kwargs": {"read_timeout": 3}}'}
"""Variables for s3fs to give up a request that has no answer five times in 3 s, not in 15 s."""
Trouble = Literal["", "refuses", "slow", "fails", "full", "silent"]


@dataclass(frozen=True)
class S3:
    """A server with one bucket.

    Args:
        port: where it listens on loopback.
        folder: of its own, and of the machines that use it.
    """

    port: int
    folder: Path
    uri = "s3://bucket/runs"

    def trouble(self, what: Trouble) -> None:
        (self.folder / "server" / "trouble").write_text(what)

    def log(self) -> list[str]:
        """Return the requests so far: method, path and trouble."""
        return (self.folder / "server" / "log").read_text().splitlines()

    def has_got(self, name: str) -> bool:
        """Return whether somebody has sent an object, or tried to."""
        return any(line.startswith(f"PUT /bucket/runs/{name} ") for line in self.log())

    def sizes(self) -> dict[str, int]:
        """Return the size of every object below `runs/`, in bytes."""
        found, more = dict[str, int](), ""
        while True:
            tree = ElementTree.fromstring(self._ask("GET", f"bucket?list-type=2{more}"))
            space = tree.tag.partition("}")[0] + "}"
            for each in tree.iter(f"{space}Contents"):
                name, size = (each.findtext(f"{space}{field}") or "" for field in ("Key", "Size"))
                found[name.removeprefix("runs/")] = int(size)
            token = tree.findtext(f"{space}NextContinuationToken")
            if token is None:
                return found
            more = f"&continuation-token={urllib.parse.quote(token)}"

    def read(self, name: str) -> bytes:
        return self._ask("GET", f"bucket/runs/{urllib.parse.quote(name)}")

    def drop(self, name: str) -> None:
        self._ask("DELETE", f"bucket/runs/{urllib.parse.quote(name)}")

    def make(self, bucket: str) -> None:
        self._ask("PUT", bucket)

    def environment(self, machine: str) -> dict[str, str]:
        """Return the variables of a machine with its own cache and, in `machine`, its own working directory."""
        where = self.folder / machine
        where.mkdir(exist_ok=True)
        server = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "AWS_DEFAULT_REGION": "us-east-1"}
        return {**os.environ, **SECRETS, **server, "CRUCIBLE_CACHE": str(where / "cache")}

    def start(
        self, machine: str, *arguments: str, also: dict[str, str] | None = None, script: Path = LAUNCH
    ) -> subprocess.Popen[str]:
        """Start a command of ours on a machine; its output goes to the file `said` there.

        Args:
            also: variables of the environment.
        """
        command, environment = [str(PYTHON), str(script), *arguments], self.environment(machine) | (also or {})
        with (self.folder / machine / "said").open("a") as said:
            said.write(f"$ {' '.join(arguments)}\n")
            said.flush()
            return subprocess.Popen(
                command, cwd=self.folder / machine, env=environment, text=True, stdout=said, stderr=said
            )

    def launch(self, machine: str, *arguments: str, script: Path = LAUNCH) -> tuple[int, str]:
        """Run a command of ours on a machine; return its exit code and its output."""
        code = self.start(machine, *arguments, script=script).wait(500)
        return code, (self.folder / machine / "said").read_text().rpartition("$ ")[2].partition("\n")[2]

    def _ask(self, method: str, path: str) -> bytes:
        url, signed = f"http://127.0.0.1:{self.port}/{path}", {"Authorization": SIGNED}
        asked = urllib.request.Request(url, method=method, headers=signed)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            body: bytes = answer.read()
        return body


@contextmanager
def serving(folder: Path, port: int) -> Iterator[S3]:
    """Serve until the end of the block."""
    (folder / "server").mkdir()
    s3 = S3(port, folder)
    s3.trouble("")
    with (folder / "server" / "said").open("wb") as said:
        process = subprocess.Popen([str(PYTHON), SERVER, str(port), str(folder / "server")], stdout=said, stderr=said)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                s3.make("bucket")
                break
            except (urllib.error.URLError, ConnectionError) as error:
                if time.monotonic() > until or process.poll() is not None:
                    raise AssertionError((folder / "server" / "said").read_text()) from error
                time.sleep(0.2)
        yield s3
    finally:
        process.terminate()
        process.wait()
