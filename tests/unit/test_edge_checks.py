"""What ``atelier doctor`` says of previews behind a proxy."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator

import pytest

from atelier.host.checks.edge import check_edge
from atelier.host.checks.local import CheckStatus


@contextlib.contextmanager
def serving(name: str) -> Iterator[str]:
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def version_string(self) -> str:
            return name

        def log_message(self, *words: object) -> None:
            del words

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("name", "status"), [("Caddy", CheckStatus.OK), ("cloudflare", CheckStatus.WARNING)])
def test_what_stands_in_front(name: str, status: CheckStatus) -> None:
    with serving(name) as url:
        found = check_edge(url)[-1]
    assert found.status is status
    assert ("Rocket Loader" in found.remedy) is (name == "cloudflare")


def test_nobody_there_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("gone") as url:
        pass
    monkeypatch.setenv("PATH", "")
    proxy, edge = check_edge(url)
    assert (proxy.status, edge.status) == (CheckStatus.WARNING, CheckStatus.WARNING)
    assert "apt-get install caddy" in proxy.remedy
    assert "does not answer" in edge.message
