"""What changes in a message on its way between a visitor and a sandbox: whatever is Atelier's own, or only a proxy may say.

Used by ``preview_exchange``. Without I/O.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from atelier.gateway.http_head import (
    Header,
    RequestFields,
    parse_request_fields,
    parse_request_line,
    write_request_fields,
    write_request_line,
)
from atelier.model.preview import KEY_HEADER, OWN_COOKIES, OWN_HEADERS
from atelier.model.preview_visit import Visit

_OWN: Final = OWN_HEADERS.encode()
_KEY: Final = KEY_HEADER.encode()
_TELLING: Final = frozenset({b"origin", b"accept", b"x-forwarded-for", b"x-forwarded-proto", _KEY})
_NOT_THEIRS: Final = (_OWN, b"x-forwarded-")
_FORGED: Final = frozenset({b"forwarded", b"x-real-ip", b"x-original-url", b"x-rewrite-url"})
_ADDRESS: Final = re.compile(rb"[0-9A-Fa-f:.]{2,45}(?:%[0-9A-Za-z._-]{1,16})?")
_NOT_A_SANDBOXS: Final = frozenset({b"clear-site-data"})
"""It would sign people out of the manager, which is of the same site."""
_REMEMBERED: Final = 512
_REMEMBERED_MAX_BYTES: Final = 4096
_SAFE_METHODS: Final = frozenset({b"GET", b"HEAD", b"OPTIONS"})


@dataclass(frozen=True, slots=True)
class Arrival:
    """Where a visitor comes from: their IP address, and by which scheme."""

    address: str
    scheme: str


AdmissionKey = tuple[str, str, str, str, bool]
"""(host, our own cookies, API key, origin, whether it may change something)."""


class PreviewFields(NamedTuple):
    """What the header lines of a request come to. ``for_sandbox``: as the sandbox gets them. ``safe`` and ``unsafe``: all
    that the manager's yes hangs on, for the two kinds of methods."""

    fields: RequestFields
    for_sandbox: bytes
    safe: AdmissionKey
    unsafe: AdmissionKey
    accept: str
    address: str


class NobodySaid(Exception):
    """The front proxy does not say whose a request is."""


class PreviewRequest:
    """The head of a request: its first line, and what the others come to."""

    __slots__ = ("carried", "fields", "method", "target")

    def __init__(self, head: bytes, arrival: Arrival | None) -> None:
        """``arrival`` None: the front proxy says it in the head. Raises BadHead, NobodySaid."""
        first, _, lines = head.partition(b"\r\n")
        self.method, self.target, is_http_1_0 = parse_request_line(first)
        # A page's requests have the same lines, but for the first, again and again.
        read = _read_fields if len(lines) > _REMEMBERED_MAX_BYTES else _remembered_fields
        self.carried = read(lines, is_http_1_0, arrival)
        self.fields = self.carried.fields

    @property
    def key(self) -> AdmissionKey:
        is_safe = self.method in _SAFE_METHODS and not self.fields.is_web_socket
        return self.carried.safe if is_safe else self.carried.unsafe

    @property
    def keeps_alive(self) -> bool:
        """Whether the visitor's connection is good for another one, if nothing of this one's body is read."""
        return self.fields.keeps_alive and self.fields.body.is_empty

    @property
    def is_repeatable(self) -> bool:
        return self.method in _SAFE_METHODS and self.fields.body.is_empty and not self.fields.is_web_socket

    def __str__(self) -> str:
        """For the log; what stands behind a question mark may be a secret."""
        return f"{_text(self.method)} {_text(self.fields.host)}"

    def describe(self) -> Visit:
        """What the manager is told."""
        host, cookies, key, origin, _ = self.carried.safe
        return Visit(
            host=host,
            method=_text(self.method),
            target=_text(self.target),
            cookies=cookies,
            origin=origin,
            key=key,
            accept=self.carried.accept,
            address=self.carried.address,
            is_upgrade=self.fields.is_web_socket,
        )

    def write(self) -> bytes:
        """For the sandbox."""
        line = write_request_line(self.method, self.target, is_http_1_0=self.fields.is_http_1_0)
        return line + self.carried.for_sandbox


def _read_fields(lines: bytes, is_http_1_0: bool, arrival: Arrival | None) -> PreviewFields:
    fields = parse_request_fields(lines, is_http_1_0=is_http_1_0)
    headers: list[Header] = []
    own_cookies: list[str] = []
    told: dict[bytes, list[bytes]] = {}
    for header in fields.headers:
        name, written, value = header
        if name == b"cookie":
            kept = _take_cookies(value, own_cookies)
            if kept:
                headers.append((name, written, kept))
            continue
        if name in _TELLING:
            told.setdefault(name, []).append(value)
        if not name.startswith(_NOT_THEIRS) and name not in _FORGED:
            headers.append(header)
    arrival = arrival or _read_arrival(told)
    headers += (
        (b"", b"X-Forwarded-For", arrival.address.encode()),
        (b"", b"X-Forwarded-Host", fields.host),
        (b"", b"X-Forwarded-Proto", arrival.scheme.encode()),
    )
    # Of the cookies the others are no business of the manager's.
    cookies, key, origin = "; ".join(own_cookies), told.get(_KEY, ()), told.get(b"origin", ())
    asked = _text(fields.host), cookies, _text(b"".join(key)), _text(b"".join(origin))
    accept = _text(b",".join(told.get(b"accept", ())))
    return PreviewFields(
        fields, write_request_fields(fields, headers), (*asked, False), (*asked, True), accept, arrival.address
    )


_remembered_fields = lru_cache(_REMEMBERED)(_read_fields)


def _read_arrival(told: dict[bytes, list[bytes]]) -> Arrival:
    """What the front proxy says of its visitor, who cannot (deploy/caddy). Raises NobodySaid."""
    addresses, schemes = told.get(b"x-forwarded-for", []), told.get(b"x-forwarded-proto", [])
    if len(addresses) != 1 or not _ADDRESS.fullmatch(addresses[0]) or schemes not in ([b"https"], [b"http"]):
        raise NobodySaid
    return Arrival(_text(addresses[0]), _text(schemes[0]))


def _take_cookies(header: bytes, own: list[str]) -> bytes:
    """The cookies that are the sandbox's; ours go to ``own``."""
    others: list[str] = []
    for pair in _text(header).split(";"):
        pair = pair.strip()
        (own if _is_own(pair) else others).append(pair)
    return "; ".join(others).encode("latin-1")


def for_visitor(headers: list[Header]) -> list[Header]:
    """The answer's headers as the visitor sees them: a sandbox sets no cookie of ours, and says nothing in our name."""
    return [
        header
        for header in headers
        if not (header[0] == b"set-cookie" and _is_own(_text(header[2])))
        and not header[0].startswith(_OWN)
        and header[0] not in _NOT_A_SANDBOXS
    ]


def _is_own(pair: str) -> bool:
    return pair.partition("=")[0].strip().lower() in OWN_COOKIES


def _text(value: bytes) -> str:
    return value.decode("latin-1")
