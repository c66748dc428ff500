"""Addresses: of managers (URLs) and of things in sandboxes (percent-encoded paths). Pure text, no I/O.

``*.localhost`` is resolved to 127.0.0.1 here, since not every resolver does it (RFC 6761, section 6.3, asks for it).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from atelier.model.errors import InvalidRequestError

RemotePath = str | bytes
"""A path in a sandbox. Bytes, or text with surrogate escapes (as ``os.fsdecode`` gives it), say any file name."""

_SANDBOX_REFERENCE_MAX_LENGTH = 300
_CONTROL = re.compile(r"[\x00-\x20\x7f]")


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect and what to call it. ``host_header`` is set when the two differ."""

    base_url: str
    host_header: str | None
    is_loopback: bool
    connect_host: str
    port: int
    is_tls: bool


def normalise_api_url(url: str) -> str:
    """The address of a manager without a trailing slash and without ``/api/v1``.

    Raises InvalidRequestError (``invalid_api_url``) for what is no http or https address.
    """
    hint = "write it as http://127.0.0.1:7420 or https://atelier.example.org"
    if _CONTROL.search(url):
        raise InvalidRequestError(f"{url!r} is no address of a manager", code="invalid_api_url", hint=hint)
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
        _ = parts.port  # raises ValueError beyond 65535
    except ValueError:
        valid = False
        parts = None
    if parts is None or not valid or parts.query or parts.fragment:
        raise InvalidRequestError(f"{url!r} is no address of a manager", code="invalid_api_url", hint=hint)
    path = parts.path.rstrip("/").removesuffix("/api/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"


def resolve_target(api_url: str) -> Target:
    """How to reach a (normalised) address: ``localhost`` and all names below it are 127.0.0.1."""
    parts = urlsplit(api_url)
    host = parts.hostname or ""
    is_tls = parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    if (host == "localhost" or host.endswith(".localhost")) and not is_tls:
        return Target(f"http://127.0.0.1:{port}{parts.path}", parts.netloc, True, "127.0.0.1", port, is_tls)
    is_loopback = host == "::1" or host == "localhost" or host.startswith("127.")
    return Target(api_url, None, is_loopback, host, port, is_tls)


def is_same_server(first: str, second: str) -> bool:
    """Whether two addresses of managers lead to the same server, as far as can be told from the text."""
    return resolve_target(normalise_api_url(first)).base_url == resolve_target(normalise_api_url(second)).base_url


def path_to_bytes(path: RemotePath) -> bytes:
    raw = path if isinstance(path, bytes) else os.fsencode(path)
    if not raw or b"\0" in raw:
        raise InvalidRequestError(
            f"{path!r} is no path in a sandbox", code="invalid_path", hint="a path is not empty and has no NUL byte"
        )
    return raw


def encode_query(parameters: Iterable[tuple[str, str | bytes | int]]) -> str:
    """A query string with every value percent-encoded byte by byte, or nothing if there are no parameters."""
    pairs = [f"{quote(key, safe='')}={quote(_as_bytes(value), safe='')}" for key, value in parameters]
    return "?" + "&".join(pairs) if pairs else ""


def encode_segment(reference: str, what: str) -> str:
    """One segment of a URL's path. ``.`` and ``..`` are refused: HTTP clients would take them for folders."""
    if reference in ("", ".", "..") or len(reference) > _SANDBOX_REFERENCE_MAX_LENGTH:
        shown = reference if len(reference) <= _SANDBOX_REFERENCE_MAX_LENGTH else reference[:40] + "..."
        raise InvalidRequestError(
            f"{shown!r} is no {what}", code="invalid_name", hint=f"give the name or id of the {what}"
        )
    return quote(os.fsencode(reference), safe="")


def _as_bytes(value: str | bytes | int) -> bytes:
    if isinstance(value, bytes):
        return value
    return os.fsencode(str(value))
