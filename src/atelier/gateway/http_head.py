"""The heads of HTTP/1.1 messages: read strictly, written anew. Without I/O; used by ``preview_exchange``.

Both sides are hostile: a visitor who wants two servers to see different requests, and a guest that wants a visitor to see
an answer that is not its own. So what RFC 9112 lets a server refuse is refused, and nothing is passed on as it came: each
head is taken apart and put together again. Source: RFC 9110, RFC 9112.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

HEAD_MAX_BYTES: Final = 32 * 1024
HEADERS_MAX: Final = 128

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) (/[\x21-\x7e]*|\*) HTTP/1\.([01])")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?")
_HEADER: Final = re.compile(
    rb"(" + _TOKEN + rb"):[ \t]*((?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?)[ \t]*"
)
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_HOP_BY_HOP: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
_NO_BODY_STATUS: Final = frozenset({204, 304})

Header = tuple[bytes, bytes, bytes]
"""(name in lower case, name as it came, value)."""
Framing = Literal["none", "length", "chunked", "close"]


class BadHead(Exception):
    """``status`` is what a visitor is answered whose request this was."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True)
class Body:
    """How a body is told from what follows. ``length``: in bytes, where that is known."""

    framing: Framing
    length: int = 0

    @property
    def is_empty(self) -> bool:
        return self.framing == "none" or (self.framing == "length" and self.length == 0)


@dataclass(slots=True)
class RequestHead:
    """``headers`` are those that go from end to end, ``Content-Length`` among them."""

    method: bytes
    target: bytes
    host: bytes
    headers: list[Header]
    body: Body
    keeps_alive: bool
    is_http_1_0: bool
    is_web_socket: bool

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, _, value in self.headers if key == name]


@dataclass(slots=True)
class ResponseHead:
    """As of a request. ``body`` is what its status says of it; whether the request was HEAD, the caller knows."""

    status: int
    reason: bytes
    headers: list[Header]
    body: Body
    keeps_alive: bool
    is_switching: bool


def parse_request(head: bytes) -> RequestHead:
    """``head``: without the empty line at its end. Raises BadHead."""
    first, *lines = head.split(b"\r\n")
    found = _REQUEST_LINE.fullmatch(first)
    if found is None:
        raise BadHead(400, "the first line is no request of HTTP/1.1")
    method, target, minor = found.groups()
    if method in (b"CONNECT", b"TRACE") or (target == b"*" and method != b"OPTIONS"):
        raise BadHead(405, "this method is not carried")
    headers = _parse_headers(lines)
    hosts = [value for name, _, value in headers if name == b"host"]
    if len(hosts) != 1:
        raise BadHead(400, "a request names its host, once")
    options = _connection_options(headers)
    body = _parse_framing(headers, Body("none"), is_http_1_0=minor == b"0")
    is_web_socket = (
        b"upgrade" in options
        and body.is_empty
        and [value.lower() for name, _, value in headers if name == b"upgrade"] == [b"websocket"]
    )
    return RequestHead(
        method=method,
        target=target,
        host=hosts[0],
        headers=_end_to_end(headers, options),
        body=body,
        keeps_alive=b"close" not in options and (minor == b"1" or b"keep-alive" in options),
        is_http_1_0=minor == b"0",
        is_web_socket=is_web_socket,
    )


def parse_response(head: bytes) -> ResponseHead:
    """As ``parse_request``; a guest's fault has no status of its own."""
    first, *lines = head.split(b"\r\n")
    found = _STATUS_LINE.fullmatch(first)
    if found is None:
        raise BadHead(502, "the first line is no answer of HTTP/1.1")
    status = int(found[2])
    headers = _parse_headers(lines)
    options = _connection_options(headers)
    has_none = status < 200 or status in _NO_BODY_STATUS
    body = _parse_framing(headers, Body("close"), is_http_1_0=found[1] == b"0")
    return ResponseHead(
        status=status,
        reason=(found[3] or b""),
        headers=_end_to_end(headers, options),
        body=Body("none") if has_none else body,
        keeps_alive=found[1] == b"1" and b"close" not in options and (has_none or body.framing != "close"),
        is_switching=status == 101 and b"upgrade" in options,
    )


def _parse_headers(lines: list[bytes]) -> list[Header]:
    if len(lines) > HEADERS_MAX:
        raise BadHead(431, f"more than {HEADERS_MAX} headers")
    headers: list[Header] = []
    for line in lines:
        # Neither a folded line, nor space before the colon, nor a lone CR or LF, nor NUL gets past this.
        found = _HEADER.fullmatch(line)
        if found is None:
            raise BadHead(400, "a header is malformed")
        headers.append((found[1].lower(), found[1], found[2]))
    return headers


def _connection_options(headers: list[Header]) -> frozenset[bytes]:
    named = (value for name, _, value in headers if name == b"connection")
    return frozenset(option.strip().lower() for value in named for option in value.split(b","))


def _end_to_end(headers: list[Header], options: frozenset[bytes]) -> list[Header]:
    # The host and how long a body is nobody may have taken out by naming them.
    dropped = _HOP_BY_HOP | (options - {b"host", b"content-length", b"cookie", b"authorization"})
    return [header for header in headers if header[0] not in dropped]


def _parse_framing(headers: list[Header], without: Body, *, is_http_1_0: bool) -> Body:
    """``without``: what a message is that says nothing of its body."""
    lengths = [value for name, _, value in headers if name == b"content-length"]
    codings = [value.lower() for name, _, value in headers if name == b"transfer-encoding"]
    if codings:
        if lengths or is_http_1_0:
            raise BadHead(400, "the length of the body is said in two ways")
        if codings != [b"chunked"]:
            raise BadHead(501, "no transfer coding but chunked is carried")
        return Body("chunked")
    if not lengths:
        return without
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise BadHead(400, "the length of the body is no number, or said twice")
    return Body("length", int(lengths[0]))


def write_request(head: RequestHead) -> bytes:
    """The request for the next server."""
    lines = [b"%b %b HTTP/1.%d" % (head.method, head.target, not head.is_http_1_0)]
    lines += [b"%b: %b" % (name, value) for _, name, value in head.headers]
    if head.body.framing == "chunked":
        lines.append(b"Transfer-Encoding: chunked")
    if head.is_web_socket:
        lines.append(b"Connection: Upgrade\r\nUpgrade: websocket")
    else:
        lines.append(b"Connection: close" if head.is_http_1_0 else b"Connection: keep-alive")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def write_response(head: ResponseHead, body: Body, *, keeps_alive: bool) -> bytes:
    """The answer for the visitor. ``body``: how it is framed there."""
    lines = [b"HTTP/1.1 %d %b" % (head.status, head.reason)]
    lines += [b"%b: %b" % (name, value) for _, name, value in head.headers]
    if body.framing == "chunked":
        lines.append(b"Transfer-Encoding: chunked")
    if head.is_switching:
        lines.append(b"Connection: Upgrade\r\nUpgrade: websocket")
    elif not keeps_alive:
        lines.append(b"Connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"
