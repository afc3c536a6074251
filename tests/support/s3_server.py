"""An S3 server: moto's over HTTP on loopback, with troubles in front of it. It runs in the
environment of `make extras`.

    python s3_server.py PORT FOLDER

It takes its trouble from the file `trouble` of the folder, at each request, and appends each request to `log` there.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

SLOW_S = 10.0
REFUSED = ("403 Forbidden", "AccessDenied", "Access Denied")
BROKEN = ("500 Internal Server Error", "InternalError", "We encountered an internal error. Please try again.")
FULL = (
    "507 Insufficient Storage",
    "XMinioStorageFull",
    "Storage backend is full.",
)
"""The code is MinIO's; Amazon's own S3 is never full."""


class Troubled:
    """moto's S3, which refuses everything, is slow or silent, fails in the middle of an upload or has no room for one.

    Args:
        folder: has the files `trouble` and `log`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.s3 = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        trouble, upload = (self.folder / "trouble").read_text(), environ["REQUEST_METHOD"] in ("PUT", "POST")
        with (self.folder / "log").open("a") as log:
            log.write(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {trouble}\n")
        if trouble == "slow":
            time.sleep(SLOW_S)
        if trouble == "silent":
            threading.Event().wait()
        size = int(environ.get("CONTENT_LENGTH") or 0)
        if trouble == "fails" and upload:
            environ["wsgi.input"].read(size // 2)
            return _answer(environ, start, *BROKEN)
        if trouble == "refuses" or (trouble == "full" and upload):
            environ["wsgi.input"].read(size)
            return _answer(environ, start, *(REFUSED if trouble == "refuses" else FULL))
        return self.s3(environ, start)


def _answer(environ: dict[str, Any], start: Callable[..., Any], status: str, code: str, said: str) -> Iterable[bytes]:
    start(status, [("Content-Type", "application/xml")])
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{said}</Message></Error>"
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body.encode()]


if __name__ == "__main__":
    run_simple(
        "127.0.0.1", int(sys.argv[1]), Troubled(Path(sys.argv[2])), threaded=True, request_handler=MotoRequestHandler
    )
