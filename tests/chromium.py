"""A headless Chromium driven over its debugging pipe, with nothing but the standard library."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(
    PROGRAM is None, reason="no chromium is installed (Debian: apt-get install chromium)"
)
PHONE = (390, 844)
DESK = (1280, 900)


class Page:
    """One tab.

    Attributes:
        errors: what the console and the page reported as warnings, errors and uncaught exceptions.
        requests: addresses the page asked for, its own and ``data:`` ones left out.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._rest, self._number = read, write, b"", 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(*DESK)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events that arrive meanwhile are noted."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def _next(self, timeout: float = 60) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], timeout)
            assert ready, "chromium does not answer"
            piece = os.read(self._read, 1 << 20)
            assert piece, "chromium has ended"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        event = dict(json.loads(line))
        self._note(str(event.get("method")), event.get("params", {}))
        return event

    def _note(self, method: str, data: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled" and data["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(argument.get("value")) for argument in data["args"]))
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(data["exceptionDetails"]))
        elif method == "Log.entryAdded" and data["entry"]["level"] in ("error", "warning"):
            self.errors.append(data["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not data["request"]["url"].startswith("data:"):
            self.requests.append(data["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def open(self, address: str | Path) -> None:
        """Load a file or an address and wait until everything in it is there."""
        url = address.absolute().as_uri() if isinstance(address, Path) else address
        self._loaded = False
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + 60
        while not self._loaded:
            assert time.monotonic() < deadline, f"{url} did not load"
            self._next()
        self.requests = [found for found in self.requests if found != url]

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        """One real key stroke: Tab, Enter, Space or an arrow."""
        codes = {"Tab": 9, "Enter": 13, "Space": 32, "ArrowLeft": 37, "ArrowRight": 39}
        text = {"Enter": "\r", "Space": " "}.get(key, "")
        shared = {"key": text if key == "Space" else key, "code": key, "windowsVirtualKeyCode": codes[key]}
        shared["modifiers"] = 8 if shift else 0
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **shared)
        self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

    def size(self, width: int, height: int) -> None:
        """Be a window, or a phone when it is narrow."""
        phone = width < 700
        factor = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=factor, mobile=phone
        )

    def dark(self, on: bool = True) -> None:
        """Prefer dark colours."""
        wish = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self.call("Emulation.setEmulatedMedia", features=wish)

    def picture(self, file: Path, *, whole: bool = True) -> Path:
        """A screenshot of the whole page or of the window."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))
        return file

    def print(self) -> bytes:
        """The page as a PDF on A4."""
        answer = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        return base64.b64decode(answer["data"])


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A fresh browser with its own profile, ended afterwards."""
    assert PROGRAM is not None
    to_child, from_here = os.pipe()
    from_child, to_here = os.pipe()
    # The browser expects the pipe at 3 and 4: keep ours out of the way while they are put there.
    reading = fcntl.fcntl(to_child, fcntl.F_DUPFD, 10)
    writing = fcntl.fcntl(to_here, fcntl.F_DUPFD, 10)

    def place() -> None:
        os.dup2(reading, 3)
        os.dup2(writing, 4)

    options = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
        "--no-first-run", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [PROGRAM, *options, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            command, close_fds=False, preexec_fn=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in (to_child, to_here, reading, writing):
            os.close(end)
        try:
            yield Page(from_child, from_here)
        finally:
            os.close(from_here)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            if process.poll() is None:
                process.kill()
                process.wait()
            os.close(from_child)
