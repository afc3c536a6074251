"""A headless Chromium, driven like a user does, by clicks, drags and keys: the DevTools protocol on a pipe."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --v=0"
).split()
PATIENCE_S = 60.0
"""Longest wait for an answer of the browser, in seconds: the machine may be busy."""


class Browser:
    """One tab of a headless browser, closed on leaving the `with` block.

    Args:
        profile: the folder of the browser's profile; deleted with the test's.
        width: of the window, in CSS pixels; also below the 500 that a headless window has at least.
        dark: whether the user prefers dark pages.
        touch: whether a finger is all there is to point with.
    """

    def __init__(
        self, profile: Path, width: int, *, height: int = 900, dark: bool = False, touch: bool = False
    ) -> None:
        self.console: list[str] = []
        self.threw = False
        self._sent, self._session, self._unread = 0, "", b""
        into, self._write = (_high(fd) for fd in os.pipe())
        self._read, out_of = (_high(fd) for fd in os.pipe())
        argv = [str(CHROMIUM), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        silent = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (1, 2)]
        pipes = [(os.POSIX_SPAWN_DUP2, into, 3), (os.POSIX_SPAWN_DUP2, out_of, 4)]
        self._process = os.posix_spawn(argv[0], argv, os.environ, file_actions=[*silent, *pipes])
        os.close(into)
        os.close(out_of)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        if touch:
            self.send("Emulation.setTouchEmulationEnabled", enabled=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._write)
        os.close(self._read)
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)

    def open(self, page: Path) -> None:
        """Open a page from its file, and wait until all its charts are drawn."""
        self.send("Page.navigate", url=page.as_uri())
        self.until("document.documentElement?.dataset.drawn !== undefined")

    def send(self, method: str, **params: Any) -> Any:
        """Send a command and return its result.

        Raises:
            RuntimeError: the browser refused the command, or did not answer.
        """
        self._sent += 1
        command = {"id": self._sent, "method": method, "params": params}
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps({**command, **session}).encode() + b"\0")
        while (answer := self._message()).get("id") != self._sent:
            self._hear(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE_S
        while b"\0" not in self._unread:
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise RuntimeError(f"the browser said nothing for {PATIENCE_S:.0f} s")
            if not (more := os.read(self._read, 1 << 20)):
                raise RuntimeError("the browser ended")
            self._unread += more
        message, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(message))

    def _hear(self, event: dict[str, Any]) -> None:
        about = event.get("params", {})
        if event.get("method") == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(one.get("value", one.get("description"))) for one in about["args"]))
        elif event.get("method") == "Runtime.exceptionThrown":
            self.threw = True
            self.console.append(str(about["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded":
            self.console.append(about["entry"]["text"])

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page; a promise is awaited."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE_S
        while not self.run(condition):
            if time.monotonic() > end or self.threw:
                raise RuntimeError(f"never true: {condition}; {self.console}")
            time.sleep(0.05)

    def centre(self, element: str) -> tuple[float, float]:
        """Scroll an element, given as an expression, into view; return its centre in the window, in CSS pixels."""
        box = self.run(
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center', inline: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return float(box[0]), float(box[1])

    def mouse(self, kind: str, x: float, y: float) -> None:
        held = {"button": "left", "clickCount": 1, "buttons": 1} if kind != "mouseMoved" else {}
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held)

    def click(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, x, y)
            self.settle()

    def click_on(self, element: str) -> None:
        self.click(*self.centre(element))

    def drag(self, start: tuple[float, float], end: tuple[float, float], steps: int = 4) -> None:
        self.mouse("mouseMoved", *start)
        self.mouse("mousePressed", *start)
        for step in range(1, steps + 1):
            x, y = (a + (b - a) * step / steps for a, b in zip(start, end, strict=True))
            self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, button="left", buttons=1)
        self.mouse("mouseReleased", *end)
        self.settle()

    def touch(self, start: tuple[float, float], end: tuple[float, float], steps: int = 4) -> None:
        """Move a finger from one place to another, or tap where they are the same."""
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": start[0], "y": start[1]}])
        for step in range(1, steps + 1 if start != end else 1):
            x, y = (a + (b - a) * step / steps for a, b in zip(start, end, strict=True))
            self.send("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        still = "new Promise(done => { const y = scrollY; setTimeout(() => done(y === scrollY), 300); })"
        self.until(still)  # a flung page scrolls on

    def key(self, name: str, code: int = 0, text: str = "") -> None:
        """Press a key: its name and its code, and the text that it types."""
        about: dict[str, Any] = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **about)
        self.settle()

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)
        self.settle()

    def settle(self) -> None:
        """Wait until what the last input asked for is drawn."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        """Save what is in the window, or the whole page, as a PNG."""
        path.write_bytes(_bytes(self.send("Page.captureScreenshot", captureBeyondViewport=whole)))
        return path

    def pdf(self, path: Path) -> Path:
        path.write_bytes(_bytes(self.send("Page.printToPDF", preferCSSPageSize=True)))
        return path


def _bytes(answer: dict[str, str]) -> bytes:
    return base64.b64decode(answer["data"])


def _high(fd: int) -> int:
    """Move a file descriptor out of the way of 3 and 4, on which the browser listens and answers."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved
