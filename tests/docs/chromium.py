"""Drives headless Chromium by the DevTools protocol, over pipes: nothing needs to be installed.

    with Chromium() as browser:
        page = browser.open("file:///tmp/page.html", width=390, is_dark=True)
        page.evaluate("document.title")

It keeps what a page says on its console, and all that it asks for.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60.0
"""How long to wait for an answer."""

# A container has no user namespaces to make a sandbox of, and a small /dev/shm.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """Finds the program, or returns None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """A page that is open."""

    browser: Chromium
    session: str
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    is_loaded: bool = False

    def go_to(self, url: str) -> None:
        """Opens another page, and waits until it is loaded."""
        self.console.clear()
        self.requests.clear()
        self.is_loaded = False
        self.call("Page.navigate", url=url)
        self.browser.wait_until(lambda: self.is_loaded, url)

    def follow(self, expression: str) -> None:
        """Evaluates what leads to another page, and waits until that is loaded."""
        self.is_loaded = False
        self.evaluate(expression)
        self.browser.wait_until(lambda: self.is_loaded, expression)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def evaluate(self, expression: str) -> Any:
        """Returns what an expression of JavaScript gives, in values of Python."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Waits until an expression of JavaScript is true, and returns its value.

        Raises:
            TimeoutError: If that takes longer than a minute.
        """
        end = time.monotonic() + SECONDS
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"waited {SECONDS:g} s for {expression}")
            time.sleep(0.02)
        return value

    def screenshot(self, path: Path, *, is_whole: bool = False) -> None:
        """Takes a picture of what is seen, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.browser.targets.pop(self.session))
        del self.browser.pages[self.session]


class Chromium:
    """A browser without a window."""

    def __init__(self) -> None:
        program = find_chromium()
        if program is None:
            raise FileNotFoundError(f"none of {', '.join(NAMES)} is on the path")
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.pages: dict[str, Page] = {}
        self.targets: dict[str, str] = {}
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._text = b""
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [program, *FLAGS, f"--user-data-dir={self._folder.name}", "about:blank"]
        # The protocol is on the file descriptors 3 and 4. Only bash renumbers those above 9.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(SECONDS)
        except (OSError, RuntimeError, TimeoutError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGKILL)  # the session that this object began
            self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._folder.cleanup()

    def open(
        self, url: str, *, width: int = 1280, height: int = 900, is_dark: bool = False
    ) -> Page:
        """Opens a page in a tab of its own, and waits until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        self.targets[session] = target
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.go_to(url)
        return page

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol, and returns what it answers."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        self.wait_until(lambda: number in self._answers, method)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return dict(answer["result"])

    def wait_until(self, is_done: Callable[[], Any], what: str) -> None:
        """Reads what the browser tells until a function gives something true.

        Raises:
            TimeoutError: If that takes longer than a minute.
        """
        end = time.monotonic() + SECONDS
        while not is_done():
            if time.monotonic() > end:
                raise TimeoutError(f"waited {SECONDS:g} s for {what}")
            self._read()

    def _read(self) -> None:
        """Reads what comes within a second."""
        if not select.select([self._in], [], [], 1.0)[0]:
            return
        read = os.read(self._in, 1 << 20)
        if not read:
            raise RuntimeError("Chromium has ended")
        *messages, self._text = (self._text + read).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            elif message.get("sessionId") in self.pages:
                self._note(self.pages[message["sessionId"]], message["method"], message["params"])

    def _note(self, page: Page, event: str, params: dict[str, Any]) -> None:
        """Notes what the page says and asks for."""
        if event == "Page.loadEventFired":
            page.is_loaded = True
        elif event == "Network.requestWillBeSent":
            page.requests.append(params["request"]["url"])
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            page.console.append(" ".join(str(arg.get("value")) for arg in params["args"]))
        elif event == "Runtime.exceptionThrown":
            page.console.append(json.dumps(params["exceptionDetails"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            page.console.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
