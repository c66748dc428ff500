"""Debian's chromium without a window, driven over its DevTools protocol: for tests of what a page really does."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1000,600", "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """One tab. ``evaluate`` gives what a JavaScript expression is, once its promise is kept."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        """What the page's console says of errors, refusals of its Content-Security-Policy among them."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.complaints.append(message["params"]["entry"]["text"])
            elif message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(message["params"]["exceptionDetails"])[:500])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}; the page complains: {self.complaints}"
            time.sleep(0.1)

    def type(self, text: str) -> None:
        for character in text:
            key = (
                {"text": "\r", "key": "Enter", "windowsVirtualKeyCode": 13}
                if character == "\n"
                else {"text": character}
            )
            self.call("Input.dispatchKeyEvent", type="keyDown", **key)
            self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


class Browser:
    def __init__(self, url: str) -> None:
        self._url = url

    @contextmanager
    def page(self) -> Iterator[Page]:
        made = httpx.put(f"{self._url}/json/new?about:blank").json()
        with connect(made["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Page(socket)
        httpx.get(f"{self._url}/json/close/{made['id']}")


@contextmanager
def headless_browser() -> Iterator[Browser]:
    """Skips the test where there is no chromium."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium here (apt-get install chromium)")
    with tempfile.TemporaryDirectory(prefix="atl-browser-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            found = Path(profile) / "DevToolsActivePort"
            end = time.monotonic() + 60
            while not found.exists() or len(found.read_text().split()) < 2:
                assert process.poll() is None, "chromium ended at its start"
                assert time.monotonic() < end, "chromium did not start within 60 s"
                time.sleep(0.1)
            yield Browser(f"http://127.0.0.1:{found.read_text().split()[0]}")
        finally:
            process.terminate()
            process.wait(30)


def skip_without_packages(answer: httpx.Response) -> None:
    """``answer``: the manager's, when it was asked for a page. Skips the test where its npm packages cannot be had."""
    if answer.status_code == 503 and answer.json()["code"] == "missing_package":
        pytest.skip(f"no npm packages for the page here: {answer.json()['message']}")
