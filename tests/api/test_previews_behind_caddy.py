"""Previews behind the real Caddy with the configuration that is shipped: the same rights, WebSockets, events, two
gigabytes, and a manager that is restarted meanwhile."""

from __future__ import annotations

import asyncio
import http.client
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests import caddy as front
from tests.api.test_preview_carrying import gateway_peak_mib, web_socket_echo
from tests.caddy import Caddy
from tests.preview_stage import PreviewStage, echo_request, preview_stage
from tests.running_manager import wait_until
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

pytestmark = pytest.mark.skipif(bool(front.NO_CADDY), reason=front.NO_CADDY or "there is one")

TWO_GB = 2_000_000_000


@dataclass(frozen=True)
class Edge:
    stage: PreviewStage
    caddy: Caddy

    def ask(
        self, method: str, url: str, headers: dict[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or "", self.caddy.port)
        connection.sock = self.caddy.connect(parts.hostname or "")
        try:
            connection.request(
                method, f"{parts.path or '/'}?{parts.query}", headers={"Accept": "text/html", **(headers or {})}
            )
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def edge() -> Iterator[Edge]:
    with tempfile.TemporaryDirectory(prefix="atl-") as name:
        folder = Path(name)
        caddy = front.prepare(folder)
        with preview_stage(folder, **caddy.variables()) as stage, front.running(caddy, folder, stage.manager.url):
            stage.channels.servers[8000] = echo_request
            stage.channels.servers[8008] = web_socket_echo
            yield Edge(stage, caddy)
            assert "Traceback" not in stage.logs()


@pytest.fixture(scope="module")
def box(edge: Edge) -> str:
    return edge.stage.create(name="box")


def test_the_manager_and_what_is_nobodys(edge: Edge, box: str) -> None:
    manager = f"https://{front.DOMAIN}"
    assert edge.ask("GET", f"{manager}/health")[0].status == 200
    assert edge.ask("GET", f"{manager}/edge/authorise")[0].status == 404
    for name in ("8000-nothere", "nonsense", "0-box", "70000-box"):
        answer, body = edge.ask("GET", f"https://{name}.{front.SANDBOX_DOMAIN}:{edge.caddy.port}")
        assert (answer.status, b"There is no such sandbox" in body) == (404, True), name


def test_a_public_port_and_forged_headers(edge: Edge, box: str) -> None:
    url = edge.stage.share(box, 8000)
    assert url == f"https://8000-{box}.{front.SANDBOX_DOMAIN}:{edge.caddy.port}"
    forged = {
        "X-Atelier-Upstream": "/etc/passwd", "X-Atelier-Sandbox": "aaaaaaaaaaaa", "X-Atelier-Port": "1",
        "X-Forwarded-For": "6.6.6.6", "X-Forwarded-Host": "evil", "X-Forwarded-Proto": "http",
        "X-Forwarded-Uri": "/evil", "X-Forwarded-Method": "GET", "Forwarded": "for=6.6.6.6",
        "Cookie": "a=1; __Host-atelier=secret; __Host-atelier-preview=x",
    }  # fmt: skip
    answer, body = edge.ask("POST", f"{url}/a?b=c", forged)
    assert answer.status == 200, body
    text = body.decode()
    assert '"POST /a?b=c HTTP/1.1"' in text
    for word in ("6.6.6.6", "evil", "passwd", "x-atelier", "secret", "atelier-preview"):
        assert word not in text.lower(), word
    assert '"X-Forwarded-Proto", "https"' in text
    assert '["Host", "8000-' in text


def test_a_private_port(edge: Edge, box: str) -> None:
    stage = edge.stage
    url = stage.call("PUT", f"/sandboxes/{box}/ports/8000", {"visibility": "private"})["url"]
    answer, _ = edge.ask("GET", f"{url}/x")
    location = answer.headers["location"]
    assert (answer.status, location.startswith(f"https://{front.DOMAIN}:{edge.caddy.port}/previews/enter?")) == (
        303,
        True,
    )
    assert edge.ask("GET", url, {"X-Atelier-Key": stage.manager.key})[0].status == 200
    assert edge.ask("GET", url, {"X-Atelier-Key": "atl_wrong"})[0].status == 401
    entered = stage.call("POST", f"/sandboxes/{box}/ports/8000/visits", {}, 201)["url"]
    answer, _ = edge.ask("GET", entered)
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("__Host-atelier-preview=")
    assert cookie.endswith("; Secure")
    given = {"Cookie": cookie.partition(";")[0]}
    assert edge.ask("GET", url, given)[0].status == 200
    assert edge.ask("POST", url, given)[0].status == 403
    assert edge.ask("POST", url, {**given, "Origin": url})[0].status == 200
    sibling = stage.call("PUT", f"/sandboxes/{box}/ports/8008", {"visibility": "private"})["url"]
    assert edge.ask("POST", url, {**given, "Origin": sibling})[0].status == 403
    with pytest.raises(InvalidStatus) as refused:
        open_web_socket(edge, url, {**given, "Origin": sibling})
    assert refused.value.response.status_code == 403


def open_web_socket(edge: Edge, url: str, headers: dict[str, str] | None = None):
    parts = urlsplit(url)
    return connect(f"ws://{parts.netloc}/", sock=edge.caddy.connect(parts.hostname or ""), additional_headers=headers)


def test_a_web_socket_lives_on_while_sandboxes_come_and_go(edge: Edge, box: str) -> None:
    url = edge.stage.share(box, 8008)
    with open_web_socket(edge, url) as opened:
        for round in range(40):
            with edge.stage.manager.client() as client:
                made = client.post("/api/v1/sandboxes?wait=true", json={}).json()["id"]
                assert client.delete(f"/api/v1/sandboxes/{made}?wait=true").status_code == 204
            opened.send(f"round {round}")
            assert opened.recv(timeout=30) == f"round {round}"


def test_a_manager_that_dies_and_comes_back_drops_nothing(edge: Edge, box: str) -> None:
    """Last of what asks the manager for much: its sandboxes are fakes, and are started anew with it."""
    url = edge.stage.share(box, 8000)
    socket_url = edge.stage.share(box, 8008)
    got: list[int] = []
    with open_web_socket(edge, socket_url) as opened:
        edge.stage.kill()
        opened.send("meanwhile")
        assert opened.recv(timeout=30) == "meanwhile"
        waiting = threading.Thread(target=lambda: got.append(edge.ask("GET", url)[0].status))
        waiting.start()
        edge.stage.start_again()
        waiting.join(60)
        opened.send("after")
        assert opened.recv(timeout=30) == "after"
    assert got in ([200], [503]), "it has waited, and been answered by the new one"
    wait_until(lambda: edge.ask("GET", url)[0].status == 200, 30)


def test_two_gigabytes(edge: Edge, box: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % TWO_GB)
        piece = bytes(1_000_000)
        for _ in range(TWO_GB // len(piece)):
            writer.write(piece)
            await writer.drain()

    edge.stage.channels.servers[8010] = serve
    url = urlsplit(edge.stage.share(box, 8010))
    connection = http.client.HTTPConnection(url.hostname or "", edge.caddy.port)
    connection.sock = edge.caddy.connect(url.hostname or "")
    connection.request("GET", "/")
    answer = connection.getresponse()
    received, space = 0, bytearray(2**20)
    while count := answer.readinto(space):
        received += count
    connection.close()
    assert received == TWO_GB
    assert gateway_peak_mib(edge.stage) < 200


def test_events_come_at_once(edge: Edge, box: str) -> None:
    going = threading.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"b\r\ndata: one\n\n\r\n")
        while not going.is_set():
            await asyncio.sleep(0.05)
        writer.write(b"b\r\ndata: two\n\n\r\n0\r\n\r\n")

    edge.stage.channels.servers[8011] = serve
    url = urlsplit(edge.stage.share(box, 8011))
    connection = http.client.HTTPConnection(url.hostname or "", edge.caddy.port)
    connection.sock = edge.caddy.connect(url.hostname or "")
    connection.request("GET", "/", headers={"Accept": "text/event-stream"})
    answer = connection.getresponse()
    assert answer.readline() == b"data: one\n"
    going.set()
    assert answer.read() == b"\ndata: two\n\n"
    connection.close()
