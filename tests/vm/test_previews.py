"""Previews of a real guest: its servers by HTTP and WebSocket through the gateway, alone and behind the real Caddy, while
sandboxes come and go and the manager is restarted."""

from __future__ import annotations

import http.client
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from tests import caddy as front
from tests.footprint import ask_gateway
from tests.running_manager import WITH_TEMPLATES, LocalInstallation, local_installation, wait_until
from websockets.sync.client import ClientConnection, connect

from atelier import Sandbox
from atelier.model.ids import new_sandbox_id

SECONDS = 240
REAL, FAKES = 3, 200
DOWNLOAD_BYTES = 100_000_000
# A WebSocket that sends back each short text, by the standard library alone; and a file of zeros without its bytes.
SERVER = rb"""
import base64, hashlib, http.server, socketserver
class Server(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.path == "/zeros":
            self.send_response(200); self.send_header("Content-Length", "@BYTES@"); self.end_headers()
            piece = bytes(65536)
            left = @BYTES@
            while left:
                left -= self.wfile.write(piece[:left])
        elif self.headers.get("Upgrade"):
            key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            self.send_response(101); self.send_header("Upgrade", "websocket"); self.send_header("Connection", "Upgrade")
            self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
            self.end_headers(); self.close_connection = True
            while head := self.rfile.read(2):
                size = head[1] & 127
                mask = self.rfile.read(4)
                text = bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(size)))
                self.wfile.write(bytes([head[0], size]) + text)
                if head[0] & 15 == 8: return
        else:
            body = ("%s %s" % (self.path, self.headers["Host"])).encode()
            self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
            self.wfile.write(body)
    def log_message(self, *words): pass
class Threads(socketserver.ThreadingMixIn, http.server.HTTPServer): daemon_threads = True
Threads(("127.0.0.1", 8000), Server).serve_forever()
""".replace(b"@BYTES@", str(DOWNLOAD_BYTES).encode())


@pytest.fixture(scope="module")
def caddy() -> Iterator[tuple[front.Caddy, Path]]:
    if front.NO_CADDY:
        pytest.skip(front.NO_CADDY)
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:
        yield front.prepare(Path(folder)), Path(folder)


def begin_serving(made: LocalInstallation) -> str:
    """Id of a sandbox in which the server runs."""
    row = made.create("box")
    with made.manager.client() as client:
        files = f"/api/v1/sandboxes/{row['id']}/files?path=/tmp/server.py"
        assert client.put(files, content=SERVER).status_code in (200, 201)
    made.run("box", "nohup setsid python3 /tmp/server.py >/dev/null 2>&1 </dev/null &")
    wait_until(lambda: listed(made), SECONDS)
    return row["id"]


def listed(made: LocalInstallation) -> bool:
    items = made.call("GET", "/sandboxes/box/ports")["items"]
    return any((each["port"], each["is_open"]) == (8000, True) for each in items)


def say(opened: ClientConnection, text: str) -> None:
    opened.send(text)
    assert opened.recv(timeout=SECONDS) == text


def fakes_come_and_go(made: LocalInstallation, proxy: front.Caddy) -> None:
    """Sandboxes of which there is no more than a VMM's socket, at the same gateway, each with a visitor."""
    socket_path = made.folder / "fake-vmm.sock"
    with socket.socket(socket.AF_UNIX) as machines:
        machines.bind(str(socket_path))
        machines.listen(FAKES)
        for _ in range(FAKES):
            fake = new_sandbox_id()
            channel = {"sandbox_id": fake, "socket_path": str(socket_path), "token": "x" * 32}
            assert ask_gateway(made.manager, "attach", **channel)["ok"]
            host = f"8000-{fake}.{front.SANDBOX_DOMAIN}"
            visitor = http.client.HTTPConnection(host, proxy.port)
            visitor.sock = proxy.connect(host)
            visitor.request("GET", "/")
            assert visitor.getresponse().status == 404, "no row is its, so nobody is let in"
            visitor.close()
            assert ask_gateway(made.manager, "detach", sandbox_id=fake)["ok"]


def test_a_real_guest_by_the_gateway_alone() -> None:
    with local_installation(WITH_TEMPLATES) as made:
        sandbox_id = begin_serving(made)
        handle = Sandbox.connect("box", api_url=made.manager.url, api_key=made.manager.key)
        url = handle.preview_url(8000)
        parts = urlsplit(url)
        with handle.preview_client(8000) as client:
            assert client.get("/a?b", timeout=SECONDS).text == f"/a?b {parts.netloc}"
            closed = handle.preview_client(8001).get("/", timeout=SECONDS)
            assert (closed.status_code, "port_closed" in closed.text) == (502, True)
        made.call("PUT", "/sandboxes/box/ports/8000", {"visibility": "public"})
        connected = socket.create_connection(("127.0.0.1", parts.port or 0), timeout=SECONDS)
        with connect(f"ws://{parts.netloc}/", sock=connected, open_timeout=SECONDS) as opened:
            say(opened, "before")
            # The manager dies and comes back: what is open stays open.
            made.kill()
            say(opened, "meanwhile")
            made.start()
            say(opened, "after")
            for number in range(3):
                made.create(f"other-{number}")
                say(opened, f"beside {number}")
                made.call("DELETE", f"/sandboxes/other-{number}?wait=true", expected=204)
                say(opened, f"without {number}")
        with httpx.Client(timeout=SECONDS) as client:
            again = client.get(f"http://127.0.0.1:{parts.port}/again", headers={"Host": parts.netloc})
            assert again.text == f"/again {parts.netloc}", "the gateway and its address are the same"
            # A paused one wakes for its visitor, and its server goes on.
            made.call("POST", f"/sandboxes/{sandbox_id}/pause?wait=true&timeout_seconds=600")
            woken = client.get(f"http://127.0.0.1:{parts.port}/woken", headers={"Host": parts.netloc})
            assert woken.text == f"/woken {parts.netloc}"
        handle.close()


def test_a_real_guest_behind_caddy(caddy: tuple[front.Caddy, Path]) -> None:
    proxy, folder = caddy
    with local_installation({**WITH_TEMPLATES, **proxy.variables()}) as made, front.running(
        proxy, folder, made.manager.url
    ):  # fmt: skip
        begin_serving(made)
        url = urlsplit(made.call("PUT", "/sandboxes/box/ports/8000", {"visibility": "public"})["url"])
        connection = http.client.HTTPConnection(url.hostname or "", proxy.port)
        connection.sock = proxy.connect(url.hostname or "")
        connection.sock.settimeout(SECONDS)
        connection.request("GET", "/zeros")
        answer = connection.getresponse()
        received, space = 0, bytearray(2**20)
        while count := answer.readinto(space):
            received += count
        assert received == DOWNLOAD_BYTES
        connection.close()
        with (
            connect(f"ws://{url.netloc}/", sock=proxy.connect(url.hostname or ""), open_timeout=SECONDS) as opened,
            ThreadPoolExecutor() as others,
        ):
            say(opened, "through TLS")
            passing = others.submit(fakes_come_and_go, made, proxy)
            for number in range(REAL):
                made.create(f"other-{number}")
                say(opened, f"beside {number}")
                made.call("DELETE", f"/sandboxes/other-{number}?wait=true", expected=204)
                say(opened, f"without {number}")
            passing.result()
            say(opened, "when all have gone")
            made.kill()
            say(opened, "while there is no manager")
            made.start("--listen", made.manager.url.removeprefix("http://"))
            say(opened, "as on the first day")
