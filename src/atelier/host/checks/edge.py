"""Whether previews are served as they should be, for ``atelier doctor``: the proxy in front, and what stands before that."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request

from atelier.host.checks.local import CheckResult, CheckStatus

_SECONDS = 5.0


def check_edge(public_url: str) -> list[CheckResult]:
    """``public_url``: where browsers reach the manager, by a proxy with TLS."""
    found = [_check_proxy()]
    try:
        with urllib.request.urlopen(f"{public_url}/health", timeout=_SECONDS) as answer:  # noqa: S310  a setting
            server = answer.headers.get("server", "")
    except urllib.error.HTTPError as error:
        server = error.headers.get("server", "")
    except (OSError, ValueError) as error:
        remedy = "is Caddy running, does the name lead here, is the certificate good? See docs/how-to/previews.md"
        return [*found, CheckResult("edge", CheckStatus.WARNING, f"{public_url} does not answer: {error}", remedy)]
    if "cloudflare" in server.lower():
        remedy = "turn Rocket Loader off for the manager's and the sandboxes' names: it breaks their WebSockets"
        return [*found, CheckResult("edge", CheckStatus.WARNING, f"{public_url} is behind Cloudflare", remedy)]
    return [*found, CheckResult("edge", CheckStatus.OK, f"{public_url} answers")]


def _check_proxy() -> CheckResult:
    if shutil.which("caddy") is None:
        remedy = (
            "apt-get install caddy, with deploy/caddy/Caddyfile; another proxy has to ask /edge/authorise as that does"
        )
        return CheckResult("proxy", CheckStatus.WARNING, "Caddy is not installed here", remedy)
    return CheckResult("proxy", CheckStatus.OK, "Caddy is installed")
