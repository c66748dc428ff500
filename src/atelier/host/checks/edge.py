"""Whether previews are served as they should be, for ``atelier doctor``: the proxy in front, its certificate for all their
names, and what stands before that."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from typing import Final

from atelier.host.checks.local import CheckResult, CheckStatus

_SECONDS: Final = 5.0
_PLUGINS: Final = "dns.providers."
_ANY_NAME: Final = "8000-doctor"
"""Of a sandbox that need not exist."""


def check_edge(public_url: str, sandbox_domain: str, port: int | None) -> list[CheckResult]:
    """``public_url``: where browsers reach the manager, by a proxy with TLS; ``sandbox_domain`` and ``port``: what stands
    behind the names of previews (None: 443)."""
    plugins = find_dns_plugins()
    return [
        _check_proxy(plugins),
        _check_public_url(public_url),
        _check_certificate(sandbox_domain, port or 443, plugins or []),
    ]


def find_dns_plugins() -> list[str] | None:
    """The DNS providers that this machine's Caddy can have certificates by; None: there is no Caddy."""
    caddy = shutil.which("caddy")
    if caddy is None:
        return None
    try:
        told = subprocess.run([caddy, "list-modules"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.removeprefix(_PLUGINS) for line in told.stdout.split() if line.startswith(_PLUGINS)]


def _check_proxy(plugins: list[str] | None) -> CheckResult:
    if plugins is None:
        remedy = "apt-get install caddy, with deploy/caddy/Caddyfile; another proxy has to do as that does"
        return CheckResult("proxy", CheckStatus.WARNING, "Caddy is not installed here", remedy)
    known = f"with DNS plugins: {', '.join(plugins)}" if plugins else "without a DNS plugin"
    return CheckResult("proxy", CheckStatus.OK, f"Caddy is installed, {known}")


def _check_public_url(public_url: str) -> CheckResult:
    try:
        with urllib.request.urlopen(f"{public_url}/health", timeout=_SECONDS) as answer:  # noqa: S310  a setting
            server = answer.headers.get("server", "")
    except urllib.error.HTTPError as error:
        server = error.headers.get("server", "")
    except (OSError, ValueError) as error:
        remedy = "is Caddy running, does the name lead here, is the certificate good? See docs/how-to/previews.md"
        return CheckResult("edge", CheckStatus.WARNING, f"{public_url} does not answer: {error}", remedy)
    if "cloudflare" in server.lower():
        remedy = "turn Rocket Loader off for the manager's and the sandboxes' names: it breaks their WebSockets"
        return CheckResult("edge", CheckStatus.WARNING, f"{public_url} is behind Cloudflare", remedy)
    return CheckResult("edge", CheckStatus.OK, f"{public_url} answers")


def _check_certificate(domain: str, port: int, plugins: list[str]) -> CheckResult:
    """The names of all sandboxes need a wildcard's: by far the most of what goes wrong with TLS here."""
    name, problem, remedy = f"{_ANY_NAME}.{domain}", "", ""
    try:
        with (
            socket.create_connection((name, port), _SECONDS) as connected,
            ssl.create_default_context().wrap_socket(connected, server_hostname=name) as verified,
        ):
            certificate = verified.getpeercert() or {}
        until = certificate.get("notAfter", "")
        return CheckResult("certificate", CheckStatus.OK, f"that of *.{domain} is good until {until}")
    except socket.gaierror:
        problem, remedy = f"there is no name {name}", f"a DNS record for *.{domain} that leads to the proxy"
    except ssl.SSLCertVerificationError as error:
        problem, remedy = f"that of {name} is not good: {error.verify_message}", _ways_to_a_certificate(domain, plugins)
    except ssl.SSLError as error:
        problem, remedy = f"there is none for {name}: {error.reason}", _ways_to_a_certificate(domain, plugins)
    except OSError as error:
        problem, remedy = f"{name}, port {port}, does not answer: {error}", "is Caddy running? Its log says why not"
    return CheckResult("certificate", CheckStatus.WARNING, problem, remedy)


def _ways_to_a_certificate(domain: str, plugins: list[str]) -> str:
    """Which of them lack something here."""
    own = f"tls-own-certificate takes one that names *.{domain}"
    if plugins:
        return f"{own}; tls-acme-dns gets one with ATELIER_DNS_PROVIDER, here one of: {', '.join(plugins)}"
    return (
        f"{own}; for tls-acme-dns this machine's Caddy lacks your DNS provider's plugin: build one that has it,"
        " as with xcaddy build --with github.com/caddy-dns/PROVIDER"
    )
