"""Identity providers as processes of their own, which can be told to lie.

A provider's module runs ``serve``; tests run the module by ``provider_process`` and say by ``Provider.lying`` what its next
answers are to be like.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from tests.real_machines import REPOSITORY
from werkzeug.serving import make_server

StartResponse = Callable[..., Any]
Environ = dict[str, Any]
_LIE = "/tests/lie"

EVERYWHERE: dict[str, tuple[str, bytes]] = {
    "down": ("500 Internal Server Error", b'{"error": "down"}'),
    "no JSON": ("200 OK", b"<html>Welcome to the captive portal</html>"),
    "no Unicode": ("200 OK", b'{"access_token": "\xff"}'),
    "a list": ("200 OK", b"[]"),
    "lists": ("200 OK", b'{"access_token": [], "token_type": {}, "id_token": [], "keys": 5, "id": [], "login": {}}'),
    "depths": ("200 OK", b"[" * 100_000),
}
"""Lies that are answers to whatever is asked."""


@dataclass
class Provider:
    url: str
    process: subprocess.Popen[str]

    @contextmanager
    def lying(self, lie: str) -> Iterator[None]:
        httpx.post(self.url + _LIE, content=lie, verify=False).raise_for_status()
        try:
            yield
        finally:
            httpx.post(self.url + _LIE, content="", verify=False).raise_for_status()

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@contextmanager
def provider_process(module: str) -> Iterator[Provider]:
    """``module`` prints its port once it serves."""
    process = subprocess.Popen(
        [sys.executable, "-m", module], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    port = process.stdout.readline().strip()
    assert port, f"{module} did not start"
    provider = Provider(f"http://localhost:{port}", process)
    try:
        yield provider
    finally:
        provider.end()
        process.stdout.close()


class LyingApplication:
    """WSGI application. A provider overrides ``answer``, which ``self.lie`` tells how."""

    lie = ""

    def answer(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        raise NotImplementedError

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == _LIE:
            self.lie = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)).decode()
            return respond(start_response, "200 OK", b"{}")
        if self.lie in EVERYWHERE:
            return respond(start_response, *EVERYWHERE[self.lie])
        return self.answer(environ, start_response)


def respond(start_response: StartResponse, status: str, body: bytes | object) -> list[bytes]:
    start_response(status, [("Content-Type", "application/json")])
    return [body if isinstance(body, bytes) else json.dumps(body).encode()]


def serve(application: LyingApplication) -> None:
    server = make_server("localhost", 0, application, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()
