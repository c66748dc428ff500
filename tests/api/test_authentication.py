"""Token, Host and Origin: every route of the OpenAPI document refuses a stranger."""

from __future__ import annotations

import json
from http.client import HTTPConnection
from urllib.parse import urlsplit

import httpx
import pytest
from tests.running_manager import RunningManager
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import connect


def test_health_and_documentation_are_open(manager: RunningManager) -> None:
    health = httpx.get(f"{manager.url}/health").json()
    assert health["status"] == "ok"
    assert health["mode"] == "mock"
    page = httpx.get(f"{manager.url}/docs")
    assert page.status_code == 200
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert asset in page.text
        assert httpx.get(f"{manager.url}/docs/assets/{asset}").status_code == 200
    assert "http" not in page.text.replace("http-equiv", ""), "the page must not fetch anything from elsewhere"


def test_every_route_refuses_a_stranger(manager: RunningManager) -> None:
    document = httpx.get(f"{manager.url}/openapi.json").json()
    checked = 0
    # Without TLS: each client reads all certificates otherwise.
    with httpx.Client(base_url=manager.url, timeout=30, verify=False) as stranger:
        for path, operations in document["paths"].items():
            if path == "/health":
                continue
            url = path.replace("{sandbox}", "some").replace("{pid}", "1").replace("{name}", "base")
            for method in operations:
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {manager.key}"}):
                    answer = stranger.request(method, url, headers=headers)
                    assert answer.status_code == 401, f"{method} {path}"
                    assert answer.json()["code"] == "unauthenticated"
                    checked += 1
    assert checked > 60


def test_foreign_host_and_origin_are_refused(manager: RunningManager, api: httpx.Client) -> None:
    foreign_host = api.get("/api/v1/sandboxes", headers={"Host": "evil.example"})
    assert (foreign_host.status_code, foreign_host.json()["code"]) == (403, "wrong_host")
    foreign_origin = api.get("/api/v1/sandboxes", headers={"Origin": "https://evil.example"})
    assert (foreign_origin.status_code, foreign_origin.json()["code"]) == (403, "wrong_origin")
    assert api.get("/api/v1/sandboxes", headers={"Origin": manager.url}).status_code == 200
    assert httpx.get(f"{manager.url}/health", headers={"Host": "evil.example"}).status_code == 403


def test_websocket_refuses_a_stranger(manager: RunningManager, sandbox: str) -> None:
    url = manager.url.replace("http", "ws") + f"/api/v1/sandboxes/{sandbox}/pty"
    with pytest.raises((InvalidStatus, WebSocketException)), connect(url) as socket:
        socket.recv(timeout=10)


def test_oversized_body_is_refused(manager: RunningManager, sandbox: str) -> None:
    address = urlsplit(manager.url)
    connection = HTTPConnection(address.hostname or "", address.port)
    # Only promised, never sent: the answer must come on the promise alone.
    connection.putrequest("POST", f"/api/v1/sandboxes/{sandbox}/run")
    connection.putheader("Authorization", f"Bearer {manager.key}")
    connection.putheader("Content-Length", str(2**30))
    connection.endheaders()
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["code"]) == (413, "body_too_large")
    connection.close()
