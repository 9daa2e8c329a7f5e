"""A headless Chromium, driven over its DevTools protocol by a pair of pipes: nothing to install but the browser.

Messages are JSON, each ended by a zero byte. `Browser.open` loads a file at a width and a colour scheme; what the page
logs, throws or tries to load is collected in `Page.troubles`.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 300.0
OPTIONS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--hide-scrollbars",
)


def find_browser() -> str | None:
    """The program in $CHROMIUM, or the first of the usual names that is on PATH."""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """Sends commands and waits for their results; events that come meanwhile go to the open page."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in = to_browser, from_browser
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **params: object) -> dict[str, Any]:
        """The result of a command. Fails on a command that the browser refuses, and after a minute of silence."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self._out, rest) :]
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int, *, dark: bool = False, height: int = 900) -> Page:
        """Load a file and wait until its plots are drawn."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        page.send("Emulation.setEmulatedMedia", features=scheme)
        self.events.clear()
        page.send("Page.navigate", url=path.resolve().as_uri())
        page.wait_for(
            "document.documentElement.dataset.plots === 'drawn' || !document.getElementById('no-plots').hidden"
        )
        return page


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def send(self, method: str, **params: object) -> dict[str, Any]:
        return self._browser.send(method, self._session, **params)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression (or a promise of it) is."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition: str) -> None:
        end = time.monotonic() + SECONDS
        # The expression is tried while the page is being loaded, when not all of it is there.
        while not self.value(f"(() => {{ try {{ return Boolean({condition}) }} catch {{ return false }} }})()"):
            assert time.monotonic() < end, f"{condition} did not come true; {self.troubles()}"
            time.sleep(0.05)

    def troubles(self) -> list[str]:
        """Errors and warnings on the console, exceptions, and every request but for the page itself."""
        found: list[str] = []
        for event in self._browser.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(f"console: {[arg.get('value', arg.get('description')) for arg in params['args']]}")
            elif method == "Runtime.exceptionThrown":
                found.append(f"exception: {params['exceptionDetails']}")
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(f"log: {params['entry']['text']}")
            elif method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:", "data:", "blob:")):
                    found.append(f"request: {url}")
        return found

    def hover(self, x: float, y: float) -> None:
        """Move the mouse there (CSS pixels of the view)."""
        for offset in (3, 0):
            self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x - offset, y=y)
            time.sleep(0.1)

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        content = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(content["data"]))

    def close(self) -> None:
        self._browser.send("Target.closeTarget", targetId=self._target)


@contextmanager
def started(program: str, profile: Path) -> Iterator[Browser]:
    """A running browser with its files in ``profile``; ended when the block is left."""
    child_in, to_browser = os.pipe()
    from_browser, child_out = os.pipe()
    # Away from 3 and 4, where the browser looks for its ends.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (child_in, child_out)]
    silent = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, ends[0], 3), (os.POSIX_SPAWN_DUP2, ends[1], 4)]
    actions += [(os.POSIX_SPAWN_DUP2, silent, number) for number in (0, 1, 2)]
    arguments = [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    child = os.posix_spawn(program, arguments, os.environ, file_actions=actions, setpgroup=0)
    for end in (child_in, child_out, silent, *ends):
        os.close(end)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        for end in (to_browser, from_browser):
            os.close(end)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
