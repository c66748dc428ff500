"""Previews behind the real Caddy with the configuration that is shipped: the same rights, WebSockets, events, two
gigabytes, and a manager that is restarted meanwhile."""

from __future__ import annotations

import asyncio
import http.client
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urljoin, urlsplit

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
        nobody = {
            "ATELIER_OIDC_ISSUER": f"http://127.0.0.1:{front.free_port()}",
            "ATELIER_OIDC_CLIENT_ID": "atelier",
            "ATELIER_OIDC_CLIENT_SECRET": "secret",
        }
        with (
            preview_stage(folder, **caddy.variables(), **nobody) as stage,
            front.running(caddy, folder, stage.manager.url),
        ):
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
    for name in ("8000-nothere", "nonsense", "0-box", "70000-box"):
        answer, body = edge.ask("GET", f"https://{name}.{front.SANDBOX_DOMAIN}:{edge.caddy.port}")
        assert (answer.status, b"There is no such sandbox" in body) == (404, True), name


def test_a_public_port_and_forged_headers(edge: Edge, box: str) -> None:
    url = edge.stage.share(box, 8000)
    assert url == f"https://8000-{box}.{front.SANDBOX_DOMAIN}:{edge.caddy.port}"
    forged = {
        "X-Atelier-Sandbox": "aaaaaaaaaaaa", "X-Atelier-Port": "1", "X-Atelier-Anything": "passwd",
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
    assert '["X-Forwarded-For", "127.0.0.1"]' in text
    assert '["X-Forwarded-Proto", "https"]' in text
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


def test_who_comes_to_the_gateways_socket_by_another_way(edge: Edge, box: str) -> None:
    """There nobody believes anything but whose a request is, and that one proxy has said it."""
    url = urlsplit(edge.stage.share(box, 8000))
    true = ("X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: https")
    for lines, status in (
        (true, 200),
        (("X-Forwarded-For: ::1", "X-Forwarded-Proto: https", "X-Forwarded-Host: other"), 200),
        ((), 502),
        (true[:1], 502),
        (true[1:], 502),
        ((*true, "X-Forwarded-For: 127.0.0.2"), 502),
        (("X-Forwarded-For: 127.0.0.1, 127.0.0.2", true[1]), 502),
        (("X-Forwarded-For: <script>", true[1]), 502),
        ((true[0], "X-Forwarded-Proto: gopher"), 502),
    ):
        request = "\r\n".join(["GET / HTTP/1.1", f"Host: {url.netloc}", "Connection: close", *lines, "", ""])
        with socket.socket(socket.AF_UNIX) as connected:
            connected.connect(str(edge.caddy.socket))
            connected.sendall(request.encode())
            told = connected.makefile("rb").read()
        assert told.startswith(b"HTTP/1.1 %d " % status), (lines, told[:60])
        assert (b"proxy_misconfigured" in told) is (status == 502)


def test_an_identity_provider_that_is_not_there(edge: Edge, box: str) -> None:
    url = edge.stage.call("PUT", f"/sandboxes/{box}/ports/8001", {"visibility": "private"})["url"]
    where = f"{url}/x"
    page, body = edge.ask("GET", where)
    while page.status == 303:
        where = urljoin(where, page.headers["location"])
        page, body = edge.ask("GET", where)
    assert (page.status, b"/sign-in/oidc" in body) == (200, True)
    manager = f"https://{front.DOMAIN}:{edge.caddy.port}"
    answer, body = edge.ask("POST", f"{manager}/sign-in/oidc", {"Origin": manager})
    assert (answer.status, b"identity_provider_failed" in body) == (503, True)


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
    assert edge.ask("GET", url)[0].status == 200
    unknown = {"X-Atelier-Key": "atl_nobodys"}
    with open_web_socket(edge, socket_url) as opened, ThreadPoolExecutor() as visitors:
        edge.stage.kill()
        opened.send("meanwhile")
        assert opened.recv(timeout=30) == "meanwhile"
        assert edge.ask("GET", url)[0].status == 200, "who was let in a moment ago still is"
        waiting = visitors.submit(edge.ask, "GET", url, unknown)
        at_managers = visitors.submit(edge.ask, "GET", f"https://{front.DOMAIN}/health")
        edge.stage.start_again()
        assert at_managers.result(60)[0].status == 200
        assert waiting.result(60)[0].status == 401, "it has waited, and been answered by the new one"
        opened.send("after")
        assert opened.recv(timeout=30) == "after"
        # It stays away for longer than anybody waits.
        edge.stage.kill()
        plain = [
            visitors.submit(edge.ask, "GET", address, unknown)
            for address in (url, f"https://{front.DOMAIN}/previews/enter?host=x&next=/")
        ]
        for answer, body in (each.result(60) for each in plain):
            assert answer.status == 503
            assert b"<h1>Atelier is being restarted</h1>" in body
            assert answer.headers["retry-after"] == "3"
        opened.send("still")
        assert opened.recv(timeout=30) == "still"
        edge.stage.start_again()
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


def test_caddys_own_authority(edge: Edge, box: str) -> None:
    """A second Caddy before the same gateway, with ``tls-internal``."""
    with tempfile.TemporaryDirectory(prefix="atl-") as name:
        folder = Path(name)
        root = folder / ".local" / "share" / "caddy" / "pki" / "authorities" / "local" / "root.crt"
        beside = replace(edge.caddy, port=front.free_port(), certificate=root, tls="tls-internal")
        with front.running(beside, folder, edge.stage.manager.url):
            wait_until(root.exists, 30)
            through = Edge(edge.stage, beside)
            assert through.ask("GET", f"https://{front.DOMAIN}/health")[0].status == 200
            url = urlsplit(edge.stage.share(box, 8000))
            answer, body = through.ask("GET", f"https://{url.hostname}/x", {"Host": url.netloc})
            assert (answer.status, b"GET /x" in body) == (200, True)
