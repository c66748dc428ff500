"""The API over one kept connection and the standard library alone, so that a figure is the server's, not a client's."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

_KEPT_SECONDS = 2.0


class ApiClient:
    """Not for two threads at once."""

    def __init__(self, api_url: str, api_key: str) -> None:
        parts = urlsplit(api_url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)
        self._used_at = time.monotonic()
        self._api_url, self._api_key = api_url, api_key
        self._headers = {"Authorization": f"Bearer {api_key}"}

    def another(self) -> ApiClient:
        """With a connection of its own, for another thread."""
        return ApiClient(self._api_url, self._api_key)

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def request(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """``body``: bytes or an open file are sent as they are, anything else as JSON. Raises for a status >= 400."""
        response = self._answered(method, path, body, headers)
        content = response.read()
        self._used_at = time.monotonic()
        if response.status >= 400:
            raise RuntimeError(f"{method} {path}: {response.status}: {content[:2000].decode(errors='replace')}")
        return response.status, content

    def receive_into(self, path: str, target: memoryview) -> None:
        """GET ``path`` into memory of exactly the answer's size."""
        response = self._answered("GET", path)
        if response.status != 200:
            raise RuntimeError(f"GET {path}: {response.status}: {response.read(2000).decode(errors='replace')}")
        received = 0
        while count := response.readinto(target[received:]):
            received += count
        self._used_at = time.monotonic()
        if received != len(target) or response.read():
            raise RuntimeError(f"GET {path}: {received} bytes or more, {len(target)} expected")

    def _answered(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> http.client.HTTPResponse:
        sent = {**self._headers, **(headers or {})}
        payload: Any = body
        if body is not None and not isinstance(body, bytes) and not hasattr(body, "read"):
            payload = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        if time.monotonic() - self._used_at > _KEPT_SECONDS:
            # The server may have let an idle connection go; this one opens itself anew.
            self._connection.close()
        self._connection.request(method, f"/api/v1{path}", payload, sent)
        return self._connection.getresponse()

    def json(self, method: str, path: str, body: object = None) -> Any:
        return json.loads(self.request(method, path, body)[1])

    def create(self, name: str, **wishes: object) -> str:
        """Create a sandbox and return its id once it runs."""
        sandbox = self.json("POST", "/sandboxes?wait=true&timeout_seconds=300", {"name": name, **wishes})
        if sandbox["state"] != "running":
            raise RuntimeError(f"the sandbox {name} is {sandbox['state']}: {sandbox.get('failure')}")
        return str(sandbox["id"])

    def time_first_answer(self, name: str) -> float:
        """Seconds from asking for a sandbox to the first ``true`` answered in it; it is destroyed again."""
        began = time.perf_counter()
        sandbox = self.create(name)
        self.run(sandbox, "/bin/true")
        seconds = time.perf_counter() - began
        self.destroy(sandbox)
        return seconds

    def run(self, sandbox: str, *command: str) -> str:
        """Run a program; its stdout. Raises unless it exits with 0."""
        result = self.json("POST", f"/sandboxes/{sandbox}/run", {"command": list(command)})
        if result["exit_code"] != 0:
            raise RuntimeError(f"{command}: {result}")
        return str(result["stdout"])

    def destroy(self, sandbox: str) -> None:
        self.request("DELETE", f"/sandboxes/{sandbox}?wait=true")


def file_path(sandbox: str, path: str) -> str:
    return f"/sandboxes/{sandbox}/files?path={quote(path, safe='')}"
