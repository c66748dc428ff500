"""The API as its document describes it, before a manager that may be asked anything: what its paths name is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import requests
from pydantic import ValidationError
from tests.running_manager import RunningManager, start_manager, stop_manager

from atelier.schemas.host import ShutdownRequest

DOCUMENT = Path(__file__).resolve().parents[2] / "openapi" / "manager.json"
SECONDS: Final = 2.0
"""How long a stream is read, and a request is made to wait."""
_API = "/api/v1"
_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHnXvZ6r6kZDmHlJhVBAfDkJ5E7LrJzVQkIN0y0RJZ0m"


class DescribedApi:
    """``session`` speaks for an admin. ``names``: what stands for each part of a path in braces; all of it exists, though not
    for longer than one request: ``renew`` sees to it before the next."""

    def __init__(self, manager: RunningManager) -> None:
        self.manager = manager
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.headers["Authorization"] = f"Bearer {manager.key}"
        self.names: dict[str, str] = {"name": "base", "image": "base", "port": "8000", "kind": "volume"}
        self.names |= {"orphan": "none", "session": "none"}

    def call(self, method: str, path: str, body: object = None) -> Any:
        """JSON of an answer that has to be a good one."""
        answer = self.session.request(method, f"{self.manager.url}{_API}{path}", json=body, timeout=30)
        assert answer.ok, answer.text
        return answer.json() if answer.content else None

    def exists(self, path: str) -> bool:
        return self.session.get(f"{self.manager.url}{_API}{path}", timeout=30).ok

    def renew(self, path: str) -> None:
        """Make anew what ``path`` (one of the document's) names and what the request before it has ended."""
        names = self.names
        if "{sandbox}" in path and not self._runs(names.get("sandbox", "none")):
            self.clear()
            names["sandbox"] = self.call("POST", "/sandboxes?wait=true", {})["id"]
            for needed in ("pid", "terminal"):
                names.pop(needed, None)
            self.call("PUT", f"/sandboxes/{names['sandbox']}/ports/8000", {"visibility": "link"})
        if "{snapshot}" in path and not self.exists(f"/snapshots/{names.get('snapshot', 'none')}"):
            sandbox = self.call("POST", "/sandboxes?wait=true", {})["id"]
            names["snapshot"] = self.call("POST", f"/sandboxes/{sandbox}/snapshots?wait=true")["id"]
            self.call("DELETE", f"/sandboxes/{sandbox}?wait=true")
        inside = f"/sandboxes/{names.get('sandbox', '')}"
        if "{terminal}" in path and names.get("terminal") not in self._ids(f"{inside}/terminals"):
            names["terminal"] = self.call("POST", f"{inside}/terminals", {"command": ["cat"]})["id"]
        if "{pid}" in path and names.get("pid") not in self._ids(f"{inside}/processes", "pid"):
            started = self.session.post(
                f"{self.manager.url}{_API}{inside}/exec",
                json={"command": ["cat"], "stdin": True},
                stream=True,
                timeout=30,
            )
            with started:
                names["pid"] = str(json.loads(next(started.iter_lines()))["pid"])
        if "{user}" in path and "user" not in names:
            names["user"] = self.call("POST", "/users", {"email": "member@example.org"})["id"]
        if "{key}" in path:
            kind = "ssh-keys" if "ssh-keys" in path else "api-keys"
            if names.get("key") not in self._ids(f"/{kind}"):
                body = {"public_key": _KEY} if kind == "ssh-keys" else {"name": "spare"}
                names["key"] = self.call("POST", f"/{kind}", body)["id"]

    def _runs(self, sandbox: str) -> bool:
        answer = self.session.get(f"{self.manager.url}{_API}/sandboxes/{sandbox}", timeout=30)
        return answer.ok and answer.json()["state"] == "running"

    def _ids(self, path: str, field: str = "id") -> set[str]:
        return {str(each[field]) for each in self.call("GET", path)["items"]}

    def clear(self) -> None:
        """Nothing that has been made stands in the way of what is made next."""
        self.session.delete(f"{self.manager.url}{_API}/warm-pools/base", timeout=30)
        for sandbox in self.call("GET", "/sandboxes?limit=500")["items"]:
            self.session.delete(f"{self.manager.url}{_API}/sandboxes/{sandbox['id']}?wait=true", timeout=30)


@contextmanager
def described_api(folder: Path) -> Iterator[DescribedApi]:
    """In the end the manager's log has to be without errors."""
    variables = {"ATELIER_REQUESTS_PER_SECOND": "0"}
    manager = start_manager(folder, variables=variables)
    try:
        yield DescribedApi(manager)
    finally:
        stop_manager(manager)
        log = manager.log.read_text()
        assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:4000]


def ends_the_manager(operation: str, body: object) -> bool:
    """Whether a request to ``operation`` (its id) with this body, as parsed JSON, leaves nobody to be asked."""
    try:
        ShutdownRequest.model_validate(body)
    except ValidationError:
        return False
    return operation == "shut_down"
