"""Headless Chromium, driven over its debugging pipe: no port, no driver, nothing to install but the browser.

with Browser(tmp_path) as browser:
    page = browser.open(file, width=390)
    assert page.value("document.documentElement.scrollWidth") <= 390
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 60.0
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--hide-scrollbars", "--force-color-profile=srgb"),
)
# Chromium reads commands from descriptor 3 and writes answers to 4.
_MOVED = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3), os.dup2(int(sys.argv[2]), 4), os.execv(sys.argv[3], sys.argv[3:])"
)


def require_browser() -> str:
    """The browser's command; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    return found or pytest.skip("no Chromium here: make browser")


class Page:
    """A file, opened at one size. errors: what it wrote to the console and threw. requests: every URL it asked for."""

    def __init__(self, browser: "Browser", session: str) -> None:
        self._browser = browser
        self._session = session
        self.errors: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **params: Any) -> dict:
        return self._browser.call(method, self._session, **params)

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives in the page, as plain values."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """The whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


class Browser:
    """One Chromium process with a profile of its own in `folder`; leaving the block ends it."""

    def __init__(self, folder: Path) -> None:
        self._command = [require_browser(), *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self._log = folder / "chromium.log"
        self._pages: dict[str, Page] = {}
        self._number = 0
        self._lines: deque[bytes] = deque()
        self._rest = b""

    def __enter__(self) -> "Browser":
        # Above 4, or moving one to its place would close the other.
        to_child, ours_out = os.pipe()
        ours_in, to_us = os.pipe()
        child_in, child_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_child, to_us))
        words = [sys.executable, "-ISc", _MOVED, str(child_in), str(child_out), *self._command]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                words, pass_fds=(child_in, child_out), stdout=log, stderr=log, start_new_session=True
            )
        for end in (to_child, to_us, child_in, child_out):
            os.close(end)
        self._out, self._in = os.fdopen(ours_out, "wb", buffering=0), os.fdopen(ours_in, "rb", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._out.close()
        self._in.close()

    def open(self, file: Path, width: int, height: int = 900, dark: bool = False) -> Page:
        """Load a file in a tab of its own and wait until it is there."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        mobile = width < 600
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=file.resolve().as_uri())
        page.value("new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', done))")
        return page

    def call(self, method: str, session: str | None = None, **params: Any) -> dict:
        """Send a command and return its answer; events that come before it are taken down."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        self._out.write(json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _next(self) -> dict:
        while not self._lines:
            is_there, _, _ = select.select([self._in], [], [], PATIENCE_S)
            assert is_there, (
                f"Chromium says nothing for {PATIENCE_S:g} s: {self._log.read_text(errors='replace')[-2000:]}"
            )
            chunk = self._in.read(1 << 20)
            assert chunk, f"Chromium ended: {self._log.read_text(errors='replace')[-2000:]}"
            *whole, self._rest = (self._rest + chunk).split(b"\0")
            self._lines.extend(whole)
        return json.loads(self._lines.popleft())

    def _note(self, event: dict) -> None:
        page = self._pages.get(event.get("sessionId", ""))
        if page is None:
            return
        params = event["params"]
        if event["method"] == "Network.requestWillBeSent":
            page.requests.append(params["request"]["url"])
        elif event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            page.errors.append(json.dumps(params))
        elif event["method"] == "Log.entryAdded":
            page.errors.append(params["entry"]["text"])
