"""Where previews are served: ``ATELIER_SANDBOX_DOMAIN``, ``ATELIER_PREVIEWS_LISTEN``.

Without a domain the gateway serves ``*.atelier.localhost`` by itself; with one, a proxy with TLS stands in front of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from atelier.config.addresses import ListenAddress, parse_listen
from atelier.config.errors import InvalidSettingError
from atelier.model.preview import LOCAL_DOMAIN

DEFAULT_PREVIEWS_LISTEN = "127.0.0.1:7480"
_DOMAIN = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9-]{1,63}(?<!-))+")
_UNIX = "unix:"


@dataclass(frozen=True, slots=True)
class PreviewSettings:
    """``listen`` None: on a unix socket for a proxy, ``socket`` or the run folder's own. ``port``: that of the addresses
    which browsers see; None: the scheme's own, or where the gateway listens."""

    scheme: str
    domain: str
    port: int | None
    listen: ListenAddress | None
    socket: Path | None
    is_off: bool


def load_previews(domain_text: str, listen_text: str, public_url: str, default_listen: str) -> PreviewSettings:
    """``default_listen``: where the gateway listens if nothing is said and there is no domain. Raises InvalidSettingError."""
    public = urlsplit(public_url)
    is_tls = public.scheme == "https"
    if not domain_text and is_tls and "." in (public.hostname or "") and _DOMAIN.fullmatch(public.hostname or ""):
        domain_text = f"sandboxes.{public.netloc}"
    domain, _, port_text = domain_text.lower().partition(":")
    port = int(port_text) if port_text.isdecimal() and len(port_text) <= 5 else None
    if (domain and not _DOMAIN.fullmatch(domain)) or (port_text and (port is None or not 0 < port < 65536)):
        raise InvalidSettingError(
            "ATELIER_SANDBOX_DOMAIN",
            domain_text,
            hint="a domain, and a port if it is not the usual one, as sandboxes.example.org",
        )
    is_off = listen_text.strip().lower() == "off"
    listen: ListenAddress | None = None
    socket: Path | None = None
    if listen_text.startswith(_UNIX):
        socket = Path(listen_text.removeprefix(_UNIX))
        if not socket.is_absolute():
            raise InvalidSettingError(
                "ATELIER_PREVIEWS_LISTEN",
                listen_text,
                hint="ADDRESS:PORT, off, or unix: and an absolute path",
            )
    elif listen_text and not is_off:
        listen = parse_listen(listen_text, "ATELIER_PREVIEWS_LISTEN")
    elif not domain and not is_off:
        listen = parse_listen(default_listen, "ATELIER_PREVIEWS_LISTEN")
    return PreviewSettings(
        scheme="https" if is_tls and domain else "http",
        domain=domain or LOCAL_DOMAIN,
        port=port,
        listen=listen,
        socket=socket,
        is_off=is_off,
    )
