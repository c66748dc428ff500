"""What ``atelier doctor`` says of previews behind a proxy."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import caddy as front

from atelier.host.checks.edge import check_edge, find_dns_plugins
from atelier.host.checks.local import CheckResult, CheckStatus

with_caddy = pytest.mark.skipif(bool(front.NO_CADDY), reason=front.NO_CADDY or "there is one")


@contextlib.contextmanager
def serving(name: str, certificate: Path | None = None) -> Iterator[int]:
    """Its port. ``name``: what the server says that it is."""

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def version_string(self) -> str:
            return name

        def log_message(self, *words: object) -> None:
            del words

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def all_names_lead_here(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def here(host: str, *rest: Any, **options: Any) -> Any:
        return look_up("127.0.0.1" if host.endswith(".test") else host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", here)


def found(public_url: str, domain: str = "boxes.invalid", port: int | None = None) -> dict[str, CheckResult]:
    return {each.name: each for each in check_edge(public_url, domain, port)}


@pytest.mark.parametrize(("name", "status"), [("Caddy", CheckStatus.OK), ("cloudflare", CheckStatus.WARNING)])
def test_what_stands_in_front(name: str, status: CheckStatus) -> None:
    with serving(name) as port:
        edge = found(f"http://127.0.0.1:{port}")["edge"]
    assert edge.status is status
    assert ("Rocket Loader" in edge.remedy) is (name == "cloudflare")


def test_nobody_there_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("gone") as port:
        pass
    monkeypatch.setenv("PATH", "")
    checks = found(f"http://127.0.0.1:{port}")
    assert {each.status for each in checks.values()} == {CheckStatus.WARNING}
    assert "apt-get install caddy" in checks["proxy"].remedy
    assert "does not answer" in checks["edge"].message
    assert "a DNS record for *.boxes.invalid" in checks["certificate"].remedy


@pytest.mark.usefixtures("all_names_lead_here")
def test_the_certificate_of_all_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, _ = front.make_certificate(tmp_path)
    with serving("Caddy", certificate) as port:
        url = f"http://127.0.0.1:{port}"
        stranger = found(url, front.SANDBOX_DOMAIN, port)["certificate"]
        assert (stranger.status, "not good" in stranger.message) == (CheckStatus.WARNING, True)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        good = found(url, front.SANDBOX_DOMAIN, port)["certificate"]
        assert (good.status, "is good until" in good.message) == (CheckStatus.OK, True)
        other = found(url, "others.test", port)["certificate"]
        assert (other.status, "names *.others.test" in other.remedy) == (CheckStatus.WARNING, True)
    gone = found(url, front.SANDBOX_DOMAIN, port)["certificate"]
    assert (gone.status, "is Caddy running" in gone.remedy) == (CheckStatus.WARNING, True)
    with serving("no TLS") as port:
        none = found(url, front.SANDBOX_DOMAIN, port)["certificate"]
    assert (none.status, "there is none" in none.message) == (CheckStatus.WARNING, True)


@with_caddy
@pytest.mark.usefixtures("all_names_lead_here")
def test_a_caddy_without_a_dns_plugin_is_named_as_what_is_missing(tmp_path: Path) -> None:
    assert find_dns_plugins() == [], "Debian's has none"
    with serving("no TLS") as port:
        checks = found(f"http://127.0.0.1:{port}", front.SANDBOX_DOMAIN, port)
    assert checks["proxy"].message == "Caddy is installed, without a DNS plugin"
    assert "tls-acme-dns this machine's Caddy lacks your DNS provider's plugin" in checks["certificate"].remedy
    # And so says Caddy, of the configuration that needs one.
    proxy = front.prepare(tmp_path)
    for tls, said in (("tls-acme-dns", "dns.providers.cloudflare"), ("tls-own-certificate", ""), ("tls-internal", "")):
        variables = {**front.variables(proxy, tmp_path), "ATELIER_TLS": tls, "ATELIER_DNS_TOKEN": "token"}
        done = subprocess.run(
            ["caddy", "validate", "--config", str(front.CONFIG)],
            env={**variables, "ATELIER_MANAGER": "127.0.0.1:1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode != 0) is bool(said), done.stderr
        assert said in done.stderr


@pytest.mark.usefixtures("all_names_lead_here")
def test_a_caddy_with_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "caddy"
    program.write_text("#!/bin/sh\necho 'http.handlers.file_server\ndns.providers.hetzner\ndns.providers.ovh'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with serving("no TLS") as port:
        checks = found(f"http://127.0.0.1:{port}", front.SANDBOX_DOMAIN, port)
    assert "hetzner, ovh" in checks["proxy"].message
    assert "ATELIER_DNS_PROVIDER, here one of: hetzner, ovh" in checks["certificate"].remedy
