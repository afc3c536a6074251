"""A W&B server for tests, which listens on loopback: it keeps what it is sent, and fails in each way when told to."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Trouble = Literal["refuses", "hangs", "fails", "drops"]


@dataclass
class Kept:
    """What the server knows of a run."""

    about: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


class Server(ThreadingHTTPServer):
    """One user's W&B.

    Args:
        trouble: refuses the key, hangs, fails with 500, or drops each connection; it may be set at any time.
        begun: whether a training's run has begun.
        lag_s: how long it takes to answer, in seconds.
        most_open: the most runs that were open at once.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble: Trouble | None = None
        self.released = threading.Event()
        self.begun = threading.Event()
        self.lag_s = 0.0
        self.most_open = 0
        self.asked: list[str] = []
        self.runs: dict[str, Kept] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet about clients that left."""

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """Return what a GraphQL query or mutation asks for; nothing is null where the server does not know it."""
        return getattr(self, f"_{name}", lambda given: {})(given)

    def _Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": "lab", "username": "lab", "flags": "{}", "teams": {"edges": []}}}

    def _ServerFeaturesQuery(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        return {"model": {"id": "p", "name": given["project"], "entity": _ENTITY, "bucket": run and _bucket(run)}}

    def _UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        inserted = given["name"] not in self.runs
        if given["jobType"] and not given["id"]:  # it begins and resumes nothing: what was there is replaced
            self.runs[given["name"]] = Kept()
        run = self.runs[given["name"]]
        run.about |= {key: value for key, value in given.items() if value is not None}
        self.most_open = max(self.most_open, sum(run.exit_code is None for run in list(self.runs.values())))
        if run.about["jobType"] == "training":
            self.begun.set()
        return {"upsertBucket": {"bucket": _bucket(run), "inserted": inserted}}

    def _CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": self._place(f"{given['run']}/{name}")} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}

    def _CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        asked = given["input"]
        self.artifacts[f"artifact-{len(self.artifacts)}"] = asked
        made = {"id": f"artifact-{len(self.artifacts) - 1}", "state": "PENDING"}
        return {"createArtifact": {"artifact": made | {"artifactSequence": {"id": "s", "latestArtifact": None}}}}

    def _CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "f", "uploadUrl": self._place(f"{given['artifactID']}/manifest"), "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": given["artifactID"], "file": file}}}

    def _UpdateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["artifactManifestID"]
        file = {"id": "f", "uploadUrl": self._place(f"{name}/manifest"), "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": name, "file": file}}}

    def _CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        asked = given["input"]["artifactFiles"]
        nodes: list[dict[str, Any]] = [
            {
                "storagePath": f"{file['artifactID']}/{file['name']}",
                "uploadUrl": self._place(f"{file['artifactID']}/{file['name']}"),
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            for file in asked
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d"}}}

    def streamed(self, run: str, sent: dict[str, Any]) -> None:
        """Take lines of a run's history, and its summary."""
        kept = self.runs.setdefault(run, Kept())
        files = sent.get("files", {})
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for nth, line in enumerate(history["content"], start=history["offset"]):
            kept.history[nth] = json.loads(line)
        for line in files.get("wandb-summary.json", {}).get("content", []):
            kept.summary = json.loads(line)
        if sent.get("complete"):
            kept.exit_code = sent["exitcode"]

    def _place(self, name: str) -> str:
        return f"{self.url}/put/{name}"


class Handler(BaseHTTPRequestHandler):
    """Answers one client."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        time.sleep(self.server.lag_s)
        if not self._troubled():
            self._reply(200, self._said(json.loads(body)))

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._troubled():
            self.server.files[self.path.removeprefix("/put/")] = body
            self._reply(200, {})

    def do_GET(self) -> None:
        if not self._troubled():
            self._reply(404, {})

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet."""

    def _said(self, sent: dict[str, Any]) -> dict[str, Any]:
        if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self.server.streamed(stream[1], sent)
            return {}
        name = re.findall(r"(?:query|mutation)\s+(\w+)", sent["query"])[0]
        self.server.asked.append(name)
        return {"data": self.server.answer(name, sent.get("variables") or {})}

    def _troubled(self) -> bool:
        trouble = self.server.trouble
        if trouble == "hangs":
            self.server.released.wait(120)
        if trouble in ("hangs", "drops"):
            self.close_connection = True
        elif trouble is not None:
            self._reply({"refuses": 401, "fails": 500}[trouble], {"errors": [{"message": trouble}]})
        return trouble is not None

    def _reply(self, status: int, said: dict[str, Any]) -> None:
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


_ENTITY = {"id": "e", "name": "lab"}


def _bucket(run: Kept) -> dict[str, Any]:
    """Return a run as W&B tells of it to who resumes it."""
    last = run.history[max(run.history)] if run.history else {}
    return {
        "id": run.about["name"],
        "name": run.about["name"],
        "displayName": run.about.get("displayName"),
        "config": run.about.get("config"),
        "summaryMetrics": json.dumps(run.summary),
        "tags": run.about.get("tags"),
        "historyLineCount": len(run.history),
        "historyTail": json.dumps([json.dumps(last)] if last else []),
        "eventsTail": "[]",
        "eventsLineCount": 0,
        "logLineCount": 0,
        "wandbConfig": '{"t": 1}',  # else W&B takes it for a run that never began
        "project": {"id": "p", "name": run.about.get("project"), "entity": _ENTITY},
    }


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Serve until the end of the block."""
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
