"""Previews without virtual machines: a manager with fakes, the real gateway, and guests' channels that the test serves.

A channel is what the gateway finds at ``channels/<id>.sock``; here ``CONNECT <port>`` leads to a coroutine of the test's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from tests.running_manager import RunningManager, start_manager, stop_manager, wait_until

from atelier.model.layout import RunLayout

T = TypeVar("T")
Serving = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
WITH_GATEWAY = ("tests.manager_with_gateway",)


class Channels:
    """Serves channels in a thread of its own. ``servers``: by port, of every sandbox."""

    def __init__(self) -> None:
        self.servers: dict[int, Serving] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Awaitable[T]) -> T:
        async def carried_out() -> T:
            return await work

        done: Future[T] = asyncio.run_coroutine_threadsafe(carried_out(), self._loop)
        return done.result(60)

    def open(self, path: Path) -> None:
        self.run(asyncio.start_unix_server(self._serve, str(path), limit=2**20))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            verb, port = (await reader.readline()).split()
            assert verb == b"CONNECT"
            server = self.servers.get(int(port))
            if server is None:
                writer.write(b"ERROR refused\n")
            else:
                writer.write(b"OK 1\n")
                await server(reader, writer)
        writer.close()


class PreviewStage:
    """``start``: starts the manager, with options added to its own."""

    def __init__(self, start: Callable[..., RunningManager], channels: Channels) -> None:
        self._start = start
        manager = start()
        self.manager = manager
        self.channels = channels
        self.run = RunLayout(wait_until(lambda: next(manager.run_dir.glob("*/gateway.sock"), None), 20).parent)

    def kill(self) -> None:
        """The manager, as it stands."""
        self.manager.process.kill()
        self.manager.process.wait()

    def start_again(self) -> None:
        """Where it was."""
        self.manager = self._start("--listen", self.manager.url.removeprefix("http://"))

    def create(self, client: httpx.Client | None = None, **wishes: object) -> str:
        """Id of a running sandbox, whose channel is the test's."""
        with client or self.manager.client() as asking:
            made = asking.post("/api/v1/sandboxes?wait=true", json=wishes)
        assert made.status_code == 201, made.text
        sandbox_id = made.json()["id"]
        self.channels.open(self.run.channel_socket(sandbox_id))
        return sandbox_id

    def call(self, method: str, path: str, body: object = None, expected: int = 200) -> dict[str, Any]:
        with self.manager.client() as client:
            answer = client.request(method, f"/api/v1{path}", json=body)
        assert answer.status_code == expected, answer.text
        return answer.json() if answer.content else {}

    def share(self, sandbox: str, port: int, visibility: str = "public") -> str:
        """The preview's URL."""
        return self.call("PUT", f"/sandboxes/{sandbox}/ports/{port}", {"visibility": visibility})["url"]

    def logs(self) -> str:
        """What manager and gateway have said."""
        gateway = self.manager.data_dir / "logs" / "gateway.log"
        return self.manager.log.read_text() + gateway.read_text()

    def raw(self, url: str, request: bytes, *, until: bytes = b"", seconds: float = 30) -> bytes:
        """What is answered to these bytes, until the connection's end or until ``until`` came."""
        port = urlsplit(url).port
        assert port is not None
        with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connected:
            connected.sendall(request)
            received = b""
            while (not until or until not in received) and (piece := connected.recv(65536)):
                received += piece
        return received


class Browser:
    """Cookies by host, and names below localhost lead here; redirects are followed only where asked for."""

    def __init__(self) -> None:
        self.cookies: dict[str, dict[str, str]] = {}
        self.http = httpx.Client(timeout=60, headers={"Accept": "text/html"})

    def ask(self, method: str, url: str, **options: Any) -> httpx.Response:
        """``url``: of a manager or preview on this machine."""
        parts = urlsplit(url)
        headers = {"Host": parts.netloc, **options.pop("headers", {})}
        if cookie := self.cookies.get(parts.netloc):
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in cookie.items())
        local = parts._replace(netloc=f"127.0.0.1:{parts.port}").geturl()
        answer = self.http.request(method, local, headers=headers, **options)
        self.http.cookies.clear()
        for line in answer.headers.get_list("set-cookie"):
            name, _, rest = line.partition("=")
            self.cookies.setdefault(parts.netloc, {})[name] = rest.partition(";")[0]
        return answer

    def follow(self, url: str) -> httpx.Response:
        """As a browser that opens ``url``."""
        for _ in range(10):
            answer = self.ask("GET", url)
            if answer.status_code != 303:
                return answer
            location = answer.headers["location"]
            parts = urlsplit(url)
            url = location if "://" in location else f"{parts.scheme}://{parts.netloc}{location}"
        raise AssertionError("redirects without end")


async def echo_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An HTTP server that answers with what it was sent, as JSON; keeps connections."""
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")[:-2]
        headers = [line.partition(": ")[::2] for line in lines[1:]]
        length = int(next((value for name, value in headers if name.lower() == "content-length"), "0"))
        body = await reader.readexactly(length)
        content = json.dumps({"line": lines[0], "headers": headers, "body": body.decode("latin-1")}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content))
        writer.write(content)
        await writer.drain()


@contextlib.contextmanager
def preview_stage(folder: Path, **variables: str) -> Iterator[PreviewStage]:
    channels = Channels()

    def start(*options: str) -> RunningManager:
        return start_manager(folder, *options, program=WITH_GATEWAY, variables=variables)

    stage = PreviewStage(start, channels)
    try:
        yield stage
    finally:
        stop_manager(stage.manager)
        channels.close()
